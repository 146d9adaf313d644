# SPDX-License-Identifier: LGPL-2.1-or-later
"""System calls that Python has no name for."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any


def _system_call(name: str, *types: Any) -> Callable[..., int] | None:
    """A function of the C library; None: this system has none of that name."""
    function = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        function.argtypes = types
    return function


sync_file_range = _system_call("sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
SYNC_FILE_RANGE_WRITE = 2  # sync_file_range(2): start writing the dirty pages
fallocate = _system_call("fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
FALLOC_FL_KEEP_SIZE = 1  # fallocate(2): do not change the file's length
