"""Small networks, and their matrices by definition: dense derivatives in float64 of formulas that are written out here.

Weights are rebuilt from nodes by `g v / ||v||` below, and not by wn_jax.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

import wn_jax as wn
from wn_jax import curvature

EXAMPLES, SIZES = 12, (8, 16, 3)  # 195 parameters, and with nodes 214

ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu}


def cross_entropies(outputs: jax.Array, batch: Any) -> jax.Array:
    return jax.nn.logsumexp(outputs, -1) - jnp.take_along_axis(outputs, batch[1][:, None], -1)[:, 0]


def squared_errors(outputs: jax.Array, batch: Any) -> jax.Array:
    return 0.5 * jnp.sum((outputs - batch[1]) ** 2, -1)


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A network and its losses, as functions of plain parameters, and parameters: plain ones or nodes."""

    apply: Callable[[Any, Any], jax.Array]
    losses_of: Callable[[jax.Array, Any], jax.Array]
    params: Any
    batch: Any

    def losses(self, params: Any, batch: Any) -> jax.Array:
        return self.losses_of(self.apply(params, batch), batch)

    def loss(self, params: Any, batch: Any) -> jax.Array:
        return jnp.mean(self.losses(params, batch))

    def mean_loss_of(self, outputs: jax.Array, batch: Any) -> jax.Array:
        return jnp.mean(self.losses_of(outputs, batch))

    def flat(self, function: Callable[[Any, Any], Any]) -> Callable[[jax.Array], Any]:
        """A function of plain parameters as one of this problem's, in a vector."""
        return lambda vector: function(by_hand(self.unravel(vector)), self.batch)

    @property
    def vector(self) -> jax.Array:
        return jax.flatten_util.ravel_pytree(self.params)[0]

    def unravel(self, vector: jax.Array) -> Any:
        return jax.flatten_util.ravel_pytree(self.params)[1](vector)

    @functools.cached_property
    def outputs(self) -> np.ndarray:
        return np.asarray(self.flat(self.apply)(self.vector))

    @functools.cached_property
    def jacobian(self) -> np.ndarray:
        """(examples, outputs, parameters)."""
        return np.asarray(jax.jit(jax.jacobian(self.flat(self.apply)))(self.vector))

    @functools.cached_property
    def gradients(self) -> np.ndarray:
        """(examples, parameters), of the losses."""
        return np.asarray(jax.jit(jax.jacobian(self.flat(self.losses)))(self.vector))

    @functools.cached_property
    def gradient(self) -> Callable[[Any, Any], Any]:
        """Of the loss, by parameters as they are, compiled."""
        return jax.jit(jax.grad(lambda params, batch: self.loss(by_hand(params), batch)))

    @functools.cached_property
    def hessian(self) -> np.ndarray:
        return np.asarray(jax.jit(jax.hessian(self.flat(self.loss)))(self.vector))

    def float32(self) -> Problem:
        params, batch = jax.tree.map(
            lambda x: x.astype(jnp.float32) if x.dtype == jnp.float64 else x, (self.params, self.batch)
        )
        return self.at(params, batch)

    def at(self, params: Any, batch: Any) -> Problem:
        return dataclasses.replace(self, params=params, batch=batch)


def by_hand(tree: Any) -> Any:
    """Weights of nodes, by the formula."""

    def weight(node: Any) -> Any:
        return node.g * node.v / jnp.sqrt(jnp.sum(node.v**2, node.axes, keepdims=True)) if is_node(node) else node

    return jax.tree.map(weight, tree, is_leaf=is_node)


def is_node(x: Any) -> bool:
    return isinstance(x, wn.WeightNorm)


@functools.cache
def problem(activation: str, loss: str, form: str) -> Problem:
    """To be called under `jax.enable_x64`. `form` is "plain" or "nodes", whose `||v||` are not their `g`."""
    random = np.random.default_rng(0)
    layers = []
    for fan_in, fan_out in itertools.pairwise(SIZES):
        kernel = random.standard_normal((fan_in, fan_out)) / np.sqrt(fan_in)
        layers.append({"kernel": jnp.asarray(kernel), "bias": jnp.asarray(random.standard_normal(fan_out) / 4)})
    x = jnp.asarray(random.standard_normal((EXAMPLES, SIZES[0])))
    classes, targets = np.arange(EXAMPLES) % SIZES[-1], random.standard_normal((EXAMPLES, SIZES[-1]))

    def apply(params: Any, batch: Any) -> jax.Array:
        hidden = batch[0]
        for layer in params[:-1]:
            hidden = ACTIVATIONS[activation](hidden @ layer["kernel"] + layer["bias"])
        return hidden @ params[-1]["kernel"] + params[-1]["bias"]

    params = layers if form == "plain" else [{**layer, "kernel": _node(layer["kernel"], random)} for layer in layers]
    losses_of, y = (cross_entropies, classes) if loss == "cross_entropy" else (squared_errors, targets)
    return Problem(apply, losses_of, params, (x, jnp.asarray(y)))


def _node(kernel: jax.Array, random: np.random.Generator) -> wn.WeightNorm:
    node = wn.WeightNorm.from_weight(kernel, -2)
    return dataclasses.replace(node, v=node.v * random.uniform(0.5, 2.0, node.g.shape))


def quadratic(params: Any, matrix: jax.Array) -> jax.Array:
    """`p'A p / 2`, whose Hessian is A."""
    vector = jax.flatten_util.ravel_pytree(params)[0]
    return vector @ matrix @ vector / 2


def relative(value: Any, expected: Any) -> float:
    """The largest difference, over the largest of the expected."""
    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    assert value.shape == expected.shape
    return float(abs(value - expected).max() / abs(expected).max())


def flat(tree: Any) -> np.ndarray:
    return np.asarray(jax.flatten_util.ravel_pytree(tree)[0])


class Recorded:
    """An operator that notes the vectors it is multiplied with, flat."""

    def __init__(self, operator: Any):
        self.operator, self.vectors = operator, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.operator, name)

    def __call__(self, vector: Any) -> Any:
        self.vectors.append(flat(vector))
        return self.operator(vector)


@functools.cache
def operator(name: str, p: Problem, batch_size: int | None = None) -> curvature.LinearOperator:
    """The matrix of this name of a problem, as the library has it."""
    if name == "hessian":
        make = curvature.hessian(wn.wrap(p.loss), batch_size)
    elif name == "gauss_newton":
        make = curvature.gauss_newton(wn.wrap(p.apply), p.mean_loss_of, batch_size)
    elif name == "fisher":
        make = curvature.fisher(wn.wrap(p.apply), "categorical", batch_size)
    else:
        make = getattr(curvature, name)(wn.wrap(p.losses), batch_size)
    return make(p.params, p.batch)


def with_spectrum(values: Any, dtype: Any = np.float64) -> curvature.LinearOperator:
    """A matrix of these eigenvalues, over a tree of three arrays; compiled once for a size."""
    values = np.asarray(values)
    basis = np.linalg.qr(np.random.default_rng(5).standard_normal((len(values), len(values))))[0]
    params = {"a": jnp.zeros((2, 3), dtype), "b": jnp.zeros((), dtype), "c": jnp.zeros(len(values) - 7, dtype)}
    return _quadratic(params, jnp.asarray((basis * values) @ basis.T, dtype))


_quadratic = curvature.hessian(quadratic)
