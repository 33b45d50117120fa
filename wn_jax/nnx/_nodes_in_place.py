"""NNX models that hold nodes: putting them in, and the weights in their place while the model runs.

A weight's attribute (`layer.kernel`) holds a `WeightNorm` node whose `g` and `v` are `nnx.Param`s, so that NNX finds
two parameters there. While one of the model's methods runs, the attribute holds an `nnx.Param` with the weight
instead: all code of the model, at any depth, sees what it saw before, and whatever else it changes (statistics,
random keys, caches, attributes) is changed on the model itself, not on a copy. Which thread may do so is `_turns`'s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from flax import nnx

from wn_jax._boxes import is_box
from wn_jax._node import Node, is_node
from wn_jax._transform import reparameterize
from wn_jax._tree import flatten, rebuild
from wn_jax._types import AxesRule, KeyPath, Leaf
from wn_jax.nnx._turns import turn

Model = TypeVar("Model", bound=nnx.Module)


def with_nodes(model: Model, axes: AxesRule) -> Model:
    """A copy of the model whose chosen weights are nodes; `axes` and errors are those of `reparameterize`."""
    model = nnx.clone(model, graph=True)
    state = nnx.state(model, graph=True)
    paths, leaves, _ = flatten(state)
    _, new, _ = flatten(reparameterize(state, axes))
    nodes = {id(leaf): node for leaf, node in zip(leaves, new, strict=True) if is_node(node)}

    if lost := set(nodes) - _replace(model, lambda value: nodes.get(id(value), value)):
        where = ", ".join(path for path, leaf in zip(paths, leaves, strict=True) if id(leaf) in lost)
        raise ValueError(
            f"nothing can be put in the place of {where}, as it is in a container that cannot be changed, such as a "
            "tuple. Keep weights in attributes, nnx.List or nnx.Dict, or leave this one out of axes"
        )
    return model


def rebuilt_copy(model: Model) -> Model:
    """A copy of the model whose nodes are weights."""
    with turn(model):
        model = nnx.clone(model, graph=True)
    weights: dict[int, Leaf] = {}
    _replace(model, lambda value: _rebuilt_once(value, weights, rebuild) if is_node(value) else value)
    return model


@contextlib.contextmanager
def rebuilt_in_place(model: nnx.Module, weight_of: Callable[[Node], Leaf] = rebuild) -> Iterator[None]:
    """Weights where the nodes are, until the context ends. One that two places share stays one `Variable`.

    What the model moves to another place in the meantime moves with its node.
    """
    weights: dict[int, Leaf] = {}
    nodes: dict[int, Node] = {}

    def to_weight(value: Leaf) -> Leaf:
        if not is_node(value):
            return value
        weight = _rebuilt_once(value, weights, weight_of)
        nodes[id(weight)] = value
        return weight

    with turn(model):
        try:
            _replace(model, to_weight)
            yield
        finally:
            _replace(model, lambda value: nodes.get(id(value), value))


def nodes_of(model: nnx.Module) -> dict[KeyPath, Node]:
    """The nodes by their paths in `nnx.state(model)`, where a shared one has one path."""
    found: dict[int, tuple[KeyPath, Node]] = {}
    with turn(model):
        for path, part in nnx.iter_graph(model, graph=True):
            if is_node(part):
                found.setdefault(_identity(part), (path, part))
    return dict(found.values())


def _rebuilt_once(node: Node, weights: dict[int, Leaf], weight_of: Callable[[Node], Leaf]) -> Leaf:
    """The node's weight, out of `weights` where another place shares it."""
    key = _identity(node)
    if key not in weights:
        weights[key] = weight_of(node)
    return weights[key]


def _identity(node: Node) -> int:
    """The identity of a node, to find places that share it.

    It is that of `v`: NNX makes new nodes when it merges a graph, around the same `Variable`s.
    """
    v = getattr(node, "v", None)
    return id(v if is_box(v) else node)


def _replace(model: nnx.Module, new: Callable[[Leaf], Leaf]) -> set[int]:
    """Put `new(value)` in the place of every value in a module, list or dict; the ids of those that gave way.

    Attributes are reached past `__setattr__`, by which NNX refuses a change from inside a `jax.jit` that closes over
    the model: here it is undone before anybody could see it, or made in a copy.
    """
    gone: set[int] = set()
    for _, part in list(nnx.iter_graph(model, graph=True)):
        owner: dict[Any, Leaf] | list[Leaf] = vars(part) if isinstance(part, nnx.Pytree) else part
        if not isinstance(owner, dict | list):
            continue
        for key, value in list(owner.items() if isinstance(owner, dict) else enumerate(owner)):
            if (other := new(value)) is not value:
                owner[key] = other
                gone.add(id(value))
    return gone
