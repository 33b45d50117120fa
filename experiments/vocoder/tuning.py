"""Training a generator further, on (g, v), towards the log-mel spectrogram of one sound."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

import wn_jax as wn
from experiments.errors import RunError
from experiments.vocoder.config import VocoderConfig
from experiments.vocoder.hifigan import Generator
from experiments.vocoder.mel import log_mel


def mel_loss(config: VocoderConfig) -> Callable[[Any, jax.Array], jax.Array]:
    """The mean absolute difference of the generated sound's log-mel spectrogram from the one it was generated of.

    Source: Kong, Kim & Bae 2020, arXiv 2010.05646, equation 5, without the weight that it has beside the adversarial
    losses there.
    """
    apply, spectrogram = wn.wrap(Generator(config.generator).apply), log_mel(config)
    return lambda variables, mel: jnp.mean(jnp.abs(spectrogram(cast(jax.Array, apply(variables, mel))) - mel))


def tune(config: VocoderConfig, variables: Any, mel: jax.Array) -> Iterator[tuple[int, float, Any]]:
    """Train, and yield the step, the loss before it and the variables after it, for each step.

    Adam has the moments of the published code. Collections other than `params` stay as they are. The variables that a
    step yields live until the next step, which writes to their memory.

    Raises:
        RunError: the loss is not finite.
    """
    loss = mel_loss(config)
    optimizer = optax.adam(config.tuning.learning_rate, b1=0.8, b2=0.99)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, buffers: Any) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(lambda params: loss({"params": params, **buffers}, mel))(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    buffers = {name: value for name, value in variables.items() if name != "params"}
    params = jax.tree.map(jnp.copy, variables["params"])  # the caller's are not donated
    state = optimizer.init(params)
    for i in range(1, config.tuning.steps + 1):
        params, state, value = step(params, state, buffers)
        check_finite(config, float(value), i)
        yield i, float(value), {"params": params, **buffers}


def check_finite(config: VocoderConfig, loss: float, step: int) -> None:
    """Raise where the loss at a step is not finite."""
    if not math.isfinite(loss):
        raise RunError(f"the loss is {loss} at step {step}; lower tuning.learning_rate ({config.tuning.learning_rate})")
