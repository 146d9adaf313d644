# SPDX-License-Identifier: LGPL-2.1-or-later
"""Contents that say what they are: each has a number, and its size and every line of it follow from key and number.

So a reader knows by the size alone which content it was sent, and any mixed, short or damaged body is recognised.
"""

from __future__ import annotations

import random

LINE = 1024  # bytes
SMALL, MIDDLE, LARGE = (256, 1), (100_000, 16), (8 * 1024**2, 64)  # bytes: of a kind of contents, and per number
NUMBERS = 16_384  # of one history: below that, the kinds' sizes do not overlap
SMALLEST = SMALL[0]  # bytes


def size_of(number: int, large_share: float = 0.0) -> int:
    """How many bytes a content has; no other one has as many.

    :param large_share: which part of the contents is larger than Azure's limit for one request.
    """
    kind = random.Random(number).random()
    base, step = LARGE if kind < large_share else MIDDLE if kind > 0.8 else SMALL
    return base + step * number


def number_of(size: int) -> int:
    """The number of the content of this size; the reverse of :func:`size_of`. It may be one that was never made.

    >>> all(number_of(size_of(number, 0.1)) == number for number in range(NUMBERS))
    True
    """
    base, step = max((kind for kind in (SMALL, MIDDLE, LARGE) if kind[0] <= size), default=SMALL)
    return (size - base) // step


def content_of(key: str, number: int, size: int) -> bytes:
    """A content; ``size`` is one that :func:`size_of` gives for the number.

    >>> content_of("k", 7, 263)[:12]
    b'k 7 0 ......'
    """
    lines = (f"{key} {number} {line} ".ljust(LINE, ".") for line in range(-(-size // LINE)))
    return "".join(lines).encode()[:size]
