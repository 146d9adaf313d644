# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ages such as ``30d`` and ``6m``, and the names and values of tags, as the configuration writes them."""

from __future__ import annotations

import math
import re

OWNER = "owner"  # the tag with the user that has uploaded an object
MAX_VALUE_LENGTH = 256  # characters; Azure's limit
_DAYS = {"d": 1.0, "m": 365 / 12, "y": 365.0}
_AGE = re.compile(r"([1-9][0-9]{0,3})([dmy])")
_REFUSED = re.compile(r"[^A-Za-z0-9 +\-./:=_]")  # Azure refuses these in names and values of blob index tags


def days_of(age: str) -> int:
    """The number of days of an age such as ``30d``, ``6m`` or ``2y``, rounded up.

    :raises ValueError: it is not an age.

    >>> days_of("30d"), days_of("6m"), days_of("12m"), days_of("2y")
    (30, 183, 365, 730)
    """
    match = _AGE.fullmatch(age)
    if match is None:
        raise ValueError(f"not an age: {age}")
    return math.ceil(int(match[1]) * _DAYS[match[2]])


def is_age(text: str) -> bool:
    """Whether a text is an age.

    >>> is_age("6m"), is_age("6 months")
    (True, False)
    """
    return _AGE.fullmatch(text) is not None


def tag_value(text: str) -> str:
    """A text as a valid value of a tag: other characters are replaced, and it is cut at Azure's limit.

    >>> tag_value("user@example.com")
    'user_example.com'
    """
    return _REFUSED.sub("_", text)[:MAX_VALUE_LENGTH]


def is_tag_key(text: str) -> bool:
    """Whether a text is a valid name of a tag.

    >>> is_tag_key("retention"), is_tag_key("a@b")
    (True, False)
    """
    return 0 < len(text) <= 128 and _REFUSED.search(text) is None
