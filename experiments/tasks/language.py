"""Language: the next byte of text, by a decoder or by counts; the loss is in nats a byte."""

from __future__ import annotations

import functools
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pydantic
from pydantic import PositiveFloat

from experiments.data import Dataset
from experiments.errors import ConfigError
from experiments.schema import Count
from experiments.tasks.gpt import GPT, STACK
from experiments.tasks.task import Examples, Gather, ModelConfig, ModelState, Params, Task

_WINDOWS_AT_A_TIME = 4096  # that are counted together: all pairs of a large text at once would fill the memory


class GPTConfig(ModelConfig):
    """A decoder, which at each evaluation goes on with the text that its prompt begins."""

    name: Literal["gpt"]
    layers: Count
    """The number of blocks."""

    width: Count
    """The features at each place: a multiple of twice the heads."""

    heads: Count
    """The attention heads of each block."""

    prompt: str = "\n"
    """The beginning of what it writes, which it fills up to a window."""

    temperature: PositiveFloat = 0.8
    """The divisor of its logits where it writes: below 1, what is likely becomes likelier."""

    @pydantic.model_validator(mode="after")
    def _heads_have_pairs(self) -> GPTConfig:
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width ({self.width}) must be a multiple of twice the heads ({self.heads}): each head has an equal "
                "part of it, in pairs of numbers that rotary positions turn"
            )
        if not self.prompt:
            raise ValueError("prompt is empty, and the first byte needs one before it; leave it out for a line break")
        return self


class BigramConfig(ModelConfig):
    """The frequency of each byte after the one before, counted in the training text. Nothing is trained."""

    name: Literal["bigram"]


Config = GPTConfig | BigramConfig
CONFIGS = (GPTConfig, BigramConfig)


def build(config: Config, dataset: Dataset, gather: Gather) -> Task:
    """The task of predicting each byte of a window from those before it.

    Raises:
        ConfigError: the examples are no text, or the window is shorter than the prompt.
    """
    if "tokens" not in dataset.train:
        raise ConfigError(f"model.name: {config.name} models text, and the examples are none; set data.name = 'text'")
    if isinstance(config, BigramConfig):
        return _bigram(dataset)
    network = GPT(
        layers=config.layers,
        width=config.width,
        heads=config.heads,
        symbols=dataset.classes,
        dtype=jnp.dtype(config.dtype),
        gather=functools.partial(gather, STACK),
    )
    window = dataset.train["tokens"].shape[1] - 1
    prompt = _prompt(config, window)

    def init(key: jax.Array, examples: Examples) -> tuple[Params, ModelState]:
        return network.init(key, _given(examples)[:1])["params"], {}

    def predict(params: Params, state: ModelState, examples: Examples, _: Any) -> tuple[jax.Array, ModelState]:
        return cast(jax.Array, network.apply({"params": params}, _given(examples))), state

    def sample(params: Params, _state: ModelState, key: jax.Array) -> jax.Array:
        """Text, byte by byte.

        For each byte the network runs on the whole window, so that all runs have one shape and compile once. The zeros
        after a place have no influence on it, as attention is causal.
        """

        def write(place: jax.Array, tokens: jax.Array) -> jax.Array:
            logits = cast(jax.Array, network.apply({"params": params}, tokens[None]))[0, place - 1]
            return tokens.at[place].set(drawn(jax.random.fold_in(key, place), logits, config.temperature))

        tokens = jnp.zeros(window, jnp.int32).at[: len(prompt)].set(prompt)
        return jax.lax.fori_loop(len(prompt), window, write, tokens).astype(jnp.uint8)

    return _task(init, predict, stacks=(STACK,), sample=sample)


def _task(init: Any, predict: Any, **others: Any) -> Task:
    """The task of a network that needs no key to predict, and predicts alike in training and out of it."""

    def evaluate(params: Params, state: ModelState, examples: Examples, _: Any) -> dict[str, jax.Array]:
        return {"loss": _losses(predict(params, state, examples, None)[0], examples)}

    return Task(init, predict, _losses, evaluate, likelihood="categorical", **others)


def _bigram(dataset: Dataset) -> Task:
    table = jnp.asarray(bigram_logits(dataset.train["tokens"], dataset.classes))

    def init(_key: jax.Array, _examples: Examples) -> tuple[Params, ModelState]:
        return {}, {}

    def predict(_params: Params, state: ModelState, examples: Examples, _: Any) -> tuple[jax.Array, ModelState]:
        return table[_given(examples)], state

    return _task(init, predict)


def bigram_logits(windows: np.ndarray, symbols: int) -> np.ndarray:
    """The logarithm of the frequency of each symbol (column) after each symbol (row), in windows that overlap by one.

    Each pair counts once more than it stands there, so that none is impossible (Laplace's rule).
    """
    counts = np.ones(symbols**2)
    for start in range(0, len(windows), _WINDOWS_AT_A_TIME):
        part = windows[start : start + _WINDOWS_AT_A_TIME].astype(np.intp)
        pair = symbols * part[:, :-1] + part[:, 1:]  # a pair of symbols as one number
        counts += np.bincount(pair.ravel(), minlength=symbols**2)
    pairs = counts.reshape(symbols, symbols)
    return np.log(pairs / pairs.sum(axis=1, keepdims=True)).astype(np.float32)


def drawn(key: jax.Array, logits: jax.Array, temperature: float) -> jax.Array:
    """A random symbol of these logits, divided by the temperature."""
    logits = logits.astype(jnp.float32)  # noise in bfloat16 would hardly ever draw what is unlikely
    at_most_0 = logits - logits.max()  # so that a low temperature does not make infinite logits
    return jax.random.categorical(key, at_most_0 / temperature)


def _prompt(config: GPTConfig, window: int) -> np.ndarray:
    """The bytes of the prompt, fewer than a window."""
    prompt = np.frombuffer(config.prompt.encode(), np.uint8)
    if len(prompt) >= window:
        raise ConfigError(
            f"model.prompt: its bytes ({len(prompt)}) leave nothing of the window ({window}) to write; shorten it, or "
            "set data.window higher"
        )
    return prompt


def _given(examples: Examples) -> jax.Array:
    """The bytes of each window that are given: all but the last."""
    return examples["tokens"][:, :-1].astype(jnp.int32)


def _losses(logits: jax.Array, examples: Examples) -> jax.Array:
    """The mean loss over each window, in nats a byte: of all bytes but the first, which has none before it."""
    targets = examples["tokens"][:, 1:].astype(jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets).mean(axis=-1)
