"""From a config to pure training functions. Nothing here touches files, clocks or the screen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import wn_jax as wn
from experiments import data, models
from experiments.config import ArmConfig, OptimizerConfig


class State(NamedTuple):
    """One training run's state; with a leading axis, that of several seeds."""

    params: Any
    batch_stats: Any
    opt_state: Any
    step: jax.Array
    key: jax.Array


@dataclasses.dataclass(frozen=True)
class Arm:
    """The functions of one arm, for a single seed; `vmap` them over states."""

    init: Callable[[jax.Array], State]
    advance: Callable[[State], tuple[State, jax.Array]]
    evaluate: Callable[[State], dict[str, jax.Array]]


def make_arm(config: ArmConfig, dataset: data.Dataset) -> Arm:
    """Build an arm.

    Returns:
        `init(key)`; `advance(state)`, which makes `config.train.steps_per_record` steps in one `lax.scan` and returns
        the mean of their minibatch losses; `evaluate(state)`, with `test_loss` and `test_error` (a fraction).
    """
    model = models.build(config.model, dataset.classes)
    optimizer = make_optimizer(config.optimizer)

    def forward(params: Any, batch_stats: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        """In training: the logits and the new batch statistics."""
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
        return logits, updates.get("batch_stats", {})

    def batches(key: jax.Array, first_step: jax.Array, steps: int) -> jax.Array:
        return data.batch_indices(key, len(dataset.train_x), config.data.batch_size, first_step, steps)

    def init(key: jax.Array) -> State:
        # Flax derives each kernel from the key and its path, so all arms of one seed start from the same kernels;
        # an initialization from data changes their magnitudes, and the directions stay.
        variables = model.init(jax.random.fold_in(key, 0), dataset.train_x[:1], train=False)
        params, batch_stats = variables["params"], variables.get("batch_stats", {})
        order_key, start = jax.random.fold_in(key, 1), jnp.zeros((), jnp.int32)
        x = dataset.train_x[batches(order_key, start, 1)[0]]
        if config.model.weight_norm:
            params = wn.reparameterize(params, wn.infer_axes(forward)(params, batch_stats, x))
        if config.model.init == "data":
            params = wn.init_from_data(forward)(params, batch_stats, x)
        return State(params, batch_stats, optimizer.init(params), start, order_key)

    def loss(params: Any, batch_stats: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
        logits, batch_stats = wn.wrap(forward)(params, batch_stats, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), batch_stats

    def train_step(state: State, batch: jax.Array) -> tuple[State, jax.Array]:
        x, y = dataset.train_x[batch], dataset.train_y[batch]
        gradient = jax.value_and_grad(loss, has_aux=True)
        (value, batch_stats), grads = gradient(state.params, state.batch_stats, x, y)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, batch_stats, opt_state, state.step + 1, state.key), value

    def advance(state: State) -> tuple[State, jax.Array]:
        indices = batches(state.key, state.step, config.train.steps_per_record)
        state, losses = jax.lax.scan(train_step, state, indices)
        return state, losses.mean()

    def evaluate(state: State) -> dict[str, jax.Array]:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        logits = wn.wrap(model.apply)(variables, dataset.test_x, train=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, dataset.test_y)
        return {"test_loss": losses.mean(), "test_error": (logits.argmax(-1) != dataset.test_y).mean()}

    return Arm(init, advance, evaluate)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The optax optimizer that `config` describes."""
    if config.name == "adam":
        return optax.adam(config.learning_rate)
    return optax.sgd(config.learning_rate, momentum=config.momentum or None)
