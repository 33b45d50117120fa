"""How soon the training loss comes down to given values."""

from __future__ import annotations

import dataclasses

import numpy as np

from experiments.report import spread
from experiments.report.runs import Curve, Run


@dataclasses.dataclass(frozen=True)
class Target:
    """How soon the training loss came down to a value."""

    loss: float
    """The value."""

    reached: int
    """The number of seeds in which it did, of those that stayed finite."""

    steps: float | None
    """The mean steps of these seeds."""

    steps_se: float | None
    """The standard error of `steps`."""

    ratio: float | None
    """The mean over seeds of the steps over those of the run's first arm, where all seeds of both reached it."""

    ratio_se: float | None
    """The standard error of `ratio`."""


def reached(curve: Curve, run: Run, loss: float) -> Target:
    """How soon a curve of the run reached this loss."""
    own = _steps(curve, loss)
    known = own[np.isfinite(own)]
    ratios = own / _steps(run.curves[0], loss) if _is_comparable(curve, run) else np.empty(0)
    return Target(
        loss=loss,
        reached=len(known),
        steps=spread.mean(known),
        steps_se=spread.standard_error(known),
        ratio=spread.mean(ratios),
        ratio_se=spread.standard_error(ratios),
    )


def _steps(curve: Curve, loss: float) -> np.ndarray:
    """For each seed the step of the first record at which its loss was that low; NaN where it never was."""
    losses = curve.metrics["train_loss"]
    below = (losses.values <= loss) & curve.stayed_finite
    return np.where(below.any(axis=0), losses.steps[below.argmax(axis=0)], np.nan)


def _is_comparable(curve: Curve, run: Run) -> bool:
    """Whether the run's first arm is another one with one learning rate, and as many seeds."""
    first = run.curves[0]
    rates = sum(other.arm == first.arm for other in run.curves)
    return curve.arm != first.arm and rates == 1 and len(curve.nonfinite) == len(first.nonfinite)
