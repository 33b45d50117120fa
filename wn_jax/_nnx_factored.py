"""Running an NNX model by its program, so that each scale can go where it is cheap, as `wn_jax.wrap` does.

The model is taken apart, its program is read and run, and what it changed on the way (statistics, random keys) is put
into it. That is for models that keep their structure and can be traced.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from wn_jax._nnx_weights import weights_in_place
from wn_jax._transform import abstract_weight
from wn_jax._wrap import wrap


class NotAProgramError(Exception):
    """The model does what a program of arrays does not tell."""


def is_traced(*trees: Any) -> bool:
    """Whether a transformation such as `jit` looks on; eagerly, reading a program costs more than it saves."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree_util.tree_leaves(trees))


def run_factored(model: Any, nodes: dict[Any, Any], name: str, args: Any, kwargs: Any, scale: str) -> Any:
    """`model.name(*args, **kwargs)`, the model holding `nodes` at their paths.

    Raises:
        Exception: of any kind, where it cannot be done. Nothing was changed then.
    """
    leaves, treedef = jax.tree_util.tree_flatten((args, kwargs), is_leaf=_is_object)
    objects = {i: leaf for i, leaf in enumerate(leaves) if _is_object(leaf)}
    others = [None if i in objects else leaf for i, leaf in enumerate(leaves)]
    # Abstract weights, so that an error comes of code that uses them past the program (a method bound to a layer).
    with weights_in_place(model, lambda node: abstract_weight(node)[0]):
        graph, state = nnx.split((model, objects), graph=True)
    paths, variables = zip(*nnx.to_flat_state(state), strict=True)
    is_weight = [path[0] == 0 and tuple(path[1:]) in nodes for path in paths]

    def program(params: list[Any], others: list[Any]) -> tuple[Any, dict[int, Any]]:
        model, objects = nnx.merge(graph, nnx.from_flat_state(zip(paths, params, strict=True)))
        before = _contents((model, objects))
        args, kwargs = jax.tree_util.tree_unflatten(treedef, [objects.get(i, leaf) for i, leaf in enumerate(others)])
        result = getattr(model, name)(*args, **kwargs)
        if any(map(_is_object, jax.tree_util.tree_leaves(result, is_leaf=_is_object))):
            raise NotAProgramError("it returns an NNX object")
        if nnx.graphdef((model, objects), graph=True) != graph:
            raise NotAProgramError("it changes its structure")
        after = _contents((model, objects))
        return result, {i: new[2] for i, new in enumerate(after) if not is_weight[i] and _differ(before[i], new)}

    params = [
        nodes[tuple(path[1:])] if weight else leaf
        for path, leaf, weight in zip(paths, variables, is_weight, strict=True)
    ]
    result, changed = wrap(program, scale=scale)(params, others)
    for i, value in changed.items():
        variables[i].set_raw_value(value)
    return result


def _is_object(x: Any) -> bool:
    return isinstance(x, nnx.Pytree | nnx.Variable)


def _contents(tree: Any) -> list[tuple[list[Any], Any, Any]]:
    """Of each variable its arrays, the structure around them, and the whole, which may be a dict that is written to."""
    values = [variable.get_raw_value() for _, variable in nnx.to_flat_state(nnx.state(tree, graph=True))]
    return [(*jax.tree_util.tree_flatten(value), value) for value in values]


def _differ(before: tuple[list[Any], Any, Any], after: tuple[list[Any], Any, Any]) -> bool:
    return before[1] != after[1] or any(a is not b for a, b in zip(before[0], after[0], strict=True))
