"""The work of a row with a network of any JAX library: steps of training and forward passes, compiled."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.arms import Arm
from experiments.bench.networks import Recurrent
from experiments.bench.rows import MEMBERS, PARTS, Row

LEARNING_RATE = 1e-3

Apply = Callable[[Any, jax.Array], jax.Array]
"""`(params, x) -> output`."""

Gradient = Callable[[Any, jax.Array], Any]
"""`(params, x) -> gradient`."""

Update = Callable[[Any, Any], Any]
"""`(params, gradient) -> params`."""


class JaxOps:
    """The operations of networks between layers. `channels` is their axis in images and sounds."""

    def __init__(self, channels: int = -1) -> None:
        self.first = channels == 1

    relu, tanh = staticmethod(jax.nn.relu), staticmethod(jnp.tanh)

    def leaky_relu(self, x: jax.Array, slope: float) -> jax.Array:
        return jax.nn.leaky_relu(x, slope)

    def gelu(self, x: jax.Array) -> jax.Array:
        return jax.nn.gelu(x)

    def max_pool(self, x: jax.Array) -> jax.Array:
        window = (1, 1, 2, 2) if self.first else (1, 2, 2, 1)
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")

    def mean(self, x: jax.Array) -> jax.Array:
        return x.mean((2, 3) if self.first else (1, 2))

    def rms_norm(self, x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)

    def attention(self, query: jax.Array, key: jax.Array, value: jax.Array, heads: int) -> jax.Array:
        split = (*query.shape[:-1], heads, query.shape[-1] // heads)
        mixed = jax.nn.dot_product_attention(*(x.reshape(split) for x in (query, key, value)), is_causal=True)
        return mixed.reshape(query.shape)


def carry(layer: Recurrent, x: jax.Array) -> Any:
    """The state that a recurrent layer begins with, in the dtype of its input."""
    zeros = jnp.zeros((len(x), layer.features), x.dtype)
    return (zeros, zeros) if layer.kind == "lstm" else zeros


def inputs(row: Row, channels_first: bool = False) -> jax.Array:
    """A batch; for an accumulation, one for each part, along a leading axis."""
    network = row.build()
    parts = (PARTS,) if row.work == "accumulate" else ()
    shape = (*parts, row.batch, *network.input)
    x = jax.random.normal(jax.random.key(0), shape, row.dtype)
    return jnp.moveaxis(x, -1, -len(network.input)) if channels_first and network.spatial else x


def cast(params: Any, dtype: str) -> Any:
    """The parameters, with arrays of floating-point numbers in a dtype."""

    def own(leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(own, params)


def members(row: Row, make: Callable[[jax.Array], Any]) -> Any:
    """The parameters that `make` makes of a random key; of an ensemble, stacked."""
    key = jax.random.key(1)
    params = jax.vmap(make)(jax.random.split(key, MEMBERS)) if row.work == "ensemble" else make(key)
    return cast(params, row.dtype)


def of_members(row: Row, apply: Apply) -> Apply:
    """The function of one network, or of an ensemble on one batch."""
    return jax.vmap(apply, (0, None)) if row.work == "ensemble" else apply


def arm(
    name: str,
    against: str,
    row: Row,
    apply: Apply,
    params: Any,
    x: jax.Array,
    gradient: Gradient | None = None,
    update: Update | None = None,
) -> Arm:
    """An arm that trains, or applies, a function of parameters.

    Arguments:
        name: the arm's name.
        against: the name of the arm that it is compared with.
        row: the row.
        apply: the function.
        params: its parameters; with a `gradient` or an `update` of the arm's own, any state that these take.
        x: a batch.
        gradient: the gradient of a step. Default: that of the mean square of the output.
        update: the update of a step. Default: gradient descent.
    """
    step = work(row, apply, gradient, update)
    donated = () if row.work == "serve" else (0,)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (params, x))

    def compiled() -> tuple[Any, float]:
        jax.clear_caches()  # JAX remembers what it has traced, and the functions inside of it, too
        start = time.perf_counter()
        program = jax.jit(lambda params, x: step(params, x), donate_argnums=donated).lower(*shapes).compile()
        return program, time.perf_counter() - start

    program, _ = compiled()
    state = [jax.tree.map(jnp.array, params)]  # a step gives up its parameters, and arms may share arrays

    def run(steps: int) -> None:
        for _ in range(steps):
            result = program(state[0], x)
            if donated:
                state[0] = result
            else:
                jax.block_until_ready(result)  # each answer is waited for; a step of training is not
        jax.block_until_ready(result)

    return Arm(name, against, run, lambda: compiled()[1], _peak(program), deviation(row, apply, params, x))


def work(row: Row, apply: Apply, gradient: Gradient | None, update: Update | None) -> Callable[[Any, jax.Array], Any]:
    """The function that a row runs in a step: `(params, x) -> params`, or the output where it serves."""
    if row.work == "serve":
        return apply
    gradient = gradient or (accumulated(apply) if row.work == "accumulate" else jax.grad(loss(apply)))
    update = update or sgd
    return lambda params, x: update(params, gradient(params, x))


def loss(apply: Apply) -> Callable[[Any, jax.Array], jax.Array]:
    """The loss of all arms: the mean square of the output."""
    return lambda params, x: jnp.mean(jnp.square(apply(params, x)))


def accumulated(apply: Apply) -> Gradient:
    """The mean of the gradients of microbatches, one after the other."""

    def gradient(params: Any, parts: jax.Array) -> Any:
        def add(total: Any, x: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.grad(loss(apply))(params, x)), None

        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
        return jax.tree.map(lambda leaf: leaf / len(parts), total)

    return gradient


def accumulated_once(apply: Apply, weights: Callable[[Any], Any]) -> Gradient:
    """The same with each norm computed once.

    Gradients are summed in the plain weights that `weights` makes of parameters, and brought to the parameters at last.
    """

    def gradient(params: Any, parts: jax.Array) -> Any:
        plain, to_params = jax.vjp(weights, params)
        return to_params(accumulated(apply)(plain, parts))[0]

    return gradient


def sgd(params: Any, gradient: Any) -> Any:
    """A step of gradient descent."""
    return jax.tree.map(lambda leaf, grad: leaf - LEARNING_RATE * grad, params, gradient)


def deviation(row: Row, apply: Apply, params: Any, x: jax.Array) -> float:
    """The largest difference of the output from that of the same numbers in float64, over the largest of the latter."""
    x = x[0] if row.work == "accumulate" else x
    own = np.asarray(jax.jit(apply)(params, x), np.float64)
    with jax.enable_x64(True):
        exact = np.asarray(jax.jit(lambda params, x: apply(params, x))(cast(params, "float64"), x.astype("float64")))
    return float(np.max(np.abs(own - exact)) / np.max(np.abs(exact)))


def _peak(program: Any) -> int | None:
    """The bytes that a program has in use at most, as the compiler plans them."""
    memory = program.memory_analysis()
    if memory is None:
        return None
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return held + memory.temp_size_in_bytes
