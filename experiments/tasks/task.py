"""What a task gives to the engine, and what all networks' configs have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import pydantic
from pydantic import NonNegativeFloat

from experiments.parametrizations import Name
from experiments.schema import Count, Table

Examples = dict[str, jax.Array]
"""Arrays of a data set by name, with a leading axis of examples."""

Params = Any
Gather = Callable[[str, Any], Any]
"""`(stack, parameters) -> parameters`: those of one layer of a stack, made whole as far as the layer needs it."""
Outputs = Any
"""What a network gives of each example: arrays with a leading axis of these. A pytree."""

ModelState = Any
"""What a network keeps beside its parameters, such as running averages. A pytree."""


def _no_terms(outputs: Outputs, examples: Examples) -> dict[str, jax.Array]:
    return {}


@dataclasses.dataclass(frozen=True)
class Task:
    """Pure functions of one training run.

    Attributes:
        init: `(key, examples) -> params, state`: plain parameters, drawn from the key, and the network's first state.
        predict: `(params, state, examples, key) -> outputs, state`: the network in training, with plain parameters.
        losses: `(outputs, examples) -> (examples,)`: the loss of each; their mean is what is trained on.
        evaluate: `(params, state, examples, keys) -> {name: (examples,)}`: figures of each example, out of training;
            one of them is "loss". A fraction of errors is named "error". Each example has a key of its own, so that
            nothing depends on which examples are evaluated together.
        likelihood: of what the losses are the negative logarithm, as `wn_jax.curvature.fisher` calls it; None where
            they are of no distribution of the outputs.
        terms: `(outputs, examples) -> {name: (examples,)}`: what the loss in training is made of, recorded with it.
        stacks: the subtrees of parameters that are stacks of layers, which the network gathers layer by layer.
        sample: `(params, state, key) -> (bytes,)`: text that the network writes, in uint8; None where it writes none.
        pictures: `(params, state, examples, key) -> {name: (rows, columns, height, width, channels)}`: images that it
            makes, in uint8, of the first `pictured` held-out examples; None where it makes none.
        log_weight: `(params, state, examples, keys) -> (examples,)`: the logarithm of a random number whose mean is the
            likelihood of the example; at the end, that of the mean of `draws` of them is evaluated. None: nothing is.
    """

    init: Callable[[jax.Array, Examples], tuple[Params, ModelState]]
    predict: Callable[[Params, ModelState, Examples, jax.Array], tuple[Outputs, ModelState]]
    losses: Callable[[Outputs, Examples], jax.Array]
    evaluate: Callable[[Params, ModelState, Examples, jax.Array], dict[str, jax.Array]]
    likelihood: Literal["categorical", "bernoulli", "normal"] | None
    terms: Callable[[Outputs, Examples], dict[str, jax.Array]] = _no_terms
    stacks: tuple[str, ...] = ()
    sample: Callable[[Params, ModelState, jax.Array], jax.Array] | None = None
    pictures: Callable[[Params, ModelState, Examples, jax.Array], dict[str, jax.Array]] | None = None
    pictured: int = 0
    log_weight: Callable[[Params, ModelState, Examples, jax.Array], jax.Array] | None = None
    draws: int = 0

    def loss(
        self, params: Params, state: ModelState, examples: Examples, key: jax.Array
    ) -> tuple[jax.Array, tuple[ModelState, dict[str, jax.Array]]]:
        """The loss in training, the network's next state and the loss's terms: the program that `wn_jax` reads."""
        outputs, state = self.predict(params, state, examples, key)
        terms = {name: values.mean() for name, values in self.terms(outputs, examples).items()}
        return self.losses(outputs, examples).mean(), (state, terms)


class ModelConfig(Table):
    """The part of a network's config that holds for every network.

    `weights` is how its weights are written (see `parametrizations`), and `scale` where `wn.wrap` puts the scale of
    those that are weight-normalized. `init` is the framework's own, or goes on from
    there and sets magnitudes and biases from the first `init_examples` of the training data (default: a batch).
    `dtype` is that of the computation; parameters and losses are float32. `init_spread` scales the weights badly, to
    see what that does: each vector, at the start, by a random factor whose logarithm has this standard deviation.
    """

    weights: Name = "plain"
    scale: Literal["auto", "weight", "output"] = "auto"
    init: Literal["framework", "data"] = "framework"
    init_examples: Count | None = None
    init_spread: NonNegativeFloat = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"

    @pydantic.model_validator(mode="after")
    def _data_has_magnitudes_to_set(self) -> ModelConfig:
        if self.init == "data" and self.weights == "plain":
            raise ValueError(
                "init = 'data' sets the magnitudes of weights, and plain ones have none; "
                "set weights = 'weight_norm' or 'frozen_scale', or init = 'framework'"
            )
        return self
