# SPDX-License-Identifier: LGPL-2.1-or-later
"""Content negotiation (RFC 9110, section 12.5.1): which media type a client prefers."""

from __future__ import annotations

import re
from collections.abc import Sequence

_WEIGHT = re.compile(r"(?:0(?:\.[0-9]*)?|1(?:\.0*)?)\Z")


def quality(accept: str, media_type: str) -> float:
    """The quality of a media type in an ``Accept`` header, 0 to 1, by its most specific member (section 12.5.1).

    >>> quality("text/*;q=0.5, */*;q=0.1", "text/plain"), quality("text/html", "text/plain")
    (0.5, 0.0)
    """
    weights: dict[str, float] = {}
    for member in accept.split(","):
        media_range, *parameters = (part.strip(" \t").lower() for part in member.split(";"))
        weights[media_range] = max(_weight(parameters), weights.get(media_range, 0.0))
    for media_range in (media_type, f"{media_type.partition('/')[0]}/*", "*/*"):
        if media_range in weights:
            return weights[media_range]
    return 0.0


def _weight(parameters: list[str]) -> float:
    value = next((text[2:] for text in parameters if text.startswith("q=")), "1")
    return float(value) if _WEIGHT.match(value) else 0.0


def preferred(accept: str | None, offers: Sequence[str]) -> str:
    """The offered media type that a client prefers; of several with the same quality, the first one.

    :param accept: the value of ``Accept``; None and ``*/*`` mean no preference.

    >>> preferred("text/html, */*;q=0.8", ["text/plain", "text/html"])
    'text/html'
    """
    return max(offers, key=lambda offer: quality(accept, offer)) if accept else offers[0]


def prefers_json(accept: str | None, over: str = "text/plain") -> bool:
    """Whether a client prefers JSON to the default.

    :param accept: the value of ``Accept``; None and ``*/*`` mean no preference.
    :param over: the default's media type.

    >>> prefers_json("application/json"), prefers_json("*/*")
    (True, False)
    """
    if not accept:
        return False
    json = max(quality(accept, "application/json"), quality(accept, "application/problem+json"))
    return json > quality(accept, over)
