"""Programs: tracing a function to a jaxpr, opening it, and running one equation of it.

The only file that opens a jaxpr, traces one and binds its equations; what differs between JAX versions there is here.
`tests/program/test_jaxpr.py` has a test of each thing that this file takes for granted, so that a new JAX fails there
first. It reads through `jax.extend.core` and `jax.core.eval_jaxpr` alone, and tells primitives by identity, never by
name.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, TypeGuard, TypeVar, cast

import jax
import jax.core
import jax.extend.core as jex
import numpy as np
from jax.extend.core import primitives as primitive
from jax.typing import ArrayLike

from wn_jax._types import Leaf, PyTree, Shape

Equation: TypeAlias = jex.JaxprEqn
Site: TypeAlias = tuple[int, ...]
"""Where an equation stands in a program: its index, after those of the equations (and branches) around it."""
Input: TypeAlias = jax.Array | np.ndarray | jax.ShapeDtypeStruct
"""A leaf that is traced."""
Value = TypeVar("Value")
Result = TypeVar("Result")
Carry = TypeVar("Carry")


@dataclasses.dataclass(frozen=True)
class Body:
    """A jaxpr with the constants that it closes over."""

    jaxpr: jex.Jaxpr
    consts: tuple[ArrayLike, ...]
    """A value for each of the jaxpr's `constvars`."""

    @property
    def inputs(self) -> list[jax.core.ShapedArray]:
        """The abstract values of its inputs."""
        return _avals(self.jaxpr.invars)

    @property
    def outputs(self) -> list[jax.core.ShapedArray]:
        """The abstract values of its outputs."""
        return _avals(self.jaxpr.outvars)


@dataclasses.dataclass(frozen=True)
class Program:
    """`fn(*args, **kwargs)` as a jaxpr."""

    body: Body
    arrays: list[Input]
    """The arguments' array leaves: the jaxpr's inputs."""
    unflatten: Callable[[Sequence[Leaf]], PyTree]
    """From the jaxpr's outputs to what `fn` returns, with the leaves that are no arrays as `fn` returned them."""


def is_input(x: Leaf) -> TypeGuard[Input]:
    """Whether a leaf is traced, and so an input of the program. Python scalars and all else reach the function as is.

    NumPy's own scalars do too, as they are what a function branches on; and arrays of objects, strings or dates, which
    JAX does not take.
    """
    if isinstance(x, np.ndarray):
        return x.dtype.kind not in "OSUMm"
    return isinstance(x, jax.Array | jax.ShapeDtypeStruct)


def trace(fn: Callable[..., PyTree], args: Sequence[PyTree], kwargs: dict[str, PyTree], purpose: str) -> Program:
    """The program of `fn(*args, **kwargs)`. An error in `fn` is shown as it is, with a note on what was being done."""
    leaves, treedef = jax.tree.flatten((tuple(args), kwargs))
    traced = [is_input(leaf) for leaf in leaves]
    unflatten: list[Callable[[Sequence[Leaf]], PyTree]] = []  # only fn's result tells, and make_jaxpr keeps the jaxpr

    def flat(*arrays: jax.Array) -> list[jax.Array]:
        # A new function each time: make_jaxpr caches by identity, and would go stale.
        given, given_kwargs = jax.tree.unflatten(treedef, _merge(leaves, traced, arrays))
        out, out_treedef = jax.tree.flatten(fn(*given, **given_kwargs))
        computed = [is_input(leaf) for leaf in out]
        # Without the arrays, which are tracers here and would outlive their trace.
        others = [None if array else leaf for leaf, array in zip(out, computed, strict=True)]
        unflatten.append(lambda values: jax.tree.unflatten(out_treedef, _merge(others, computed, values)))
        return [leaf for leaf, array in zip(out, computed, strict=True) if array]

    arrays = [leaf for leaf in leaves if is_input(leaf)]
    try:
        closed = jax.make_jaxpr(flat)(*arrays)
    except Exception as error:
        error.add_note(f"This happened while wn_jax traced {_name(fn)} to a jaxpr, {purpose}")
        raise
    return Program(_body(closed), arrays, unflatten[-1])


def interpret(
    body: Body,
    inputs: Sequence[Value],
    rule: Callable[[Equation, list[Value], Site], Sequence[Value]],
    site: Site = (),
    literal: Callable[[Any], Value] = lambda value: value,
    const: Callable[[Any], Value] = lambda value: value,
) -> list[Value]:
    """Runs a program on values of any kind: `rule(equation, operands, site)` gives the results of each equation.

    `literal` and `const` make such values of the numbers in the program and of the arrays that it closes over.
    """
    jaxpr = body.jaxpr
    env = dict(zip(jaxpr.constvars, map(const, body.consts), strict=True))
    env.update(zip(jaxpr.invars, inputs, strict=True))
    last_use = {var: i for i, eqn in enumerate(jaxpr.eqns) for var in eqn.invars if not isinstance(var, jex.Literal)}
    results = {var for var in jaxpr.outvars if not isinstance(var, jex.Literal)}

    def read(var: jex.Var | jex.Literal) -> Value:
        return literal(var.val) if isinstance(var, jex.Literal) else env[var]

    for i, eqn in enumerate(jaxpr.eqns):
        # What no later equation uses goes at once, and has no name here that outlives the trip: an eager run would hold
        # every intermediate array to its end.
        env.update(zip(eqn.outvars, rule(eqn, [read(var) for var in eqn.invars], (*site, i)), strict=True))
        for var in (*eqn.invars, *eqn.outvars):
            if not isinstance(var, jex.Literal) and last_use.get(var, i) <= i and var not in results:
                env.pop(var, None)
    return [read(var) for var in jaxpr.outvars]


def backwards(
    body: Body, taken: Iterable[int], rule: Callable[[Equation, list[int], Site], Iterable[int] | None], site: Site
) -> frozenset[int]:
    """Goes through a program from its end, and gives the inputs on which the results that are taken depend.

    `rule(equation, results, site)` gives the operands on which those results of an equation depend; `None`: on all. It
    is asked only where there are such results, or effects, which run in any case.
    """
    jaxpr = body.jaxpr
    live = {var for var in (jaxpr.outvars[i] for i in taken) if not isinstance(var, jex.Literal)}
    for i in reversed(range(len(jaxpr.eqns))):
        eqn = jaxpr.eqns[i]
        results = [k for k, var in enumerate(eqn.outvars) if var in live]
        if results or (eqn.effects and _has_effects(eqn)):
            operands = rule(eqn, results, (*site, i))
            variables = eqn.invars if operands is None else [eqn.invars[k] for k in operands]
            live.update([var for var in variables if not isinstance(var, jex.Literal)])
    return frozenset(i for i, var in enumerate(jaxpr.invars) if var in live)


def bind(eqn: Equation, operands: Sequence[ArrayLike]) -> list[jax.Array]:
    """Runs one equation, as `jax.core.eval_jaxpr` does: under its source line, name scope and configuration."""
    # A variable for each operand, as one that the equation takes twice may have two values here.
    inputs = [jex.Var(aval) for aval in _avals(eqn.invars)]
    about = jex.DebugInfo("wn_jax", "bind", ("",) * len(inputs), ("",) * len(eqn.outvars))
    alone = jex.Jaxpr((), inputs, list(eqn.outvars), [eqn.replace(invars=[*inputs])], eqn.effects, about)
    return list(jax.core.eval_jaxpr(alone, (), *operands))


def shapes(eqn: Equation) -> list[Shape]:
    """The shapes of an equation's operands."""
    return [aval.shape for aval in _avals(eqn.invars)]


def dtypes(eqn: Equation) -> list[np.dtype]:
    """The dtypes of an equation's operands."""
    return [aval.dtype for aval in _avals(eqn.invars)]


def outputs(eqn: Equation) -> list[jax.core.ShapedArray]:
    """The abstract values of an equation's results."""
    return _avals(eqn.outvars)


def has_body(eqn: Equation) -> bool:
    """Whether this is a call, a loop or a branch that is entered."""
    return eqn.primitive in _ENTERED


def call(eqn: Equation) -> Body | None:
    """The body of a `jit`, a `remat` or a function with a custom derivative rule, which runs once on the operands.

    Known by identity: loops and `shard_map`, too, have one body with as many inputs as the equation.
    """
    return _only_body(eqn) if eqn.primitive in _CALLS else None


def is_custom_rule(eqn: Equation) -> bool:
    """Whether this is the call of a `custom_jvp` or `custom_vjp` function."""
    return eqn.primitive in (primitive.custom_jvp_call_p, primitive.custom_vjp_call_p)


def is_backward(eqn: Equation) -> bool:
    """Whether reverse mode made this equation.

    Told by a name that JAX gives for people. Where it is, a parameter is left alone; nothing else is decided by it.
    """
    return "transpose(" in str(getattr(eqn.source_info, "name_stack", ""))


def ragged_rows(eqn: Equation) -> int:
    """The dimension of the output of a `ragged_dot` that has the rows, which are in groups."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (left, _), (batch, _) = numbers.dot_dimension_numbers
    free = [dim for dim in range(len(shapes(eqn)[0])) if dim not in (*left, *batch)]
    return len(batch) + free.index(numbers.lhs_ragged_dimensions[0])


def is_plain_jit(eqn: Equation) -> bool:
    """Whether this is a `jit` that asks for nothing but compilation, so that running its body is the same."""
    if eqn.primitive is not primitive.jit_p or eqn.params["compiler_options_kvs"]:
        return False
    # donated_invars, keep_unused and inline only say how to compile, and name is for people.
    plain = _plain_jit().params
    return all(
        item == plain[name][0]
        for name in ("in_shardings", "out_shardings", "in_layouts", "out_layouts")
        for item in eqn.params[name]
    )


def again(eqn: Equation, run: Callable[..., list[Value]]) -> Callable[..., list[Value]] | None:
    """For a `remat`: `run`, rematerialized under the same policy. `None` for anything else.

    A remat that was differentiated already holds its own backward pass; it cannot be made again, and gives `None`.
    """
    known = {"jaxpr", "prevent_cse", "differentiated", "policy"}  # with another parameter, it may be another thing
    if eqn.primitive is not primitive.remat_p or set(eqn.params) != known or eqn.params["differentiated"]:
        return None
    return jax.checkpoint(run, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])


@dataclasses.dataclass(frozen=True)
class Scan:
    """A `scan`: its operands are constants, then carries, then what it slices along the leading axis."""

    body: Body
    """A trip: of constants, carries and slices, to carries and what is stacked."""
    num_consts: int
    num_carry: int
    length: int
    """How many trips there are."""
    reverse: bool
    """Whether the last slice comes first."""
    unroll: int | bool
    """As `lax.scan` takes it."""

    def grouped(self, operands: Sequence[Value]) -> tuple[list[Value], list[Value], list[Value]]:
        """Operands as (constants, carries, sliced)."""
        return _cut(operands, self.num_consts, self.num_carry)

    def invariant(self) -> list[bool]:
        """Of each carry: whether every trip hands it on as it is."""
        _, carries, _ = self.grouped(self.body.jaxpr.invars)
        return [carry is out for carry, out in zip(carries, self.body.jaxpr.outvars[: self.num_carry], strict=True)]

    def run(
        self, trip: Callable[[Carry, PyTree], tuple[Carry, Result]], carry: Carry, xs: PyTree
    ) -> tuple[Carry, Result]:
        """`lax.scan` of `trip(carry, xs) -> (carry, ys)` over the same trips in the same order."""
        return jax.lax.scan(trip, carry, xs, length=self.length, reverse=self.reverse, unroll=self.unroll)


def scan(eqn: Equation) -> Scan | None:
    """The parts of a `scan`, told by rank, as how many of each there are is written differently from JAX 0.11 on."""
    # num_consts and num_carry until JAX 0.10, ft_in and ft_out from 0.11 on.
    known = {"jaxpr", "length", "reverse", "unroll", "num_consts", "num_carry", "ft_in", "ft_out"}
    if eqn.primitive is not primitive.scan_p or not set(eqn.params) <= known:
        return None
    body = _only_body(eqn)
    # A carry has the rank that it has in a trip; what is sliced or stacked has one dimension more.
    kept = [out.ndim == aval.ndim for out, aval in zip(outputs(eqn), body.outputs, strict=True)]
    sliced = [len(shape) > aval.ndim for shape, aval in zip(shapes(eqn), body.inputs, strict=True)]
    num_carry = sum(kept)
    return Scan(
        body=body,
        num_consts=len(sliced) - sum(sliced) - num_carry,
        num_carry=num_carry,
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )


@dataclasses.dataclass(frozen=True)
class While:
    """A `while`: its operands are the condition's constants, the body's constants, then the carries."""

    condition: Body
    """Whether to go on: of its constants and the carries."""
    body: Body
    """A trip: of its constants and the carries, to the carries."""
    condition_consts: int
    body_consts: int

    def grouped(self, operands: Sequence[Value]) -> tuple[list[Value], list[Value], list[Value]]:
        """Operands as (the condition's constants, the body's constants, carries)."""
        return _cut(operands, self.condition_consts, self.body_consts)

    def invariant(self) -> list[bool]:
        """Of each carry: whether every trip hands it on as it is."""
        carries = self.body.jaxpr.invars[self.body_consts :]
        return [carry is out for carry, out in zip(carries, self.body.jaxpr.outvars, strict=True)]


def while_loop(eqn: Equation) -> While | None:
    """The parts of a `while_loop`."""
    if eqn.primitive is not primitive.while_p:
        return None
    return While(
        condition=_body(eqn.params["cond_jaxpr"]),
        body=_body(eqn.params["body_jaxpr"]),
        condition_consts=eqn.params["cond_nconsts"],
        body_consts=eqn.params["body_nconsts"],
    )


def is_plain_switch(eqn: Equation) -> bool:
    """Whether a `switch` over its branches is the same. One by platform is not: it must not compile the others."""
    return eqn.primitive is primitive.cond_p and set(eqn.params) == {"branches"}


def branches(eqn: Equation) -> list[Body] | None:
    """The branches of a `cond` or `switch`, whose first operand is the index of the one that runs."""
    return [_body(branch) for branch in eqn.params["branches"]] if eqn.primitive is primitive.cond_p else None


def _traced(fn: Callable[..., PyTree], *shapes: Shape) -> jex.Primitive:
    """The primitive that a function of arrays is traced to, where JAX gives it no public name.

    Under a JAX that takes the function apart this is another one, which has rules of its own.
    """
    return jax.make_jaxpr(fn)(*(jax.ShapeDtypeStruct(shape, "float32") for shape in shapes)).eqns[-1].primitive


def _ragged_dot(rows: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(rows, matrices, sizes.astype("int32"))


def _reshard(x: jax.Array) -> jax.Array:
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    return jax.sharding.reshard(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


split_p = _traced(lambda x: jax.lax.split(x, (1, 1)), (2,))
unstack_p = _traced(lambda x: jax.numpy.unstack(x), (2, 2))
stack_p = _traced(lambda x: jax.numpy.stack([x, x]), (2,))
tile_p = _traced(lambda x: jax.numpy.tile(x, 2), (2,))
ragged_dot_p = _traced(_ragged_dot, (2, 3), (1, 3, 2), (1,))
reshard_p = _traced(_reshard, (2,))

_CALLS = frozenset({primitive.jit_p, primitive.remat_p, primitive.custom_jvp_call_p, primitive.custom_vjp_call_p})


_ENTERED = _CALLS | {primitive.scan_p, primitive.while_p, primitive.cond_p}


def _body(jaxpr: jex.Jaxpr | jex.ClosedJaxpr) -> Body:
    """A closed or an open jaxpr as a `Body`; from JAX 0.11 on they are one class."""
    opened = cast(jex.Jaxpr, getattr(jaxpr, "jaxpr", jaxpr))
    return Body(opened, tuple(getattr(jaxpr, "consts", ())))


def _only_body(eqn: Equation) -> Body:
    # By type and not by name: jit and remat call it "jaxpr", the custom rules have names of their own.
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


def _has_effects(eqn: Equation) -> bool:
    """Whether an equation does more than give results, so that `jit` keeps it even where nobody takes these."""
    return any(type(effect) is not _axis_effect() for effect in eqn.effects)


@functools.cache
def _axis_effect() -> type:
    """The type of the effect that a collective has: it names a mesh axis, and `jit` drops it. It has no public name."""
    closed = jax.make_jaxpr(lambda x: jax.lax.psum(x, "axis"), axis_env=[("axis", 2)])(0.0)
    (effect,) = closed.eqns[0].effects
    return type(effect)


def _avals(variables: Sequence[jex.Var | jex.Literal]) -> list[jax.core.ShapedArray]:
    """The abstract values of variables. Those that are no arrays (tokens) have another type, and no shape."""
    return [cast(jax.core.ShapedArray, var.aval) for var in variables]


def _cut(operands: Sequence[Value], first: int, second: int) -> tuple[list[Value], list[Value], list[Value]]:
    """The first so many, the next so many, and the rest."""
    return list(operands[:first]), list(operands[first : first + second]), list(operands[first + second :])


def _merge(leaves: Sequence[Leaf], replaced: Sequence[bool], values: Sequence[Leaf]) -> list[Leaf]:
    """The leaves, with these values, in order, in the place of those that are replaced."""
    given = iter(values)
    return [next(given) if new else leaf for leaf, new in zip(leaves, replaced, strict=True)]


def _name(fn: Callable[..., PyTree]) -> str:
    return getattr(fn, "__qualname__", None) or repr(fn)
