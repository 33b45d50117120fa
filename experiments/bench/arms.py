"""An arm: one library's network in one parametrization, ready to be run and timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable


class CannotError(Exception):
    """A library has no weight normalization for such a network; the message says why."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is timed.

    `run` makes that many steps, each from what the one before left, and returns when all is done. `compile` does again
    what happens before a first step, and returns the seconds; None where there is nothing to compile. `peak_memory` is
    the compiler's count of bytes, where there is one. `deviation` is how far the output is from that in float64,
    over the largest of the latter. `against` is the arm that it is compared with, and `of_torch` says whose threads it
    uses.
    """

    name: str
    against: str
    run: Callable[[int], None]
    compile: Callable[[], float] | None
    peak_memory: int | None
    deviation: float
    of_torch: bool = False
