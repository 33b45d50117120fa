"""The notes of a walk through a program: contractions, other uses and why they are none, and biases.

This file owns the notes, and the reasons in words. Who takes them is `walk`, who draws conclusions is `reading`.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Hashable

import numpy as np

from wn_jax._program.jaxpr import Site
from wn_jax._program.views import Contraction, View
from wn_jax._types import Shape


class Reason(enum.StrEnum):
    """Why a leaf is left alone."""

    UNUSED = "unused"
    ELEMENTWISE = "elementwise"
    INDEXED = "indexed"
    PENALTY = "penalty"
    NO_DATA = "no data"
    DISAGREE = "disagree"
    CARRIED = "carried"
    BRANCH = "branch"
    RESHAPED = "reshaped"
    SLICED = "sliced"
    RETURNED = "returned"
    OPAQUE = "opaque"
    DTYPE = "dtype"

    @property
    def explanation(self) -> str:
        """The reason as a sentence."""
        return _EXPLANATIONS[self]


_EXPLANATIONS = {
    Reason.UNUSED: "the program does not use it",
    Reason.ELEMENTWISE: "it is added to or multiplied with other values, not contracted (a bias, a gain, a positional "
    "embedding)",
    Reason.INDEXED: "its rows are looked up, as in an embedding",
    Reason.PENALTY: "it is squared or summed on its own, as by an L2 penalty (pass the model, not the loss) or a "
    "normalization of weights",
    Reason.NO_DATA: "it is contracted with a parameter or a constant, and no data flows in (data must come in by the "
    "arguments)",
    Reason.DISAGREE: "its uses sum over different axes",
    Reason.CARRIED: "it changes from one trip of a loop to the next",
    Reason.BRANCH: "the branches of a cond return it in different ways",
    Reason.RESHAPED: "a reshape, a slice or a broadcast mixes its axes before the contraction",
    Reason.SLICED: "a contraction sums over a part of an axis only, or over several parameters concatenated",
    Reason.RETURNED: "the function returns it, and does not contract it",
    Reason.OPAQUE: "it goes into an operation that is not understood",
    Reason.DTYPE: "it is not a real floating-point array",
}


@dataclasses.dataclass(frozen=True)
class Around:
    """The loops, branches and rules around an equation."""

    trips: float = 1
    """How often the loops run it; infinity where a `while_loop` does."""
    loops: int = 0
    """How many loops stand around it, one in the other."""
    branch: bool = False
    """Whether a `cond` or `switch` may leave it out."""
    custom_rule: bool = False
    """Whether it is the body of a function with a derivative rule of its own."""


@dataclasses.dataclass(frozen=True)
class Use:
    """A contraction of a parameter with data. Axes are counted from 0."""

    site: Site
    """Where the contraction stands."""
    how: str
    """Its primitive's name, for a person to read."""
    view: View
    """The parameter, as the contraction meets it."""
    contraction: Contraction
    """The part that each dimension of that view takes in it."""
    output: Shape
    """The output's shape."""
    dtype: np.dtype
    """The output's dtype."""
    operand_dtype: np.dtype
    """The dtype in which the contraction takes the parameter."""
    around: Around
    """The loops and branches around it."""

    @property
    def reduction(self) -> frozenset[int]:
        """The parameter's axes that are summed over."""
        return self.view.axes(self.contraction.contracted)

    @property
    def feature(self) -> frozenset[int]:
        """The parameter's axes that are axes of the output."""
        return self.view.axes([dim for dim, _ in self.contraction.kept])

    @property
    def output_size(self) -> float:
        """How many numbers the program computes there."""
        return math.prod(self.output) * self.around.trips

    @property
    def problem(self) -> Reason | None:
        """Why these reduction axes are not those of a norm, if they are not."""
        if self.view.broadcasts(self.contraction.contracted):
            return Reason.RESHAPED
        if not self.reduction:
            return Reason.ELEMENTWISE
        return Reason.SLICED if self.reduction & self.view.partial else None


@dataclasses.dataclass(frozen=True)
class Problem:
    """A use that is no contraction with data."""

    reason: Reason
    """Why it is none."""
    by: str
    """The operation that does it, or the dtype that is none of a weight, for a person to read."""


@dataclasses.dataclass(frozen=True)
class Bias:
    """A parameter that is added to the output of a contraction."""

    site: Site
    """Where the addition stands."""
    operand: int
    """Which operand of the addition it is."""
    view: View
    """The parameter, as the addition meets it."""
    output: View
    """The contraction's output, as the addition meets it."""


@dataclasses.dataclass
class Notes:
    """All that a walk found."""

    uses: dict[Hashable, list[Use | Problem]] = dataclasses.field(default_factory=dict)
    """By parameter, in the order of the program."""
    returned: set[Hashable] = dataclasses.field(default_factory=set)
    """The parameters that the program returns as they are."""
    biases: dict[Hashable, Bias] = dataclasses.field(default_factory=dict)
    """By the site of the contraction."""
