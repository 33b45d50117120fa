"""Running a program on weights that are not multiplied out.

`x @ (v * s)` is `(x @ v) * s`: a matmul or convolution takes `v` and scales its output. Operations that only move
numbers hand a `Factored` on, calls and loops take it in; before any other operation it becomes the weight. So a run is
right by construction, and fast where it is understood. Which weights are `Factored` is the caller's choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from wn_jax._program import jaxpr
from wn_jax._program.contractions import Contraction, contractions
from wn_jax._program.factored import Factored, Operand, can_hold_directions, weight
from wn_jax._program.jaxpr import Body, Equation, Scan, Site
from wn_jax._program.moves import moved
from wn_jax._program.products import masked, scaled
from wn_jax._tree import is_traced
from wn_jax._types import PyTree


class Runner:
    """Runs programs some of whose inputs are `Factored`. Some of the results may be, too."""

    def __init__(self, masks: frozenset[Site] = frozenset()) -> None:
        self.masks = masks
        """The equations that are known to mask a weight."""
        self.found: dict[Site, PyTree] = {}
        """Findings of a run at equations, which the scans around stack: for runs that build on this one."""

    def run(self, body: Body, values: Sequence[Operand], site: Site = ()) -> list[Operand]:
        """The results of a program."""
        return jaxpr.interpret(body, values, self.step, site)

    def step(self, eqn: Equation, values: list[Operand], site: Site) -> Sequence[Operand]:
        """The results of one equation."""
        if not any(isinstance(value, Factored) for value in values):
            return jaxpr.bind(eqn, cast("list[ArrayLike]", values))
        contracted = self.contracted(eqn, values, site)
        if contracted is not None:
            return [contracted]
        results = moved(eqn, values)
        if results is not None:
            return results
        result = self.scaled(eqn, values) or (masked(eqn, values) if site in self.masks else None)
        if result is not None:
            return [result]
        inside = self.entered(eqn, values, site)
        return self.rebuilt(eqn, values, site) if inside is None else inside

    def rebuilt(self, eqn: Equation, values: list[Operand], _site: Site) -> Sequence[Operand]:
        """The results of an equation that needs the weights themselves."""
        return jaxpr.bind(eqn, [weight(value) for value in values])

    def contracted(self, eqn: Equation, values: list[Operand], site: Site) -> jax.Array | None:
        """The output of a contraction of a `Factored` operand, or `None`."""
        for contraction in contractions(eqn):
            factored = values[contraction.operand]
            if isinstance(factored, Factored):
                result = self.contract(eqn, values, factored, contraction, site)
                if result is not None:
                    return result
        return None

    def contract(
        self, eqn: Equation, values: list[Operand], factored: Factored, contraction: Contraction, _site: Site
    ) -> jax.Array | None:
        """The contraction of `v`, times the scale; `None` where that would not be the contraction of the weight."""
        out = jaxpr.outputs(eqn)[0]
        if factored.rebuilt or not can_scale_output(factored, contraction):
            return None
        if eqn.params.get("out_sharding") is not None:
            return None  # a sharding that was asked for may split what the scale of the output cannot follow
        if not can_hold_directions(factored.v.dtype, factored.dtype, out.dtype):
            return None
        output = jaxpr.bind(eqn, with_v(values, factored, contraction))[0]
        scale = scale_of_output(factored, contraction, output.ndim)
        wide = output.astype(jnp.promote_types(scale.dtype, output.dtype))  # so that the product is rounded once
        return (_times(wide, scale) if output.size == scale.size else wide * scale).astype(output.dtype)

    def scaled(self, eqn: Equation, values: list[Operand]) -> Factored | None:
        """A `Factored` times a scalar, or `None`."""
        return scaled(eqn, values)

    def entered(self, eqn: Equation, values: list[Operand], site: Site) -> Sequence[Operand] | None:
        """The results of a call, a loop or a branch with this runner at work inside; `None` to leave it as it is.

        A `jit` is run through; a `remat` and a `scan` and a `cond` stay what they are. Custom derivative rules are of
        the weight, and a `while_loop`, too, gets the weight. Outside of any transformation all of them do: there the
        equation as it is was compiled before, and a rewritten one would be compiled in each call.
        """
        if not is_traced(values):
            return None
        body = jaxpr.call(eqn)
        if body is not None:
            if jaxpr.is_plain_jit(eqn):
                return self.run(body, values, site)
            again = jaxpr.again(eqn, lambda *values: self.run(body, values, site))
            return again(*values) if again else None
        scan = jaxpr.scan(eqn)
        if scan is not None:
            return self.scanned(scan, values, site)
        branches = jaxpr.branches(eqn)
        return self.switched(branches, values, site) if branches and jaxpr.is_plain_switch(eqn) else None

    def scanned(self, scan: Scan, values: list[Operand], site: Site) -> list[Operand]:
        """A `scan` whose body takes constants and slices as they are. What is rebuilt in each trip is of its slice."""
        consts, carry, xs = scan.grouped(values)
        # A constant that is to be rebuilt would be so anew in each trip: once, before the loop, is enough.
        consts = [weight(value) if isinstance(value, Factored) and value.rebuilt else value for value in consts]
        xs = [value.sliceable() if isinstance(value, Factored) else value for value in xs]

        def trip(
            carry: list[Operand], xs: list[Operand]
        ) -> tuple[list[Operand], tuple[list[Operand], dict[Site, PyTree]]]:
            # What is found in a trip holds tracers of the scan: it leaves as one of its results, stacked.
            around, self.found = self.found, {}
            results = self.run(scan.body, [*consts, *carry, *xs], site)
            inside, self.found = self.found, around
            # A carry must come out as it went in, an array.
            return [weight(value) for value in results[: scan.num_carry]], (results[scan.num_carry :], inside)

        arrays: list[Operand] = [weight(value) for value in carry]
        carry, (ys, inside) = scan.run(trip, arrays, xs)
        self.found.update(inside)
        return [*carry, *ys]

    def switched(self, branches: list[Body], values: list[Operand], site: Site) -> list[Operand]:
        """A `cond` or `switch`, whose branches give arrays."""
        index, *operands = values

        def branch(i: int) -> Callable[..., list[Operand]]:
            return lambda *operands: [weight(value) for value in self.run(branches[i], operands, (*site, i))]

        return jax.lax.switch(index, [branch(i) for i in range(len(branches))], *operands)


def can_scale_output(factored: Factored, contraction: Contraction) -> bool:
    """Whether the scale is the same along what the output has no dimension for."""
    kept = {dim for dim, _ in contraction.kept}
    return not any(varies for dim, varies in enumerate(factored.varies()) if dim not in kept)


def with_v(values: Sequence[Operand], factored: Factored, contraction: Contraction) -> list[ArrayLike]:
    """The operands of a contraction as arrays: `v` for the one that it is about, of the dtype that the weight has."""
    return [
        factored.v.astype(factored.dtype) if i == contraction.operand else weight(value)
        for i, value in enumerate(values)
    ]


def scale_of_output(factored: Factored, contraction: Contraction, ndim: int) -> jax.Array:
    """The scale, laid out as the output of the contraction is."""
    kept = sorted(contraction.kept, key=lambda pair: pair[1])
    shape = [1] * ndim
    for dim, target in kept:
        shape[target] = factored.scale.shape[dim]
    own = {dim for dim, _ in kept}
    order = [*(dim for dim in range(factored.scale.ndim) if dim not in own), *(dim for dim, _ in kept)]
    return factored.scale.transpose(order).reshape(shape)


def scale_of_operand(scale: jax.Array, contraction: Contraction, ndim: int) -> jax.Array:
    """The reverse: a scale that is laid out as the output, laid out as the operand of rank `ndim`."""
    kept = sorted(contraction.kept)
    shape = [1] * ndim
    for dim, target in kept:
        shape[dim] = scale.shape[target]
    own = [target for _, target in kept]
    order = [*own, *(dim for dim in range(scale.ndim) if dim not in own)]
    return scale.transpose(order).reshape(shape)


@jax.custom_jvp
def _times(output: jax.Array, scale: jax.Array) -> jax.Array:
    """`output * scale`, for a batch of 1: in reverse mode, the factor of the gradient of `v` is computed once.

    That gradient is a product without a sum then, which XLA fuses into the loop that updates `v`. There it would
    compute `cotangent * scale` again for each number of `v`. A division it does not repeat, so one by 1 comes last.
    """
    return output * scale


@_times.defjvp
def _times_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (output, scale), (doutput, dscale) = primals, tangents
    one = jax.lax.stop_gradient(jnp.where(jnp.isnan(scale), scale, 1))  # 1, but no constant, which XLA would drop
    return output * scale, doutput * scale / one + output * dscale
