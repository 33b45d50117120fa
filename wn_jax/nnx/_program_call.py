"""Running an NNX model by its program, so that each scale can go where it is cheap, as `wn_jax.wrap` does.

The model is taken apart, its program is read and run, and what it changed on the way (statistics, random keys) is put
into it. That is for models that keep their structure and can be traced. What is run where this fails is
`_weight_normed`'s; that its user is told so is here.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from wn_jax._node import Node
from wn_jax._tree import abstract_weight
from wn_jax._types import KeyPath, Leaf, PyTree, Scale, TreeDef
from wn_jax._wrap import wrap
from wn_jax.nnx._nodes_in_place import rebuilt_in_place

_told: weakref.WeakKeyDictionary[type, set[tuple[str, str]]] = weakref.WeakKeyDictionary()
"""By the class of a model: the methods, with the kind of failure, that its users were told of."""


class NotAProgramError(Exception):
    """The model does what a program of arrays does not tell."""


def run_factored(
    model: nnx.Module,
    nodes: Mapping[KeyPath, Node],
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    scale: Scale,
) -> PyTree:
    """`model.name(*args, **kwargs)`, the model holding `nodes` at their paths.

    Raises:
        Exception: of any kind, where it cannot be done. The model and the arguments are as they were.
    """
    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=_is_object)
    # One input for each leaf, however often it is given: code may ask whether `query is key`.
    arrays = {id(leaf): leaf for leaf in leaves if not _is_object(leaf)}
    objects = {id(leaf): leaf for leaf in leaves if _is_object(leaf)}

    # Abstract weights, so that an error comes of code that uses them past the program (a method bound to a layer).
    with rebuilt_in_place(model, lambda node: abstract_weight(node)[0]):
        graph, state = nnx.split((model, list(objects.values())), graph=True)
    paths, variables = zip(*nnx.to_flat_state(state), strict=True)
    node_at = [nodes.get(tuple(path[1:])) if path[0] == 0 else None for path in paths]  # of the model, not of objects

    def program(params: list[Leaf], others: list[Leaf]) -> tuple[PyTree, dict[int, PyTree]]:
        merged = nnx.merge(graph, nnx.from_flat_state(zip(paths, params, strict=True)))
        given = dict(zip([*arrays, *objects], [*others, *merged[1]], strict=True))
        before = _contents(merged)
        args, kwargs = jax.tree.unflatten(treedef, [given[id(leaf)] for leaf in leaves])
        result = getattr(merged[0], name)(*args, **kwargs)
        after = _contents(merged)

        _check_is_told(merged, graph, result, before, after)
        _check_unwritten((args, kwargs), treedef, [given[id(leaf)] for leaf in leaves])
        changed = (i for i, new in enumerate(after) if node_at[i] is None and _differ(before[i], new))
        return result, {i: after[i].value for i in changed}

    params = [leaf if node is None else node for node, leaf in zip(node_at, variables, strict=True)]
    result, changed = wrap(program, scale=scale)(params, list(arrays.values()))
    _write([(variables[i], value) for i, value in changed.items()])
    return result


def tell(model: nnx.Module, name: str, scale: Scale, failure: Exception) -> None:
    """Warns of a failure after which the model ran with its weights in place: once a class, method and kind."""
    kind = type(failure).__name__
    told = _told.setdefault(type(model), set())
    if (name, kind) in told:
        return
    told.add((name, kind))

    if isinstance(failure, NotAProgramError):
        cause = f"the call is more than a program of arrays: {failure}"
    else:
        cause = f"running its program failed, and running its code did not. {kind}: {_first_line(failure)}"
    message = (
        f"{type(model).__name__}.{name} computes its weights as with scale='weight', not with scale={scale!r}, as "
        f'{cause}. With WeightNormed(model, axes, scale="weight") no program is read, and nothing is said'
    )
    _warn_users_line(message)


def _warn_users_line(message: str) -> None:
    """A warning of the line that called the model, which transformations of JAX and Flax may have called in turn."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_back is not None:
        if str(frame.f_globals.get("__name__")).split(".")[0] not in ("wn_jax", "flax", "jax", "contextlib"):
            break
        frame = frame.f_back
    assert frame is not None  # CPython has frames
    place = frame.f_code.co_filename, frame.f_lineno, frame.f_globals.get("__name__")
    warnings.warn_explicit(message, UserWarning, *place)


def _first_line(error: Exception) -> str:
    """JAX's errors go on with advice about the user's own code."""
    return str(error).strip().split("\n")[0]


class _Content(NamedTuple):
    """A `Variable` of a model, or an array that is an attribute, and what it holds."""

    leaf: Leaf
    """Itself."""
    arrays: list[Leaf]
    structure: TreeDef
    """Around the arrays."""
    value: PyTree
    """The whole. It can be a dict that the model writes to, so it does not tell whether anything changed."""


def _contents(tree: PyTree) -> list[_Content]:
    contents = []
    for _, leaf in nnx.to_flat_state(nnx.state(tree, graph=True)):
        value = leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf
        contents.append(_Content(leaf, *jax.tree.flatten(value), value))
    return contents


def _differ(before: _Content, after: _Content) -> bool:
    if before.structure != after.structure:
        return True
    return any(a is not b for a, b in zip(before.arrays, after.arrays, strict=True))


def _check_is_told(
    merged: PyTree, graph: nnx.GraphDef[Any], result: PyTree, before: Sequence[_Content], after: Sequence[_Content]
) -> None:
    """Raises where the model did something that neither the result nor the values of variables tell."""
    if any(map(_is_object, jax.tree.leaves(result, is_leaf=_is_object))):
        raise NotAProgramError("it returns an NNX object")
    if nnx.graphdef(merged, graph=True) != graph:
        raise NotAProgramError("it changes its structure")
    if any(a.leaf is not b.leaf for a, b in zip(before, after, strict=True)):
        raise NotAProgramError("it puts variables, or arrays that are attributes, in other places")


def _check_unwritten(
    args: PyTree,
    treedef: TreeDef,
    given: Sequence[Leaf],
) -> None:
    """Raises where the containers among the arguments hold something else than they were given with."""
    leaves, structure = jax.tree.flatten(args, is_leaf=_is_object)
    if structure != treedef or any(a is not b for a, b in zip(leaves, given, strict=True)):
        raise NotAProgramError("it writes into a list or a dict that it was given")


def _write(changes: Sequence[tuple[nnx.Variable[Any], PyTree]]) -> None:
    """Set all variables, or none where NNX refuses one: the model runs again then, and would count twice."""
    written: list[tuple[nnx.Variable[Any], PyTree]] = []
    try:
        for variable, value in changes:
            before = variable.get_raw_value()
            variable.set_raw_value(value)
            written.append((variable, before))
    except Exception:
        for variable, before in written:
            variable.set_raw_value(before)
        raise


def _is_object(x: Leaf) -> bool:
    return isinstance(x, nnx.Pytree | nnx.Variable)
