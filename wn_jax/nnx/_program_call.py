"""Running an NNX model by its program, so that each scale can go where it is cheap, as `wn_jax.wrap` does.

The model is taken apart, its program is read and run, and what it changed on the way (statistics, random keys) is put
into it. That is for models that keep their structure and can be traced.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from wn_jax._tree import abstract_weight
from wn_jax._wrap import wrap
from wn_jax.nnx._nodes_in_place import weights_in_place


class NotAProgramError(Exception):
    """The model does what a program of arrays does not tell."""


def is_traced(*trees: Any) -> bool:
    """Whether a transformation such as `jit` looks on; eagerly, reading a program costs more than it saves."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree_util.tree_leaves(trees))


def run_factored(model: Any, nodes: dict[Any, Any], name: str, args: Any, kwargs: Any, scale: str) -> Any:
    """`model.name(*args, **kwargs)`, the model holding `nodes` at their paths.

    Raises:
        Exception: of any kind, where it cannot be done. The model and the arguments are as they were.
    """
    leaves, treedef = jax.tree_util.tree_flatten((args, kwargs), is_leaf=_is_object)
    # One input for each leaf, however often it is given: code may ask whether `query is key`.
    arrays = {id(leaf): leaf for leaf in leaves if not _is_object(leaf)}
    objects = {id(leaf): leaf for leaf in leaves if _is_object(leaf)}
    # Abstract weights, so that an error comes of code that uses them past the program (a method bound to a layer).
    with weights_in_place(model, lambda node: abstract_weight(node)[0]):
        graph, state = nnx.split((model, list(objects.values())), graph=True)
    paths, variables = zip(*nnx.to_flat_state(state), strict=True)
    is_weight = [path[0] == 0 and tuple(path[1:]) in nodes for path in paths]

    def program(params: list[Any], others: list[Any]) -> tuple[Any, dict[int, Any]]:
        merged = nnx.merge(graph, nnx.from_flat_state(zip(paths, params, strict=True)))
        given = dict(zip([*arrays, *objects], [*others, *merged[1]], strict=True))
        before = _contents(merged)
        args, kwargs = jax.tree_util.tree_unflatten(treedef, [given[id(leaf)] for leaf in leaves])
        result = getattr(merged[0], name)(*args, **kwargs)
        after = _contents(merged)
        _check(merged, graph, result, before, after)
        if not _same(jax.tree_util.tree_flatten((args, kwargs), is_leaf=_is_object), given, leaves, treedef):
            raise NotAProgramError("it writes into a list or a dict that it was given")
        changed = {i: new for i, new in enumerate(after) if not is_weight[i] and _differ(before[i], new)}
        return result, {i: value for i, (_, _, _, value) in changed.items()}

    params = [
        nodes[tuple(path[1:])] if weight else leaf
        for path, leaf, weight in zip(paths, variables, is_weight, strict=True)
    ]
    result, changed = wrap(program, scale=scale)(params, list(arrays.values()))
    for i, value in changed.items():
        variables[i].set_raw_value(value)
    return result


Contents = tuple[Any, list[Any], Any, Any]


def _contents(tree: Any) -> list[Contents]:
    """Of each variable itself, its arrays, the structure around them, and the whole (a dict that is written to?)."""
    leaves = [leaf for _, leaf in nnx.to_flat_state(nnx.state(tree, graph=True))]
    values = [leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf for leaf in leaves]
    return [(leaf, *jax.tree_util.tree_flatten(value), value) for leaf, value in zip(leaves, values, strict=True)]


def _differ(before: Contents, after: Contents) -> bool:
    return before[2] != after[2] or any(a is not b for a, b in zip(before[1], after[1], strict=True))


def _check(merged: Any, graph: Any, result: Any, before: list[Contents], after: list[Contents]) -> None:
    if any(map(_is_object, jax.tree_util.tree_leaves(result, is_leaf=_is_object))):
        raise NotAProgramError("it returns an NNX object")
    if nnx.graphdef(merged, graph=True) != graph:
        raise NotAProgramError("it changes its structure")
    if any(a[0] is not b[0] for a, b in zip(before, after, strict=True)):
        raise NotAProgramError("it puts variables, or arrays that are attributes, in other places")


def _same(flat: Any, given: dict[int, Any], leaves: list[Any], treedef: Any) -> bool:
    return flat[1] == treedef and all(a is given[id(b)] for a, b in zip(flat[0], leaves, strict=True))


def _is_object(x: Any) -> bool:
    return isinstance(x, nnx.Pytree | nnx.Variable)
