"""A node that is told its norm, to see what it would bring to carry norms from each update to the next step.

It shows what the node protocol is for, too: `wn_jax.wrap` runs it as it runs its own.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

import wn_jax as wn
from experiments.bench.libraries.jax_steps import sgd


@functools.partial(jax.tree_util.register_dataclass, data_fields=("g", "v", "length"), meta_fields=("axes", "measured"))
@dataclasses.dataclass(frozen=True, eq=False)
class Carried:
    """A weight norm that is told `||v||`."""

    g: jax.Array
    """The magnitude of each vector."""

    v: jax.Array
    """The directions."""

    length: jax.Array
    """The norm `||v||` of each vector."""

    axes: tuple[int, ...]
    """The reduction axes."""

    measured: bool
    """Whether an update measures `length` again. If not, it stays what it was at first: wrong, but free."""

    @classmethod
    def of(cls, node: wn.WeightNorm, measured: bool) -> Carried:
        """The node with its norm."""
        return cls(node.g, node.v, jnp.linalg.norm(node.v, axis=node.axes, keepdims=True), node.axes, measured)

    def weight(self) -> jax.Array:
        """`g * v / ||v||`."""
        return self.v * _scale(self.g, self.v, self.length, self.axes)

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """`v`, and `g / ||v||`."""
        return self.v, _scale(self.g, self.v, self.length, self.axes)


def update(params: Any, gradient: Any) -> Any:
    """A step of gradient descent, in which the norms are measured that the next step takes."""

    def measure(node: Any) -> Any:
        if not (isinstance(node, Carried) and node.measured):
            return node
        squares = jnp.sum(jnp.square(node.v), node.axes, keepdims=True)
        return dataclasses.replace(node, length=jnp.sqrt(squares))

    return jax.tree.map(measure, sgd(params, gradient), is_leaf=lambda x: isinstance(x, Carried))


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _scale(g: jax.Array, _v: jax.Array, length: jax.Array, _axes: tuple[int, ...]) -> jax.Array:
    """`g / ||v||`. Its value needs the told norm alone; `_v` and `_axes` are there for its derivative."""
    return g / length


@_scale.defjvp
def _scale_jvp(axes: tuple[int, ...], primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # The norm is a function of v, though it is given: its derivative is that of ||v||, and its own tangent is left out.
    (g, v, length), (dg, dv, _) = primals, tangents
    scale = g / length
    along = jnp.sum(v * (1 / length) * dv, axes, keepdims=True)
    return scale, dg / length - scale * (along / length)
