"""Running a program on weights that are not multiplied out.

`x @ (v * s)` is `(x @ v) * s`: a matmul or convolution takes `v` and scales its output. Operations that only move
numbers hand a `Factored` on, calls and loops take it in; before any other operation it becomes the weight. So a run is
right by construction, and fast where it is understood.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from wn_jax._program import jaxpr as program
from wn_jax._program.factored import Factored, moved, scaled, weight
from wn_jax._program.jaxpr import Body, Equation, Scan, Site
from wn_jax._program.views import Contraction, contractions


class Runner:
    """Runs programs some of whose inputs are `Factored`. Some of the results may be, too."""

    def __init__(self) -> None:
        self.found: dict[Site, Any] = {}
        """What a run finds at equations, as pytrees, which the scans around stack: for runs that build on this one."""

    def run(self, body: Body, values: Sequence[Any], site: Site = ()) -> list[Any]:
        """The results of a program."""
        return program.interpret(body, values, self.step, site)

    def step(self, eqn: Equation, values: list[Any], site: Site) -> Sequence[Any]:
        """The results of one equation."""
        if not any(isinstance(value, Factored) for value in values):
            return program.bind(eqn, values)
        contracted = self.contracted(eqn, values, site)
        if contracted is not None:
            return [contracted]
        result = moved(eqn, values) or self.scaled(eqn, values)
        if result is not None:
            return [result]
        inside = self.entered(eqn, values, site)
        return program.bind(eqn, [weight(value) for value in values]) if inside is None else inside

    def contracted(self, eqn: Equation, values: list[Any], site: Site) -> jax.Array | None:
        """The output of a contraction of a `Factored` operand, or `None`."""
        for contraction in contractions(eqn):
            if isinstance(values[contraction.operand], Factored):
                operands = [value if i == contraction.operand else weight(value) for i, value in enumerate(values)]
                result = self.contract(eqn, operands, contraction, site)
                if result is not None:
                    return result
        return None

    def contract(self, eqn: Equation, values: list[Any], contraction: Contraction, site: Site) -> jax.Array | None:
        """The contraction of `v`, times the scale; `None` where that would not be the contraction of the weight."""
        factored, out = values[contraction.operand], program.outputs(eqn)[0]
        if factored.rebuilt or not can_scale_output(factored, contraction):
            return None
        if eqn.params.get("out_sharding") is not None:
            return None  # a sharding that was asked for may split what the scale of the output cannot follow
        if jnp.float16 in (factored.dtype, out.dtype):
            return None  # there the output of a direction with large entries would overflow
        output = program.bind(eqn, with_v(values, contraction))[0]
        scale = scale_of_output(factored, contraction, output.ndim)
        wide = output.astype(jnp.promote_types(scale.dtype, output.dtype))
        return (_times(wide, scale) if output.size == scale.size else wide * scale).astype(output.dtype)

    def scaled(self, eqn: Equation, values: list[Any]) -> Factored | None:
        """A `Factored` times a scalar, or `None`."""
        return scaled(eqn, values)

    def entered(self, eqn: Equation, values: list[Any], site: Site) -> Sequence[Any] | None:
        """The results of a call, a loop or a branch with this runner at work inside; `None` to leave it as it is.

        A `jit` is run through; a `remat` and a `scan` and a `cond` stay what they are. Custom derivative rules are of
        the weight, and a `while_loop`, too, gets the weight. Outside of any transformation all of them do: there the
        equation as it is was compiled before, and a rewritten one would be compiled in each call.
        """
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree_util.tree_leaves(values)):
            return None
        body = program.call(eqn)
        if body is not None:
            if program.is_plain_jit(eqn):
                return self.run(body, values, site)
            again = program.again(eqn, lambda *values: self.run(body, values, site))
            return again(*values) if again else None
        scan, branches = program.scan(eqn), program.branches(eqn)
        if scan is not None:
            return self.scanned(scan, values, site)
        return self.switched(branches, values, site) if branches and program.is_plain_switch(eqn) else None

    def scanned(self, scan: Scan, values: list[Any], site: Site) -> list[Any]:
        """A `scan` whose body takes constants and slices as they are. What is rebuilt in each trip is of its slice."""
        consts, carry, xs = scan.split(values)
        consts = [weight(value) if isinstance(value, Factored) and value.rebuilt else value for value in consts]
        xs = [value.sliceable() if isinstance(value, Factored) else value for value in xs]

        def trip(carry: list[Any], xs: list[Any]) -> tuple[list[Any], tuple[list[Any], dict[Site, Any]]]:
            around, self.found = self.found, {}
            results = self.run(scan.body, [*consts, *carry, *xs], site)
            inside, self.found = self.found, around
            return [weight(value) for value in results[: scan.num_carry]], (results[scan.num_carry :], inside)

        carry, (ys, inside) = scan.run(trip, [weight(value) for value in carry], xs)
        self.found.update(inside)
        return [*carry, *ys]

    def switched(self, branches: list[Body], values: list[Any], site: Site) -> list[Any]:
        """A `cond` or `switch`, whose branches give arrays."""
        index, *operands = values

        def branch(i: int) -> Callable[..., list[Any]]:
            return lambda *values: [weight(value) for value in self.run(branches[i], values, (*site, i))]

        return jax.lax.switch(index, [branch(i) for i in range(len(branches))], *operands)


def can_scale_output(factored: Factored, contraction: Contraction) -> bool:
    """Whether the scale is the same along what is summed over."""
    varies = factored.varies()
    return not any(varies[dim] for dim in contraction.contracted)


def with_v(values: list[Any], contraction: Contraction) -> list[Any]:
    """The operands, with `v` for the weight."""
    factored = values[contraction.operand]
    return [factored.v.astype(factored.dtype) if value is factored else value for value in values]


def scale_of_output(factored: Factored, contraction: Contraction, ndim: int) -> jax.Array:
    """The scale, laid out as the output of the contraction is."""
    kept = sorted(contraction.kept, key=lambda pair: pair[1])
    shape = [1] * ndim
    for dim, target in kept:
        shape[target] = factored.scale.shape[dim]
    order = [*contraction.contracted, *(dim for dim, _ in kept)]
    return factored.scale.transpose(order).reshape(shape)


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
