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
from wn_jax._transform import Axes, flatten, rebuild, reparameterize

# A model is in one of two states, and a second thread must not meet the first one's.
_one_at_a_time = threading.RLock()


def with_nodes(model: Any, axes: Mapping[str, Axes | None] | Callable[[str, Any], Axes | None]) -> Any:
    """A copy of the model whose chosen weights are nodes; `axes` and errors are those of `reparameterize`."""
    model = nnx.clone(model, graph=True)
    paths, leaves, _ = flatten(reparameterize(nnx.state(model, graph=True), axes))
    nodes = {path: leaf for path, leaf in zip(paths, leaves, strict=True) if is_node(leaf)}
    return _replaced(lambda path, part: nodes.get("/".join(map(str, path)), part), model)


def with_weights(model: Any) -> Any:
    """A copy of the model whose nodes are weights."""
    shared: dict[int, Any] = {}
    return _replaced(lambda _, part: _weight(part, shared) if is_node(part) else part, nnx.clone(model, graph=True))


@contextlib.contextmanager
def weights_in_place(model: Any, weight_of: Callable[[Any], Any] = rebuild) -> Iterator[None]:
    """Weights where the nodes are, until the context ends. One that two places share stays one `Variable`."""
    with _one_at_a_time:
        places = _places(model)
        shared: dict[int, Any] = {}
        weights = [_weight(node, shared, weight_of) for _, _, node in places]
        try:
            for (owner, key, _), weight in zip(places, weights, strict=True):
                owner[key] = weight
            yield
        finally:
            for owner, key, node in places:
                owner[key] = node


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


def _places(model: Any) -> list[tuple[Any, Any, Any]]:
    """Where nodes are: `owner[key] is node`, the owner a list, a dict, or the attributes of a module.

    The attributes are reached past `__setattr__`, by which NNX refuses a change from inside a `jax.jit` that closes
    over the model: this one is undone before anybody could see it.
    """
    found = []
    for _, part in nnx.iter_graph(model, graph=True):
        owner = vars(part) if isinstance(part, nnx.Pytree) else part
        if isinstance(owner, (dict, list)):
            items = owner.items() if isinstance(owner, dict) else enumerate(owner)
            found += [(owner, key, value) for key, value in items if is_node(value)]
    return found


def _replaced(replace: Callable[[tuple[Any, ...], Any], Any], model: Any) -> Any:
    try:
        return nnx.recursive_map(replace, model, graph=True)
    except ValueError as error:
        if "does not support mutation" not in str(error):
            raise
        raise ValueError(
            f"a weight is in a container that cannot be changed, such as a tuple: {error} Keep weights in attributes, "
            "nnx.List or nnx.Dict, or leave this one out of axes."
        ) from error
