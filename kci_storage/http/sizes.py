# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sizes in a readable form. Pure."""

from __future__ import annotations

_UNITS = ("KiB", "MiB", "GiB", "TiB")


def readable_size(size: int) -> str:
    """A size with a binary unit.

    :param size: bytes.

    >>> readable_size(999), readable_size(1536), readable_size(5 * 2**30)
    ('999 B', '1.5 KiB', '5.0 GiB')
    """
    if size < 1024:
        return f"{size} B"
    amount, unit = size / 1024, 0
    while amount >= 1024 and unit < len(_UNITS) - 1:
        amount, unit = amount / 1024, unit + 1
    return f"{amount:.1f} {_UNITS[unit]}"
