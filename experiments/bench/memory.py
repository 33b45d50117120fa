"""Keeping the C library from giving memory back to the system after each step."""

from __future__ import annotations

import ctypes
import sys

_MMAP_MAX, _TRIM_THRESHOLD, _ARENA_MAX = -4, -1, -8  # of glibc's malloc.h


def keep() -> bool:
    """Tell the C library (glibc) to keep freed memory, and return whether it does. Call it before anything is computed.

    By default it returns the temporary buffers of a step to the system, and the page faults of getting them again cost
    more than what is measured here.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    options = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1))  # -1: never
    return mallopt is not None and all(mallopt(option, value) for option, value in options)
