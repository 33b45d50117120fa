"""From an NNX model with nodes to trees in which the functional tools see them, and back.

NNX looks into a node and finds two parameters, `g` and `v`: in `nnx.state(model)` and in what an `nnx.Optimizer`
hands to optax there are no nodes, and `wn_jax.labels` would call everything `'other'`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from wn_jax._boxes import unbox
from wn_jax._by_path import ByPath
from wn_jax._calls import check_count, check_function
from wn_jax._data_init import init_from_data as _init_from_data
from wn_jax._node import WeightNorm, is_node
from wn_jax._types import KeyPath, Leaf, Params, PyTree
from wn_jax._uses import infer_axes as _infer_axes
from wn_jax.nnx._nodes_in_place import nodes_of, rebuilt_copy
from wn_jax.nnx._turns import turn
from wn_jax.nnx._weight_normed import WeightNormed

Tree = TypeVar("Tree")


@functools.partial(check_count, most=1)
def infer_axes(fn: Callable[..., Any]) -> Callable[..., dict[str, tuple[int, ...]]]:
    """`wn_jax.infer_axes` for a function of an NNX model: `infer_axes(fn)(model, *args, **kwargs)`.

    Layers and weights that are used in several places count once, by the path that `nnx.state` gives them.

    >>> import jax.numpy as jnp
    >>> infer_axes(lambda model, x: model(x))(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((4, 3)))
    {'kernel': (-2,)}
    """
    check_function("infer_axes", fn)

    def axes(model: nnx.Module, *args: Any, **kwargs: Any) -> dict[str, tuple[int, ...]]:
        graph, params = split(model)
        return _infer_axes(_merged(fn, graph))(params, *args, **kwargs)

    return axes


def init_from_data(
    fn: Callable[..., Any], init_scale: ByPath[float] = 1.0, zeros: Literal["keep", "set"] = "keep"
) -> Callable[..., Any]:
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
    check_function("init_from_data", fn, init_scale, zeros)

    def initialized(model: nnx.Module, *args: Any, **kwargs: Any) -> nnx.Module:
        graph, params = split(model)
        if not nodes_of(model):
            raise ValueError("init_from_data found no WeightNorm node in the model; wrap it in a WeightNormed first")
        model = nnx.clone(model, graph=True)
        update(model, _init_from_data(_merged(fn, graph), init_scale, zeros=zeros)(params, *args, **kwargs))
        return model

    return initialized


def split(model: nnx.Module) -> tuple[nnx.GraphDef[Any], nnx.State]:
    """The graph of the model with plain weights, and its state with nodes in it.

    `graph, params = split(wrapped)` is as `nnx.split`, but for the nodes. They are for `wn_jax.wrap` (which places each
    scale where it is cheap), `wn_jax.curvature`, `wn_jax.labels` and all else that is about nodes.
    `nnx.merge(graph, wn_jax.reconstruct(params))` is the plain model. `update` takes changes back.

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


def update(model: nnx.Module, params: nnx.State) -> None:
    """Put the values of a state into the model: of one as `split` returns it, or of a part of one.

    Raises:
        TypeError: `params` is no state.
        ValueError: `params` holds something that the model does not have, or of another shape. The model stays as
            it is.
    """
    if not isinstance(params, nnx.State):
        raise TypeError(f"update takes a state, as the second of what split returns; got a {type(params).__name__}")
    inner = _inner(model)
    new = jax.tree.map(_unpacked, params, is_leaf=is_node)
    with turn(inner):
        _check_is_known(new, nnx.state(inner))
        nnx.update(inner, new)


def on_nodes(tx: optax.GradientTransformation, model: nnx.Module) -> optax.GradientTransformationExtraArgs:
    """An optax rule that sees nodes where the optimizer of an NNX model hands it two parameters each.

    `nnx.Optimizer(model, on_nodes(tx, model), wrt=nnx.Param)` is for rules that treat `g` and `v` in ways of their own,
    by `wn_jax.labels` or `wn_jax.optim`. Those that treat all parameters alike need it not.

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

    def init(params: optax.Params) -> optax.OptState:
        return tx.init(_packed(params, axes))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        params = None if params is None else _packed(params, axes)
        updates, state = tx.update(_packed(updates, axes), state, params, **extra)
        return jax.tree.map(_unpacked, updates, is_leaf=is_node), state

    return optax.GradientTransformationExtraArgs(init, update)


def _inner(model: nnx.Module) -> nnx.Module:
    """The model in a `WeightNormed`, or the model itself."""
    if not isinstance(model, nnx.Module):
        raise TypeError(f"expected a WeightNormed, or another NNX module; got a {type(model).__name__}")
    return model.model if isinstance(model, WeightNormed) else model


def _merged(fn: Callable[..., Any], graph: nnx.GraphDef[Any]) -> Callable[..., Any]:
    """`fn`, a function of a model, as a function of its state."""
    return lambda params, *args, **kwargs: fn(nnx.merge(graph, params), *args, **kwargs)


def _check_is_known(state: nnx.State, known: nnx.State) -> None:
    """Raises where `state` has a leaf that `known` has not, or has in another shape."""
    shapes = {tuple(path): jnp.shape(unbox(leaf)) for path, leaf in nnx.to_flat_state(known)}
    for path, leaf in nnx.to_flat_state(state):
        shape, found = jnp.shape(unbox(leaf)), shapes.get(tuple(path), "nothing")
        if shape != found:
            name = "/".join(map(str, path))
            raise ValueError(
                f"update: {name!r} has shape {shape} in params, and the model has {found} there; the paths are those "
                "of wn_jax.nnx.split(model)"
            )


def _copied(leaf: Tree) -> Tree:
    """The same arrays in `Variable`s of their own, as JAX builds new ones when it maps over a tree."""
    return jax.tree.map(lambda x: x, leaf)


def _packed(state: Params, axes: Mapping[KeyPath, tuple[int, ...]]) -> nnx.State:
    """A nested state in which `g` and `v` of a node, where both are there, are a node."""
    flat = {tuple(path): leaf for path, leaf in nnx.to_flat_state(state)}
    for path, reduced in axes.items():
        if (*path, "g") in flat and (*path, "v") in flat:
            flat[path] = WeightNorm(flat.pop((*path, "g")), flat.pop((*path, "v")), reduced)
    return nnx.from_flat_state(flat.items())


def _unpacked(leaf: Leaf) -> PyTree:
    """A node as NNX has it, a mapping from key to child; any other leaf as it is."""
    if not is_node(leaf):
        return leaf
    children = jax.tree.leaves_with_path(leaf, is_leaf=lambda x: x is not leaf)
    return {key.name: _unpacked(child) for (key,), child in children}  # which may be a node itself
