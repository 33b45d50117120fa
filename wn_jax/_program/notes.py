"""The notes of a walk through a program: contractions, other uses and why they are none, and biases.

This file owns the notes, and the reasons in words. Who takes them is `walk`, who draws conclusions is `reading`.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Hashable

import numpy as np

from wn_jax._program.contractions import Contraction
from wn_jax._program.jaxpr import Site
from wn_jax._program.views import View
from wn_jax._types import Shape


class Reason(enum.StrEnum):
    """Why a leaf is left alone."""

    UNUSED = "unused"
    FROZEN = "frozen"
    ELEMENTWISE = "elementwise"
    INDEXED = "indexed"
    PENALTY = "penalty"
    NO_DATA = "no data"
    CLOSED_OVER = "closed over"
    DISAGREE = "disagree"
    CARRIED = "carried"
    BRANCH = "branch"
    RESHAPED = "reshaped"
    SLICED = "sliced"
    RETURNED = "returned"
    OPAQUE = "opaque"
    DTYPE = "dtype"
    PRODUCT = "product"
    DIFFERENTIATED = "differentiated"

    @property
    def explanation(self) -> str:
        """The reason as a sentence."""
        return _EXPLANATIONS[self]


_EXPLANATIONS = {
    Reason.UNUSED: "the program does not use it",
    Reason.FROZEN: "it is not trained: under stop_gradient at every use, in a Variable that is no nnx.Param, or in a "
    "collection beside params",
    Reason.ELEMENTWISE: "it is added to or multiplied with other values, not contracted (a bias, a gain, a positional "
    "embedding)",
    Reason.INDEXED: "its rows are looked up, as in an embedding",
    Reason.PENALTY: "it is squared or summed on its own, as by an L2 penalty (pass the model, not the loss) or a "
    "normalization of weights",
    Reason.NO_DATA: "it is contracted with a learned vector or a constant, and the product is returned, or meets "
    "data as a weight itself (data must come in by the arguments)",
    Reason.PRODUCT: "it is contracted with another parameter, and data meets only their product (an einsum of several "
    "weights contracts what is cheapest first, which depends on the sizes; contract one weight after the other)",
    Reason.CLOSED_OVER: "it is contracted with an array that the function closes over, which may be data or a constant "
    "of the model (pass data as an argument; beside a constant, give the axes by hand)",
    Reason.DISAGREE: "its uses sum over different axes",
    Reason.CARRIED: "it changes from one trip of a loop to the next",
    Reason.BRANCH: "the branches of a cond return it in different ways",
    Reason.RESHAPED: "a reshape, a slice or a broadcast mixes its axes before the contraction, or splits one of which "
    "the contraction sums over a part",
    Reason.SLICED: "a contraction sums over a part of an axis only, or over several parameters concatenated",
    Reason.RETURNED: "the function returns it, and does not contract it",
    Reason.OPAQUE: "it goes into an operation that is not understood",
    Reason.DTYPE: "it is not a real floating-point array, or is converted to another kind of number",
    Reason.DIFFERENTIATED: "the program differentiates inside (forces, scores, residuals), and the gradient sums over "
    "the other axes: pass the function that it differentiates, whose axes are right for the whole, too",
}


@dataclasses.dataclass(frozen=True)
class Around:
    """The loops, branches and rules around an equation."""

    trips: float = 1
    """How often the loops run it; infinity where a `while_loop` does."""
    loops: tuple[Site, ...] = ()
    """The loops around it, the outermost first."""
    branch: bool = False
    """Whether a `cond` or `switch` may leave it out."""
    custom_rule: bool = False
    """Whether it is the body of a function with a derivative rule of its own."""
    backward: bool = False
    """Whether it computes a gradient."""


class Met(enum.Enum):
    """The other operand of a parameter's contraction."""

    DATA = enum.auto()
    CONSTANT = enum.auto()
    """What the program computes without data: a state of zeros, a grid of positions, and what comes of them."""
    CLOSED_OVER = enum.auto()
    """An array that the function closes over, beside data in its arguments. It may be a matrix that mixes weights."""
    REPEATED = enum.auto()
    """A learned vector that is repeated over a batch, as a query of attention."""
    ELSEWHERE = enum.auto()
    """What holds no data, where data meets the product otherwise than in a sum: the product may be a weight itself."""
    PARAMETER = enum.auto()
    """Another parameter. Either of them could be the weight, so that nothing is said of their axes."""


@dataclasses.dataclass(frozen=True)
class Use:
    """A contraction of a parameter. Axes are counted from 0."""

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
    met: Met = Met.DATA
    """The kind of the other operand."""

    def is_at(self, other: Use) -> bool:
        """Whether both are of the same part of a parameter at the same place."""
        return (self.site, self.view, self.contraction) == (other.site, other.view, other.contraction)

    @property
    def tells(self) -> bool:
        """Whether it tells the axes of a weight."""
        return self.met not in (Met.CLOSED_OVER, Met.ELSEWHERE, Met.PARAMETER)

    @property
    def why_not(self) -> Reason:
        """The reason that it is for a parameter to be left alone, where it does not tell."""
        known = {Met.CLOSED_OVER: Reason.CLOSED_OVER, Met.PARAMETER: Reason.PRODUCT}
        return known.get(self.met, Reason.NO_DATA)

    @property
    def reduction(self) -> frozenset[int]:
        """The parameter's axes that are summed over."""
        return self.view.axes(self.contraction.contracted)

    @property
    def feature(self) -> frozenset[int]:
        """The parameter's axes that are axes of the output."""
        return self.view.axes([dim for dim, _ in self.contraction.kept])

    @property
    def summed(self) -> frozenset[int]:
        """The same, and the axis of the groups in a `ragged_dot`: those that the output has no dimension for."""
        kept = {dim for dim, _ in self.contraction.kept}
        return self.view.axes([dim for dim in range(len(self.view.dims)) if dim not in kept])

    @property
    def output_size(self) -> float:
        """How many numbers the program computes there."""
        return math.prod(self.output) * self.around.trips

    @property
    def problem(self) -> Reason | None:
        """Why these reduction axes are not those of a norm, if they are not."""
        contracted = self.contraction.contracted
        if self.view.broadcasts(contracted):
            return Reason.RESHAPED
        if not self.reduction:
            return Reason.ELEMENTWISE
        others = self.view.axes([dim for dim in range(len(self.view.dims)) if dim not in contracted])
        if self.reduction & (others | self.view.sliced_axes):
            return Reason.RESHAPED  # a part of an axis is summed over, and the other part is not
        beside_others = any(self.view.dims[dim].is_beside_others for dim in contracted)
        return Reason.SLICED if beside_others or self.reduction & self.view.partial else None


@dataclasses.dataclass(frozen=True)
class Problem:
    """A use that is no contraction with data."""

    reason: Reason
    """Why it is none."""
    by: str
    """The operation that does it, or the dtype that is none of a weight, for a person to read."""


@dataclasses.dataclass(frozen=True)
class Bias:
    """A parameter that is added to the output of a contraction, or subtracted from it."""

    site: Site
    """Where the addition stands."""
    operand: int
    """Which operand of the addition it is."""
    subtracted: bool
    """Whether it is a difference of the two: in either order, the bias that makes it 0 has the output's own sign."""
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
    biases: dict[Hashable, list[Bias]] = dataclasses.field(default_factory=dict)
    """By the site of the contraction, in the order of the program."""
    masks: set[Site] = dataclasses.field(default_factory=set)
    """The equations that mask a parameter."""
