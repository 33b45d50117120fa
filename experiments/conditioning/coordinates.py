"""Parametrizations of one network, each at the same function: plain, weight norm, and with batch normalization.

A batch-normalized network is, on one batch, a plain network whose weights depend on its own parameters and on that
batch. So all of them are ways to write the plain network's weights.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import wn_jax as wn
from experiments.parametrizations import Axes
from experiments.tasks import Examples, Params, Task
from wn_jax.linen import MeanOnlyBatchNorm

_LAYERS = (nn.Dense, nn.Conv)
_NORMALIZATIONS = (nn.BatchNorm, MeanOnlyBatchNorm)


@dataclasses.dataclass(frozen=True)
class Coordinates:
    """A way to write a plain network's weights."""

    name: str
    """The name in figures."""

    start: Callable[[Params, Examples], Params]
    """`(plain params, examples) -> params`, those that stand for these weights."""

    predict: Callable[[Params, Examples], Any]
    """`(params, examples) -> outputs`."""

    weights: Callable[[Params, Examples], Params]
    """`(params, examples) -> plain params`, the inverse of `start`."""


def plain(task: Task) -> Coordinates:
    """The weights themselves."""
    return Coordinates("plain", lambda params, _: params, _predict(task), lambda params, _: params)


def weight_norm(task: Task, axes: Axes, norms: tuple[float, ...]) -> list[Coordinates]:
    """Weight normalization with `v = w`, and with one `||v||` for all vectors of a layer.

    Arguments:
        task: the plain network's.
        axes: the reduction axes of its weights.
        norms: the values of `||v||`, as multiples of the root mean square of the layer's `||w||`.

    Returns:
        The parametrizations. They have the functions `predict` and `weights` in common, so that these compile once.
    """
    predict = wn.wrap(_predict(task))

    def weights(params: Params, _: Examples) -> Params:
        return wn.reconstruct(params)

    def as_it_is(params: Params, _: Examples) -> Params:
        return wn.reparameterize(params, axes)

    def at(norm: float) -> Coordinates:
        def start(params: Params, _: Examples) -> Params:
            return _with_one_norm(wn.reparameterize(params, axes), norm)

        return Coordinates(f"weight norm, ‖v‖ = {norm:.12g} rms‖w‖", start, predict, weights)

    return [Coordinates("weight norm, v = w", as_it_is, predict, weights), *map(at, norms)]


def batch_norm(plain_task: Task, task: Task, axes: Axes) -> Coordinates:
    """Batch normalization. At the start, its scale and its bias undo the batch's own statistics."""
    return _normalized("batch norm", plain_task, task, axes, mean_only=False)


def weight_norm_mean_only(plain_task: Task, task: Task, axes: Axes) -> Coordinates:
    """Weight norm, `||v|| = ||w||`, with mean-only batch normalization."""
    return _normalized("weight norm + mean-only batch norm", plain_task, task, axes, mean_only=True)


def _normalized(name: str, plain_task: Task, task: Task, axes: Axes, mean_only: bool) -> Coordinates:
    """A normalized network. A normalization comes after a layer, and takes the place of its bias."""

    def start(params: Params, examples: Examples) -> Params:
        normalized = _normalizations(task, examples)
        outputs = _layer_outputs(plain_task, params, examples)
        written = dict(params)
        for layer, normalization in normalized.items():
            written[layer] = {"kernel": params[layer]["kernel"]}
            written[normalization] = {"bias": _mean(outputs[layer])}
            if not mean_only:
                written[normalization]["scale"] = _deviation(outputs[layer])
        return wn.reparameterize(written, axes) if mean_only else written

    def weights(params: Params, examples: Examples) -> Params:
        params = wn.reconstruct(params)
        normalized = _normalizations(task, examples)
        outputs = _layer_outputs(task, params, examples)
        written = {name: value for name, value in params.items() if name not in normalized.values()}
        for layer, normalization in normalized.items():
            scale = 1 if mean_only else params[normalization]["scale"] / _deviation(outputs[layer])
            bias = params[normalization]["bias"] - scale * _mean(outputs[layer])
            written[layer] = {"kernel": params[layer]["kernel"] * scale, "bias": bias}
        return written

    return Coordinates(name, start, wn.wrap(_predict(task)), weights)


def _predict(task: Task) -> Callable[[Params, Examples], Any]:
    """A network in training as a function of its parameters and of examples alone."""

    def predict(params: Params, examples: Examples) -> Any:
        return task.predict(params, _first_state(task, examples), examples, jax.random.key(0))[0]

    return predict


def _first_state(task: Task, examples: Examples) -> Any:
    """A network's running averages, on which nothing in training depends."""
    state = jax.eval_shape(lambda examples: task.init(jax.random.key(0), examples)[1], examples)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)


def _with_one_norm(params: Params, norm: float) -> Params:
    """The nodes with all `v` of a layer at one norm, in units of the root mean square of its `g`."""

    def scaled(x: Any) -> Any:
        if not isinstance(x, wn.WeightNorm):
            return x
        length = norm * jnp.sqrt(jnp.mean(jnp.square(x.g)))
        # Here g is ||w|| and ||v||. Where w is 0, g is 0, and v has norm 1.
        factor = jnp.where(x.g > 0, length / x.g, length)
        return dataclasses.replace(x, v=x.v * factor)

    return jax.tree.map(scaled, params, is_leaf=lambda x: isinstance(x, wn.WeightNorm))


def _layer_outputs(task: Task, params: Params, examples: Examples) -> dict[str, jax.Array]:
    """The output of each dense and convolutional layer, by its name."""
    outputs: dict[str, jax.Array] = {}

    def look(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        result = call(*args, **kwargs)
        if context.method_name == "__call__" and isinstance(context.module, _LAYERS):
            outputs[str(context.module.name)] = result
        return result

    with nn.intercept_methods(look):
        _predict(task)(params, examples)
    return outputs


def _normalizations(task: Task, examples: Examples) -> dict[str, str]:
    """The name of the module that normalizes a layer, by the layer's: the module that is called next."""
    calls: list[Any] = []

    def look(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name == "__call__" and isinstance(context.module, _LAYERS + _NORMALIZATIONS):
            calls.append(context.module)
        return call(*args, **kwargs)

    with nn.intercept_methods(look):
        jax.eval_shape(lambda examples: task.init(jax.random.key(0), examples), examples)
    pairs = itertools.pairwise(calls)
    return {str(one.name): str(other.name) for one, other in pairs if isinstance(other, _NORMALIZATIONS)}


def _mean(outputs: jax.Array) -> jax.Array:
    """The mean of each feature over the batch."""
    return outputs.mean(axis=tuple(range(outputs.ndim - 1)))


def _deviation(outputs: jax.Array) -> jax.Array:
    """The deviation of each feature over the batch, as batch normalization divides by it."""
    return jnp.sqrt(outputs.var(axis=tuple(range(outputs.ndim - 1))) + nn.BatchNorm.epsilon)
