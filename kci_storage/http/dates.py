# SPDX-License-Identifier: LGPL-2.1-or-later
"""HTTP dates (RFC 9110, section 5.6.7), and seconds since the epoch."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from email.utils import formatdate

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH = f"(?P<month>{'|'.join(_MONTHS)})"
_TIME = "(?P<hour>[0-9]{2}):(?P<minute>[0-9]{2}):(?P<second>[0-9]{2})"
_DATES = tuple(
    re.compile(pattern, re.IGNORECASE | re.ASCII)
    for pattern in (
        rf"[a-z]{{3}}, (?P<day>[0-9]{{2}}) {_MONTH} (?P<year>[0-9]{{4}}) {_TIME} GMT\Z",  # IMF-fixdate
        rf"[a-z]{{6,9}}, (?P<day>[0-9]{{2}})-{_MONTH}-(?P<year>[0-9]{{2}}) {_TIME} GMT\Z",  # RFC 850
        rf"[a-z]{{3}} {_MONTH} (?P<day>[0-9 ][0-9]) {_TIME} (?P<year>[0-9]{{4}})\Z",  # asctime
    )
)
_LAST_DATE = 253402300799  # the end of the year 9999


def http_date(timestamp: int) -> str:
    """A time as an IMF-fixdate; a time outside the years 1970 to 9999 is clamped.

    :param timestamp: seconds since the epoch.

    >>> http_date(784111777)
    'Sun, 06 Nov 1994 08:49:37 GMT'
    """
    return formatdate(min(max(timestamp, 0), _LAST_DATE), usegmt=True)


def parse_http_date(value: str | None, now: float | None = None) -> int | None:
    """A date in any of HTTP's three formats, in seconds since the epoch; None: it is not a valid date.

    :param now: the time that a two-digit year is relative to; None: the current time. A year more than 50 years in
        the future is taken for one in the past (RFC 9110 section 5.6.7).

    >>> parse_http_date("Sunday, 06-Nov-94 08:49:37 GMT"), parse_http_date("yesterday")
    (784111777, None)
    """
    if value is None:
        return None
    match = next((match for date in _DATES if (match := date.match(value.strip(" \t")))), None)
    return None if match is None else _timestamp(match, now)


def _timestamp(match: re.Match[str], now: float | None) -> int | None:
    year, day, hour, minute, second = (int(match[name]) for name in ("year", "day", "hour", "minute", "second"))
    month = _MONTHS.index(match["month"].lower()) + 1
    if len(match["year"]) == 2:
        year = _full_year(year, time.time() if now is None else now)
    if second > 60:  # 60 is a leap second
        return None
    try:
        return int(datetime(year, month, day, hour, minute, tzinfo=UTC).timestamp()) + second
    except ValueError:
        return None


def _full_year(two_digits: int, now: float) -> int:
    latest = time.gmtime(now).tm_year + 50
    return latest - (latest - two_digits) % 100
