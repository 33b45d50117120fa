"""Running a function of plain weights on a tree that holds nodes, with each scale where it is cheap.

This file owns `wrap`. Where a scale may go, `_program.reading` finds out; `_program.run` takes it there.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.core
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from wn_jax._boxes import unbox
from wn_jax._from_dicts import note_on_dicts
from wn_jax._node import Node, is_node
from wn_jax._program.factored import Factored, Operand, weight
from wn_jax._program.reading import ParameterLeaf, Reading, check_callable, check_position, read
from wn_jax._program.run import Runner
from wn_jax._program.strict import Strict, check_places
from wn_jax._transform import reconstruct
from wn_jax._tree import flatten, has_nodes, is_traced, with_plain_children
from wn_jax._types import Params, PyTree, Scale

Result = TypeVar("Result")


def wrap(
    fn: Callable[..., Result], argnums: int | Sequence[int] = 0, scale: Scale = "auto", strict: bool = False
) -> Callable[..., Result]:
    """`fn`, on trees that hold nodes in the arguments that `argnums` names. Plain trees pass through unchanged.

    Arguments:
        fn: any function of a parameter tree, such as Flax's `model.apply` or a loss.
        argnums: the positions of the parameter trees among `fn`'s positional arguments.
        scale: where the scale `g / ||v||` is applied. `"weight"`: to the weight, before `fn` sees it. `"output"`: to
            the outputs of the matmuls and convolutions that use it, `x @ (v * s) == (x @ v) * s`, wherever `fn`'s
            program lets it. `"auto"`: to whichever of the two has fewer numbers, an output counted as often as
            the loops around compute it. Where `jax.export` leaves the size of an argument open, the scale goes to
            the weight.

            Both but `"weight"` trace `fn` to a jaxpr in each call, as `jit` does: outside `jit`, a function that
            branches on values needs `scale="weight"`. What is not understood (a custom derivative rule, a
            `while_loop`, any operation but those that move numbers) gets the weight, and so does a matmul in a dtype
            that lacks the scale's range (float16, float8), where `v` could overflow or vanish. In all cases the norm is
            computed once, outside of loops, and the results are equal to rounding.

            Under `jit`, `"auto"` rebuilds each layer of a stack that a `scan` slices in its own trip: there is no copy
            of the whole stack, nor with `remat` in the gradient.

            As under `jit`, `fn` gets copies of containers: what it writes into a dict that it was given is lost.
        strict: raise in a call where the scale of a weight whose uses are proved (`weight_uses`) should go to the
            outputs, but something on its way makes `wrap` rebuild the weight. With `"output"` that is any such weight;
            with `"auto"`, one whose outputs hold fewer numbers. That `"auto"` takes the weight's side where this has
            fewer is no error. Outside `jit` too, the function is judged as inside.

    Returns:
        A function of `fn`'s own arguments. Every transformation holds: `jit`, `grad`, `vmap`, `scan`, `remat`.

    Raises:
        ValueError: `scale` is unknown, `argnums` are negative, or `strict` is given with `scale="weight"`; or (when
            called, with `strict`) the scale of some weights should go to the outputs, but cannot: they are named.
        TypeError: `fn` is not callable, or (when called) an argument that `argnums` names is not given by position.

    >>> import jax, jax.numpy as jnp, wn_jax as wn
    >>> def model(params, x):
    ...     return x @ params["kernel"]
    >>> params = {"kernel": jnp.array([[3.0], [4.0]])}
    >>> nodes = wn.reparameterize(params, wn.kernel_axes(params))
    >>> jax.jit(wn.wrap(model))(nodes, jnp.ones((1, 2)))
    Array([[7.]], dtype=float32)
    """
    check_callable("wrap", fn)
    check_scale(scale)
    if strict and scale == "weight":
        raise ValueError("strict=True is for scale='auto' and 'output'; scale='weight' rebuilds every weight")
    positions = _positions(argnums)

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Result:
        check_position(positions, args, kwargs)
        try:
            if scale == "weight":
                return _run_on_weights(fn, positions, args, kwargs)
            return _run_factored(fn, positions, args, kwargs, scale == "output", strict)
        except Exception as error:
            _explain_lost_leaves(error, [args[i] for i in positions])
            raise

    return wrapped


def check_scale(scale: str) -> None:
    """Raises where `scale` is none of the three that `Scale` names."""
    if scale not in ("auto", "weight", "output"):
        raise ValueError(f"scale must be 'auto', 'weight' or 'output'; got {scale!r}")


def _explain_lost_leaves(error: Exception, trees: Sequence[Params]) -> None:
    """Adds to an error how nodes get lost: as dicts, or in the error of `nnx.merge`, which only counts leaves."""
    if not has_nodes(trees):  # else they were read, and the note is there
        for tree in trees:
            note_on_dicts(error, tree)
    states = [tree for tree in trees if isinstance(tree, nnx.State)]
    if not states or "number of leaves" not in str(error):
        return
    paths, leaves, _ = flatten(states[0] if len(states) == 1 else states)
    nodes = [path for path, leaf in zip(paths, leaves, strict=True) if is_node(leaf)]
    error.add_note(
        f"wn_jax.wrap was given the leaves {', '.join(paths) or 'none'}; "
        f"nodes among them: {', '.join(nodes) or 'none'}. "
        "Missing are weights that were reparameterized, if the state then went through nnx.filter_state or "
        "nnx.split_state, whose filters do not match nodes: filter first (nnx.split(model, nnx.Param, ...)), then "
        "reparameterize the part with the weights."
    )


def _run_on_weights(
    fn: Callable[..., Result], positions: Sequence[int], args: Sequence[PyTree], kwargs: dict[str, Any]
) -> Result:
    """`fn` on plain weights, which are rebuilt before it sees them."""
    return fn(*(reconstruct(arg) if i in positions else arg for i, arg in enumerate(args)), **kwargs)


def _run_factored(
    fn: Callable[..., Result],
    positions: Sequence[int],
    args: Sequence[PyTree],
    kwargs: dict[str, Any],
    always: bool,
    strict: bool,
) -> Result:
    """`fn` on nodes whose scale goes to the outputs: wherever it can, or where these hold fewer numbers."""
    # A plain tree needs no trace, and its function may branch on values.
    if not has_nodes([args[i] for i in positions]):
        return fn(*args, **kwargs)
    arrays = [leaf for leaf in jax.tree.leaves((args, kwargs)) if hasattr(leaf, "shape")]
    if not all(isinstance(size, int) for array in arrays for size in array.shape):  # jax.export leaves it open
        if strict and always:
            raise ValueError("wrap(strict=True): jax.export leaves a size open, and the scales go to the weights then")
        return _run_on_weights(fn, positions, args, kwargs)
    purpose = "to place the scale of its weights. wn_jax.wrap(fn, scale='weight') does not trace."
    reading = read(fn, positions, args, kwargs, purpose)
    if strict:
        check_places(reading, always)
    # All of them arrays or tracers: shapes alone have nothing to run on.
    inputs = cast(list[Operand], list(reading.program.arrays))
    for leaf in reading.leaves:
        if leaf.node is not None:
            inputs[leaf.input] = _value(leaf, leaf.node, always)
    results = _run_strictly(reading, inputs) if strict else Runner(reading.masks).run(reading.program.body, inputs)
    avals = reading.program.body.outputs
    return reading.program.unflatten(
        [_as_array(weight(value), aval) for value, aval in zip(results, avals, strict=True)]
    )


def _run_strictly(reading: Reading, inputs: list[Operand]) -> list[Operand]:
    """The results of a program, after a check that no weight is rebuilt which it does as under `jit`."""
    body, runner = reading.program.body, Strict(reading)
    if is_traced(inputs):
        results = runner.run(body, inputs)
        runner.check()
        return results
    jax.eval_shape(lambda inputs: (runner.run(body, inputs), None)[1], inputs)
    runner.check()
    return Runner(reading.masks).run(body, inputs)


def _as_array(value: ArrayLike, aval: jax.core.ShapedArray) -> jax.Array:
    """A result as an array: a number that stands in the program (an auxiliary loss of 0) is no array yet."""
    return value if isinstance(value, jax.Array) else jnp.asarray(value, aval.dtype)


def _value(leaf: ParameterLeaf, node: Node, always: bool) -> Operand:
    """The input of the program that stands for a node: its weight, or its factors."""
    node, on_weight = with_plain_children(node), not leaf.goes_to_output(always)
    if on_weight and not leaf.sliced:
        return unbox(node.weight())
    # Of a stack, the weight is rebuilt too, but by each trip of the loop that slices it.
    v, scale = map(unbox, node.factors())
    return Factored(v, scale, v.dtype, rebuilt=on_weight, path=leaf.path)


def _positions(argnums: int | Sequence[int]) -> tuple[int, ...]:
    """`argnums` as sorted positions."""
    try:
        positions = sorted(set(map(operator.index, argnums if isinstance(argnums, Sequence) else (argnums,))))
    except TypeError:
        positions = []
    if not positions or positions[0] < 0:
        raise ValueError(f"argnums must be one position or a tuple of them, counted from 0; got {argnums!r}")
    return tuple(positions)
