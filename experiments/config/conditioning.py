"""The `[conditioning]` table of a config."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field, PositiveFloat

from experiments.schema import Count, CountOrZero, Table, sequence

Matrix = Literal["hessian", "fisher", "empirical_fisher", "gradient_covariance"]
_Some = Field(min_length=1)
_Sequence = pydantic.BeforeValidator(sequence)


class ConditioningConfig(Table):
    """What `python -m experiments conditioning` measures.

    The path are the weights of the arm `path`, trained at `learning_rate` (default: its first), after each of `steps`;
    of as many seeds as are trained, or `seeds`. There, on the first `examples` of the training data, the loss is looked
    at in several parametrizations of the same function; weight norm with `v = w`, and with one `‖v‖` for all vectors of
    a layer, each of `norms` times the root mean square of their `‖w‖`. Of each of the `matrices`, `probes` random
    vectors are followed for `lanczos_steps`; a matrix of no more rows than these is diagonalized as a whole. `damping`
    is that of the natural gradient, in units of the mean eigenvalue of the Fisher matrix.
    """

    steps: Annotated[tuple[CountOrZero, ...], _Some, _Sequence]
    path: str = "plain"
    learning_rate: PositiveFloat | None = None
    seeds: Count | None = None
    examples: Count = 500
    norms: Annotated[tuple[PositiveFloat, ...], _Some, _Sequence] = (0.3, 1.0, 3.0)
    matrices: Annotated[tuple[Matrix, ...], _Some, _Sequence] = ("hessian", "fisher", "empirical_fisher")
    lanczos_steps: Count = 60
    probes: Count = 2
    damping: PositiveFloat = 0.1

    @pydantic.field_validator("steps", "norms", "matrices")
    @classmethod
    def _differ(cls, values: tuple[object, ...]) -> tuple[object, ...]:
        if len(set(values)) < len(values):
            raise ValueError(f"{list(values)} names one of them twice")
        return values
