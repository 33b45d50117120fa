"""An arm: one library's network in one parametrization, ready to be run and timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable


class CannotError(Exception):
    """A library has no weight normalization for such a network; the message says why."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """A network that is timed."""

    name: str
    """The name of the arm."""

    against: str
    """The name of the arm that it is compared with: its library's plain model."""

    run: Callable[[int], None]
    """Makes so many steps, each from what the one before left, and returns when all is done."""

    compile: Callable[[], float] | None
    """Does again what happens before a first step, and returns the seconds; None where there is nothing to compile."""

    peak_memory: int | None
    """The compiler's count of bytes, where there is one."""

    deviation: float
    """The largest difference of the output from that in float64, over the largest of the latter."""

    of_torch: bool = False
    """Whether it runs on PyTorch's threads."""
