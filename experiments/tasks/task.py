"""What a task gives to the engine, and what all networks' configs have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import pydantic

from experiments.parametrizations import Name
from experiments.tables import Count, Table

Examples = dict[str, jax.Array]
"""Arrays of a data set by name, with a leading axis of examples."""

Params = Any
ModelState = Any
"""What a network keeps beside its parameters, such as running averages. A pytree."""


@dataclasses.dataclass(frozen=True)
class Task:
    """Pure functions of one training run.

    Attributes:
        init: `(key, examples) -> params, state`: plain parameters, drawn from the key, and the network's first state.
        loss: `(params, state, examples, key) -> loss, state`: in training, with plain parameters; the mean over the
            examples. The program that `wn_jax` reads.
        evaluate: `(params, state, examples) -> {name: (examples,)}`: figures of each example, out of training; one
            of them is "loss". A fraction of errors is named "error".
    """

    init: Callable[[jax.Array, Examples], tuple[Params, ModelState]]
    loss: Callable[[Params, ModelState, Examples, jax.Array], tuple[jax.Array, ModelState]]
    evaluate: Callable[[Params, ModelState, Examples], dict[str, jax.Array]]


class ModelConfig(Table):
    """The part of a network's config that holds for every network.

    `weights` is how its weights are written (see `parametrizations`). `init` is the framework's own, or goes on from
    there and sets magnitudes and biases from the first `init_examples` of the training data (default: a batch).
    `dtype` is that of the computation; parameters and losses are float32.
    """

    weights: Name = "plain"
    init: Literal["framework", "data"] = "framework"
    init_examples: Count | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"

    @pydantic.model_validator(mode="after")
    def _data_has_magnitudes_to_set(self) -> ModelConfig:
        if self.init == "data" and self.weights == "plain":
            raise ValueError(
                "init = 'data' sets the magnitudes of weights, and plain ones have none; "
                "set weights = 'weight_norm' or 'frozen_scale', or init = 'framework'"
            )
        return self
