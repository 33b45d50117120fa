"""From an NNX model with nodes to trees in which the functional tools see them, and back.

NNX looks into a node and finds two parameters, `g` and `v`: in `nnx.state(model)` and in what an `nnx.Optimizer`
hands to optax there are no nodes, and `wn_jax.labels` would call everything `'other'`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from wn_jax._boxes import unbox
from wn_jax._data_init import init_from_data as _init_from_data
from wn_jax._node import WeightNorm, is_node
from wn_jax._program.reading import check_callable
from wn_jax._uses import infer_axes as _infer_axes
from wn_jax.nnx._nodes_in_place import nodes_of, rebuilt_copy
from wn_jax.nnx._turns import turn
from wn_jax.nnx._weight_normed import WeightNormed


def infer_axes(fn: Callable[..., Any]) -> Callable[..., dict[str, tuple[int, ...]]]:
    """`wn_jax.infer_axes` for a function of an NNX model: `infer_axes(fn)(model, *args, **kwargs)`.

    Layers and weights that are used in several places count once, by the path that `nnx.state` gives them.

    >>> import jax.numpy as jnp
    >>> infer_axes(lambda model, x: model(x))(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((4, 3)))
    {'kernel': (-2,)}
    """
    check_callable("infer_axes", fn)

    def axes(model: Any, *args: Any, **kwargs: Any) -> dict[str, tuple[int, ...]]:
        graph, params = split(model)
        return _infer_axes(_merged(fn, graph))(params, *args, **kwargs)

    return axes


def init_from_data(fn: Callable[..., Any], init_scale: float = 1.0) -> Callable[..., Any]:
    """`wn_jax.init_from_data` for a function of an NNX model: `init_from_data(fn)(wrapped, *args, **kwargs)`.

    Returns:
        A function that returns a copy of the model, with `g` and biases from the batch. It raises what
        `wn_jax.init_from_data` does.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[1.0], [2.0], [6.0]])
    >>> wrapped = WeightNormed(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), {"kernel": -2})
    >>> wrapped = init_from_data(lambda model, x: model(x))(wrapped, x)
    >>> bool(abs(wrapped(x).mean()) < 1e-6), bool(abs(wrapped(x).std() - 1) < 1e-6)
    (True, True)
    """
    check_callable("init_from_data", fn)

    def initialized(model: Any, *args: Any, **kwargs: Any) -> Any:
        graph, params = split(model)
        if not nodes_of(model):
            raise ValueError("init_from_data found no WeightNorm node in the model; wrap it in a WeightNormed first")
        model = nnx.clone(model, graph=True)
        update(model, _init_from_data(_merged(fn, graph), init_scale)(params, *args, **kwargs))
        return model

    return initialized


def split(model: Any) -> tuple[Any, Any]:
    """`nnx.split` of the model with plain weights, but nodes in the state: `graph, params = split(wrapped)`.

    For `wn_jax.wrap` (which places each scale where it is cheap), `wn_jax.curvature`, `wn_jax.labels` and all else
    that is about nodes. `nnx.merge(graph, wn_jax.reconstruct(params))` is the plain model. `update` takes changes
    back.

    >>> import jax.numpy as jnp, wn_jax as wn
    >>> wrapped = WeightNormed(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), {"kernel": -2})
    >>> graph, params = split(wrapped)
    >>> apply = wn.wrap(lambda params, x: nnx.merge(graph, params)(x))
    >>> bool(jnp.allclose(jax.jit(apply)(params, jnp.ones((1, 3))), wrapped(jnp.ones((1, 3)))))
    True
    """
    inner = _inner(model)
    with turn(inner):
        nodes = nodes_of(inner)
        graph, state = nnx.split(rebuilt_copy(inner), graph=True)
        flat = [(path, _copied(nodes.get(tuple(path), leaf))) for path, leaf in nnx.to_flat_state(state)]
    return graph, nnx.from_flat_state(flat)


def update(model: Any, params: Any) -> None:
    """Put the values of `params`, a state as `split` returns it (or a part of one), into the model.

    Raises:
        TypeError: `params` is no state.
        ValueError: `params` holds something that the model does not have, or of another shape. The model stays as
            it is.
    """
    if not isinstance(params, nnx.State):
        raise TypeError(f"update takes a state, as the second of what split returns; got a {type(params).__name__}")
    new = jax.tree_util.tree_map(_unpacked, params, is_leaf=is_node)
    known = {tuple(path): jnp.shape(unbox(leaf)) for path, leaf in nnx.to_flat_state(nnx.state(_inner(model)))}
    for path, leaf in nnx.to_flat_state(new):
        shape, found = jnp.shape(unbox(leaf)), known.get(tuple(path), "nothing")
        if shape != found:
            name = "/".join(map(str, path))
            raise ValueError(
                f"update: {name!r} has shape {shape} in params, and the model has {found} there; the paths are those "
                "of wn_jax.nnx.split(model)"
            )
    nnx.update(_inner(model), new)


def on_nodes(tx: optax.GradientTransformation, model: Any) -> optax.GradientTransformationExtraArgs:
    """An optax rule that sees nodes: `nnx.Optimizer(model, on_nodes(tx, model), wrt=nnx.Param)`.

    For rules that treat `g` and `v` in ways of their own, by `wn_jax.labels` or `wn_jax.optim`. Those that treat all
    parameters alike need it not.

    Arguments:
        tx: any optax rule.
        model: the model that it updates: a `WeightNormed`, or a module that has some within.

    Raises:
        ValueError: the model has no `WeightNorm` node.

    >>> import jax.numpy as jnp, wn_jax as wn
    >>> model = WeightNormed(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), {"kernel": -2})
    >>> tx = optax.partition({"g": optax.set_to_zero(), "v": optax.sgd(0.1), "other": optax.sgd(0.1)}, wn.labels)
    >>> optimizer = nnx.Optimizer(model, on_nodes(tx, model), wrt=nnx.Param)
    >>> g, v = model.model.kernel.g[...], model.model.kernel.v[...]
    >>> _ = optimizer.update(model, nnx.grad(lambda model: jnp.sum(model(jnp.ones((1, 3))) ** 2))(model))
    >>> bool((model.model.kernel.g[...] == g).all()), bool((model.model.kernel.v[...] == v).all())
    (True, False)
    """
    axes = {path: node.axes for path, node in nodes_of(model).items() if isinstance(node, WeightNorm)}
    if not axes:
        raise ValueError("on_nodes found no WeightNorm node in the model; wrap it in a WeightNormed first")
    tx = optax.with_extra_args_support(tx)

    def init(params: Any) -> Any:
        return tx.init(_packed(params, axes))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        params = None if params is None else _packed(params, axes)
        updates, state = tx.update(_packed(updates, axes), state, params, **extra)
        return jax.tree_util.tree_map(_unpacked, updates, is_leaf=is_node), state

    return optax.GradientTransformationExtraArgs(init, update)


def _inner(model: Any) -> Any:
    """The model in a `WeightNormed`."""
    if not isinstance(model, nnx.Module):
        raise TypeError(f"expected a WeightNormed, or another NNX module; got a {type(model).__name__}")
    return model.model if isinstance(model, WeightNormed) else model


def _merged(fn: Callable[..., Any], graph: Any) -> Callable[..., Any]:
    return lambda params, *args, **kwargs: fn(nnx.merge(graph, params), *args, **kwargs)


def _copied(leaf: Any) -> Any:
    """The same arrays in `Variable`s of their own."""
    return jax.tree_util.tree_map(lambda x: x, leaf)


def _packed(state: Any, axes: dict[tuple[Any, ...], tuple[int, ...]]) -> Any:
    """A nested state in which `g` and `v` of a node, where both are there, are a node."""
    flat = {tuple(path): leaf for path, leaf in nnx.to_flat_state(state)}
    for path, reduced in axes.items():
        if (*path, "g") in flat and (*path, "v") in flat:
            flat[path] = WeightNorm(flat.pop((*path, "g")), flat.pop((*path, "v")), reduced)
    return nnx.from_flat_state(flat.items())


def _unpacked(leaf: Any) -> Any:
    """What NNX has where a node is: a mapping from key to child."""
    if not is_node(leaf):
        return leaf
    children, _ = jax.tree_util.tree_flatten_with_path(leaf, is_leaf=lambda x: x is not leaf)
    return {key.name: child for (key,), child in children}
