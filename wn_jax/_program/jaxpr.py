"""Programs: tracing a function to a jaxpr, opening it, and running one equation of it.

The only file that touches jaxprs. All that differs between JAX versions is here. `tests/program/test_jaxpr.py` has a
test of each thing that this file takes for granted, so that a new JAX fails there first. It reads through
`jax.extend.core` and `jax.core.eval_jaxpr` alone, and tells primitives by identity, never by name.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np
from jax.extend.core import primitives as primitive

Equation = jex.JaxprEqn
Site = tuple[int, ...]
"""Where an equation stands in a program: its index, after those of the equations (and branches) around it."""


@dataclasses.dataclass(frozen=True)
class Body:
    """A jaxpr with the constants that it closes over."""

    jaxpr: Any
    consts: tuple[Any, ...]

    @property
    def inputs(self) -> list[Any]:
        """The abstract values of its inputs."""
        return [var.aval for var in self.jaxpr.invars]

    @property
    def outputs(self) -> list[Any]:
        """The abstract values of its outputs."""
        return [var.aval for var in self.jaxpr.outvars]


@dataclasses.dataclass(frozen=True)
class Program:
    """`fn(*args, **kwargs)` as a jaxpr."""

    body: Body
    arrays: list[Any]
    """The arguments' array leaves: the jaxpr's inputs."""
    unflatten: Callable[[Sequence[Any]], Any]
    """From the jaxpr's outputs to what `fn` returns, with the leaves that are no arrays as `fn` returned them."""


def is_array(x: Any) -> bool:
    """Whether a leaf is traced. Python scalars and all other objects reach the function as they are."""
    if isinstance(x, np.ndarray):
        return x.dtype.kind not in "OSUMm"
    return isinstance(x, jax.Array | jax.ShapeDtypeStruct)


def trace(fn: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], purpose: str) -> Program:
    """The program of `fn(*args, **kwargs)`. An error in `fn` is shown as it is, with a note on what was being done."""
    leaves, treedef = jax.tree_util.tree_flatten((tuple(args), kwargs))
    traced = [is_array(leaf) for leaf in leaves]
    results: list[tuple[list[Any], list[bool], Any]] = []

    def flat(*arrays: Any) -> list[Any]:  # a new function each time: make_jaxpr caches by identity, and would go stale
        given, kwargs = jax.tree_util.tree_unflatten(treedef, _merge(leaves, traced, arrays))
        out, out_treedef = jax.tree_util.tree_flatten(fn(*given, **kwargs))
        kept = [is_array(leaf) for leaf in out]
        results.append(([None if array else leaf for leaf, array in zip(out, kept, strict=True)], kept, out_treedef))
        return [leaf for leaf, array in zip(out, kept, strict=True) if array]

    arrays = [leaf for leaf, array in zip(leaves, traced, strict=True) if array]
    try:
        closed = jax.make_jaxpr(flat)(*arrays)
    except Exception as error:
        error.add_note(f"This happened while wn_jax traced {_name(fn)} to a jaxpr, {purpose}")
        raise
    out, kept, out_treedef = results[-1]
    return Program(
        _body(closed), arrays, lambda values: jax.tree_util.tree_unflatten(out_treedef, _merge(out, kept, values))
    )


def interpret(
    body: Body,
    inputs: Sequence[Any],
    rule: Callable[[Equation, list[Any], Site], Sequence[Any]],
    site: Site = (),
    literal: Callable[[Any], Any] = lambda value: value,
    const: Callable[[Any], Any] = lambda value: value,
) -> list[Any]:
    """Runs a program on values of any kind: `rule(equation, operands, site)` gives the results of each equation.

    `literal` and `const` make such values of the numbers in the program and of the arrays that it closes over.
    """
    jaxpr = body.jaxpr
    env = dict(zip(jaxpr.constvars, map(const, body.consts), strict=True))
    env.update(zip(jaxpr.invars, inputs, strict=True))
    last_use = {var: i for i, eqn in enumerate(jaxpr.eqns) for var in eqn.invars if not isinstance(var, jex.Literal)}
    results = {var for var in jaxpr.outvars if not isinstance(var, jex.Literal)}

    def read(var: Any) -> Any:
        return literal(var.val) if isinstance(var, jex.Literal) else env[var]

    for i, eqn in enumerate(jaxpr.eqns):
        env.update(zip(eqn.outvars, rule(eqn, [read(var) for var in eqn.invars], (*site, i)), strict=True))
        for var in (*eqn.invars, *eqn.outvars):
            if not isinstance(var, jex.Literal) and last_use.get(var, i) <= i and var not in results:
                env.pop(var, None)  # an eager run would hold every intermediate array to its end
    return [read(var) for var in jaxpr.outvars]


def bind(eqn: Equation, operands: Sequence[Any]) -> list[Any]:
    """Runs one equation, as `jax.core.eval_jaxpr` does: under its source line, name scope and configuration."""
    # A variable for each operand, as one that the equation takes twice may have two values here.
    inputs: list[Any] = [jex.Var(var.aval) for var in eqn.invars]
    about = jex.DebugInfo("wn_jax", "bind", ("",) * len(inputs), ("",) * len(eqn.outvars))
    alone = jex.Jaxpr((), inputs, list(eqn.outvars), [eqn.replace(invars=inputs)], eqn.effects, about)
    return list(jax.core.eval_jaxpr(alone, (), *operands))


def shapes(eqn: Equation) -> list[tuple[int, ...]]:
    """The shapes of an equation's operands."""
    return [var.aval.shape for var in eqn.invars]  # type: ignore[attr-defined]


def outputs(eqn: Equation) -> list[Any]:
    """The abstract values of an equation's results."""
    return [var.aval for var in eqn.outvars]


def call(eqn: Equation) -> Body | None:
    """The body of a `jit`, a `remat` or a function with a custom derivative rule, which runs once on the operands.

    Known by identity: loops and `shard_map`, too, have one body with as many inputs as the equation.
    """
    return _only_body(eqn) if eqn.primitive in _CALLS else None


def is_custom_rule(eqn: Equation) -> bool:
    """Whether this is the call of a `custom_jvp` or `custom_vjp` function."""
    return eqn.primitive in (primitive.custom_jvp_call_p, primitive.custom_vjp_call_p)


def is_plain_jit(eqn: Equation) -> bool:
    """Whether this is a `jit` that asks for nothing but compilation, so that running its body is the same."""
    if eqn.primitive is not primitive.jit_p or eqn.params["compiler_options_kvs"]:
        return False
    plain = _plain_jit().params
    return all(
        item == plain[name][0]
        for name in ("in_shardings", "out_shardings", "in_layouts", "out_layouts")
        for item in eqn.params[name]
    )


def again(eqn: Equation, run: Callable[..., list[Any]]) -> Callable[..., list[Any]] | None:
    """For a `remat`: `run`, rematerialized under the same policy. `None` for anything else.

    A remat that was differentiated already holds its own backward pass; it cannot be made again, and gives `None`.
    """
    known = {"jaxpr", "prevent_cse", "differentiated", "policy"}
    if eqn.primitive is not primitive.remat_p or set(eqn.params) != known or eqn.params["differentiated"]:
        return None
    return jax.checkpoint(run, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])


@dataclasses.dataclass(frozen=True)
class Scan:
    """A `scan`: its operands are constants, then carries, then what it slices along the leading axis."""

    body: Body
    num_consts: int
    num_carry: int
    length: int
    reverse: bool
    unroll: Any

    def split(self, operands: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """Operands as (constants, carries, sliced)."""
        first, second = self.num_consts, self.num_consts + self.num_carry
        return list(operands[:first]), list(operands[first:second]), list(operands[second:])

    def invariant(self) -> list[bool]:
        """Of each carry: whether every trip hands it on as it is."""
        carries = self.body.jaxpr.invars[self.num_consts :]
        return [carry is out for carry, out in zip(carries, self.body.jaxpr.outvars[: self.num_carry], strict=False)]

    def run(self, trip: Callable[[list[Any], list[Any]], tuple[list[Any], Any]], carry: Any, xs: Any) -> Any:
        """`lax.scan` of `trip(carry, xs) -> (carry, ys)` over the same trips in the same order."""
        return jax.lax.scan(trip, carry, xs, length=self.length, reverse=self.reverse, unroll=self.unroll)


def scan(eqn: Equation) -> Scan | None:
    """The parts of a `scan`, told by rank, as how many of each there are is written differently from JAX 0.11 on."""
    known = {"jaxpr", "length", "reverse", "unroll", "num_consts", "num_carry", "ft_in", "ft_out"}
    if eqn.primitive is not primitive.scan_p or not set(eqn.params) <= known:
        return None
    body = _only_body(eqn)
    kept = [out.ndim == aval.ndim for out, aval in zip(outputs(eqn), body.outputs, strict=True)]
    sliced = [len(shape) > aval.ndim for shape, aval in zip(shapes(eqn), body.inputs, strict=True)]
    num_carry = sum(kept)
    num_consts = len(sliced) - sum(sliced) - num_carry
    params = eqn.params
    return Scan(body, num_consts, num_carry, params["length"], params["reverse"], params["unroll"])


@dataclasses.dataclass(frozen=True)
class While:
    """A `while`: its operands are the condition's constants, the body's constants, then the carries."""

    condition: Body
    body: Body
    condition_consts: int
    body_consts: int

    def invariant(self) -> list[bool]:
        """Of each carry: whether every trip hands it on as it is."""
        carries = self.body.jaxpr.invars[self.body_consts :]
        return [carry is out for carry, out in zip(carries, self.body.jaxpr.outvars, strict=True)]


def while_loop(eqn: Equation) -> While | None:
    """The parts of a `while_loop`."""
    if eqn.primitive is not primitive.while_p:
        return None
    params = eqn.params
    return While(
        _body(params["cond_jaxpr"]), _body(params["body_jaxpr"]), params["cond_nconsts"], params["body_nconsts"]
    )


def is_plain_switch(eqn: Equation) -> bool:
    """Whether a `switch` over its branches is the same. One by platform is not: it must not compile the others."""
    return eqn.primitive is primitive.cond_p and set(eqn.params) == {"branches"}


def branches(eqn: Equation) -> list[Body] | None:
    """The branches of a `cond` or `switch`, whose first operand is the index of the one that runs."""
    return [_body(branch) for branch in eqn.params["branches"]] if eqn.primitive is primitive.cond_p else None


_CALLS = frozenset({primitive.jit_p, primitive.remat_p, primitive.custom_jvp_call_p, primitive.custom_vjp_call_p})


def _body(jaxpr: Any) -> Body:
    """A closed or an open jaxpr as a `Body`; from JAX 0.11 on they are one class."""
    return Body(getattr(jaxpr, "jaxpr", jaxpr), tuple(getattr(jaxpr, "consts", ())))


def _only_body(eqn: Equation) -> Body:
    found = [value for value in eqn.params.values() if isinstance(value, jex.Jaxpr | jex.ClosedJaxpr)]
    if len(found) != 1:
        raise NotImplementedError(
            f"{eqn.primitive} has {len(found)} bodies under jax {jax.__version__}, where wn_jax expects one; please "
            "report it. wn_jax.wrap(fn, scale='weight') and wn_jax.kernel_axes do not read programs."
        )
    return _body(found[0])


@functools.cache
def _plain_jit() -> Equation:
    """A `jit` without options, to compare with: the value that stands for "unspecified" has no public name."""
    return jax.make_jaxpr(jax.jit(lambda x: x + 1))(0.0).eqns[0]


def _merge(leaves: Sequence[Any], replaced: Sequence[bool], values: Sequence[Any]) -> list[Any]:
    given = iter(values)
    return [next(given) if new else leaf for leaf, new in zip(leaves, replaced, strict=True)]


def _name(fn: Any) -> str:
    return getattr(fn, "__qualname__", None) or repr(fn)
