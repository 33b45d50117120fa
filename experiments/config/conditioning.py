"""The `[conditioning]` table of a config."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field, PositiveFloat

from experiments.schema import Count, CountOrZero, Table, sequence, shortened

Matrix = Literal["hessian", "fisher", "empirical_fisher", "gradient_covariance"]
_Some = Field(min_length=1)
_Sequence = pydantic.BeforeValidator(sequence)


class ConditioningConfig(Table):
    """The measurements of `python -m experiments conditioning`.

    The path is that of the weights of one arm while it trains. At places on it, the loss is looked at in several
    parametrizations of the same function.
    """

    steps: Annotated[tuple[CountOrZero, ...], _Some, _Sequence]
    """The places: after how many steps of training."""

    path: str = "plain"
    """The arm whose weights are the path."""

    learning_rate: PositiveFloat | None = None
    """The learning rate at which this arm is trained. Default: its first."""

    seeds: Count | None = None
    """Of how many seeds. Default: as many as are trained."""

    examples: Count = 500
    """On how many examples the loss is looked at: the first ones of the training data."""

    norms: Annotated[tuple[PositiveFloat, ...], _Some, _Sequence] = (0.3, 1.0, 3.0)
    """The norms of weight norm, which is looked at with each of them, and also with `v = w`.

    All vectors of a layer have one `‖v‖`: this many times the root mean square of their `‖w‖`.
    """

    matrices: Annotated[tuple[Matrix, ...], _Some, _Sequence] = ("hessian", "fisher", "empirical_fisher")
    """The matrices whose eigenvalues are measured."""

    lanczos_steps: Count = 60
    """For how many steps of Lanczos a random vector is followed.

    A matrix of no more rows than these is diagonalized as a whole.
    """

    probes: Count = 2
    """How many random vectors are followed."""

    damping: PositiveFloat = 0.1
    """The damping of the natural gradient, in units of the mean eigenvalue of the Fisher matrix."""

    @pydantic.field_validator("steps", "norms", "matrices")
    @classmethod
    def _differ(cls, values: tuple[object, ...]) -> tuple[object, ...]:
        if len(set(values)) < len(values):
            raise ValueError(f"{shortened(str(list(values)))} names one of them twice")
        return values
