"""NNX models that hold nodes: putting them in, and the weights in their place while the model runs.

A weight's attribute (`layer.kernel`) holds a `WeightNorm` node whose `g` and `v` are `nnx.Param`s, so that NNX finds
two parameters there. While one of the model's methods runs, the attribute holds an `nnx.Param` with the weight
instead: all code of the model, at any depth, sees what it saw before, and whatever else it changes (statistics,
random keys, caches, attributes) is changed on the model itself, not on a copy.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flax import nnx

from wn_jax._boxes import is_box
from wn_jax._node import is_node
from wn_jax._transform import reparameterize
from wn_jax._tree import flatten, rebuild
from wn_jax._types import Axes

# A model is in one of two states, and a second thread must not meet the first one's.
_one_at_a_time = threading.RLock()


def with_nodes(model: Any, axes: Mapping[str, Axes | None] | Callable[[str, Any], Axes | None]) -> Any:
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


def with_weights(model: Any) -> Any:
    """A copy of the model whose nodes are weights."""
    model, shared = nnx.clone(model, graph=True), dict[int, Any]()
    _replace(model, lambda value: _weight(value, shared) if is_node(value) else value)
    return model


@contextlib.contextmanager
def weights_in_place(model: Any, weight_of: Callable[[Any], Any] = rebuild) -> Iterator[None]:
    """Weights where the nodes are, until the context ends. One that two places share stays one `Variable`.

    What the model moves to another place in the meantime moves with its node.
    """
    with _one_at_a_time:
        shared, nodes = dict[int, Any](), dict[int, Any]()

        def weight(value: Any) -> Any:
            if not is_node(value):
                return value
            made = _weight(value, shared, weight_of)
            nodes[id(made)] = value
            return made

        try:
            _replace(model, weight)
            yield
        finally:
            _replace(model, lambda value: nodes.get(id(value), value))


def nodes_of(model: Any) -> dict[tuple[Any, ...], Any]:
    """The nodes by their paths in `nnx.state(model)`, where a shared one has one path."""
    found: dict[int, tuple[tuple[Any, ...], Any]] = {}
    for path, part in nnx.iter_graph(model, graph=True):
        if is_node(part):
            found.setdefault(_identity(part), (path, part))
    return dict(found.values())


def _weight(node: Any, shared: dict[int, Any], weight_of: Callable[[Any], Any] = rebuild) -> Any:
    key = _identity(node)
    if key not in shared:
        shared[key] = weight_of(node)
    return shared[key]


def _identity(node: Any) -> int:
    """What tells whether two places share a weight: NNX makes new nodes when it merges a graph, around the same `v`."""
    v = getattr(node, "v", None)
    return id(v if is_box(v) else node)


def _replace(model: Any, new: Callable[[Any], Any]) -> set[int]:
    """Put `new(value)` in the place of every value in a module, list or dict; returns the ids of those that gave way.

    Attributes are reached past `__setattr__`, by which NNX refuses a change from inside a `jax.jit` that closes over
    the model: here it is undone before anybody could see it, or made in a copy.
    """
    gone = set()
    for _, part in list(nnx.iter_graph(model, graph=True)):
        owner: Any = vars(part) if isinstance(part, nnx.Pytree) else part
        if isinstance(owner, (dict, list)):
            for key, value in list(owner.items() if isinstance(owner, dict) else enumerate(owner)):
                if (other := new(value)) is not value:
                    owner[key] = other
                    gone.add(id(value))
    return gone
