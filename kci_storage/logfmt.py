"""logfmt: ``key=value`` pairs, one line per event, safe against whatever a client sends."""

from __future__ import annotations

import functools
import re
import time

_PLAIN = re.compile(r"[!#-<>-\[\]-~]+")  # what needs no quotes: printable ASCII without space, quote, = and backslash
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
LONGEST_VALUE = 2_048  # characters; what a client sends cannot fill the disk with one line


def value(raw: object, longest: int = LONGEST_VALUE) -> str:
    r"""One logfmt value: quoted where it has to be, and always one line.

    :param longest: characters; what is beyond them is cut off.

    >>> value("curl/8.5"), value('a "b"'), value("x\ny"), value("")
    ('curl/8.5', '"a \\"b\\""', '"x\\u000ay"', '""')
    """
    if type(raw) is int:
        return str(raw)
    text = str(raw)[:longest]
    if _PLAIN.fullmatch(text):
        return text
    text = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{_CONTROL.sub(_escape, text)}"'


def _escape(match: re.Match[str]) -> str:
    return f"\\u{ord(match.group()):04x}"


def line(**fields: object) -> str:
    """A line of pairs; a field that is None is left out.

    >>> logfmt(event="access", status=200, user=None)
    'event=access status=200'
    """
    return " ".join(f"{name}={value(raw)}" for name, raw in fields.items() if raw is not None)


def timestamp(seconds: float) -> str:
    """RFC 3339, UTC, to the millisecond.

    >>> timestamp(0.5)
    '1970-01-01T00:00:00.500Z'
    """
    return f"{_second(int(seconds))}.{int(seconds % 1 * 1000):03d}Z"


@functools.lru_cache(maxsize=8)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
