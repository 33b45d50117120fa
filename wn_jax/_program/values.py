"""Values: all that the walk knows of a variable of the program that it follows."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

import jax.core
import jax.numpy as jnp

from wn_jax._program import facts
from wn_jax._program.facts import Counter, Fact
from wn_jax._program.jaxpr import Site
from wn_jax._program.notes import Use
from wn_jax._program.views import View


@dataclasses.dataclass(frozen=True)
class Value:
    """All that the walk knows of a variable."""

    data: bool = False
    """Whether data flows into it."""
    closed_over: bool = False
    """Whether an array that the program closes over does."""
    parameter: bool = False
    """Whether a parameter that is trained does."""
    views: tuple[View, ...] = ()
    """The views of parameters that it is; several where parameters were concatenated."""
    outputs: tuple[View, ...] = ()
    """The outputs of contractions that it is views of. The site of the contraction is the view's source."""
    pending: frozenset[tuple[Hashable, Use]] = frozenset()
    """The products of parameters with constants that it is made of, without data, each with its parameter."""
    fact: Fact = None
    """What is known of its numbers."""
    repeats: frozenset[int] = frozenset()
    """The dimensions along which it repeats itself."""

    @classmethod
    def of_parameter(cls, name: Hashable, aval: jax.core.ShapedArray, trained: bool) -> Value:
        """A parameter. Others than of floating-point numbers are never trained: masks, counts, keys."""
        trained = trained and jnp.issubdtype(aval.dtype, jnp.floating)
        return cls(parameter=trained, views=(View.of(name, aval.shape),))

    @classmethod
    def joined(cls, values: Sequence[Value], fact: Fact) -> Value:
        """The result of an operation on these, as far as all results have it in common."""
        data = any(value.data for value in values)
        return cls(
            data=data,
            closed_over=any(value.closed_over for value in values),
            parameter=any(value.trains for value in values),
            pending=frozenset() if data else frozenset().union(*(value.pending for value in values)),
            fact=fact,
        )

    @property
    def trains(self) -> bool:
        """Whether a parameter is trained by what is done with the value."""
        return self.parameter and not (self.views and all(view.frozen for view in self.views))

    def without_outputs(self) -> Value:
        """The same, for a loop or a branch: what is added in there is no bias of a contraction outside."""
        return dataclasses.replace(self, outputs=())

    def sliced(self, scan: Site, length: int) -> Value:
        """The slice that a trip of a scan gets of this array, whose leading axis has that length."""
        views = tuple(view.sliced(scan) for view in self.views)
        fact = facts.of_slice(self.fact, length, scan)
        return dataclasses.replace(self, views=views, fact=fact, repeats=frozenset())

    def stacked(self, scan: Site, length: int) -> Value:
        """The array that a scan makes of those that its trips give."""
        views = tuple(view.stacked(scan, length) for view in self.views)
        return dataclasses.replace(self, views=views, outputs=(), fact=None, repeats=frozenset())

    def counting(self, counter: Counter | None) -> Value:
        """A carry as the first trip meets it: one that starts at 0 may be the counter of the loop."""
        starts_at_0 = isinstance(self.fact, int) and not isinstance(self.fact, bool) and self.fact == 0
        return dataclasses.replace(self, fact=counter if starts_at_0 else None, repeats=frozenset())

    def grown(self, after: Value) -> Value:
        """A carry, after a trip gave this."""
        counts = isinstance(self.fact, Counter) and after.fact == dataclasses.replace(self.fact, ahead=1)
        data = self.data or after.data
        return dataclasses.replace(
            self,
            data=data,
            closed_over=self.closed_over or after.closed_over,
            parameter=self.parameter or after.parameter,
            pending=frozenset() if data else self.pending | after.pending,
            fact=self.fact if counts else None,
        )
