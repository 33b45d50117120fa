"""Ctrl-C, taken between records, or rounds.

A KeyboardInterrupt in the middle of a compilation can crash the process, and one inside a callback of JAX's is lost.
So the first Ctrl-C only raises a flag, which `check` turns into a KeyboardInterrupt where it is safe; the second ends
the process at once.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

EXIT_CODE = 130  # the shell's for an interrupted program

_requested = False


def install() -> None:
    """Handle Ctrl-C from now on."""
    signal.signal(signal.SIGINT, _on_interrupt)


def at_once() -> None:
    """Handle Ctrl-C as Python does, for what may be stopped anywhere."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def check() -> None:
    """Raise KeyboardInterrupt if Ctrl-C was pressed."""
    if _requested:
        raise KeyboardInterrupt


def _on_interrupt(_signal: int, _frame: FrameType | None) -> None:
    global _requested
    if _requested:
        os._exit(EXIT_CODE)
    _requested = True
    print("\nstopping soon; press Ctrl-C again to quit at once", file=sys.stderr)
