"""The functions that a task gives to the engine, and the config that all networks have in common."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import pydantic
from pydantic import NonNegativeFloat

from experiments.parametrizations import Name
from experiments.schema import Count, Table, shortened

Examples = dict[str, jax.Array]
"""Arrays of a data set by name, with a leading axis of examples."""

Params = Any
"""The parameters of a network. A pytree."""

Gather = Callable[[str, Any], Any]
"""`(stack, parameters) -> parameters`: those of one layer of a stack, made whole as far as the layer needs it."""

Outputs = Any
"""The outputs of a network: arrays with a leading axis of examples. A pytree."""

ModelState = Any
"""The arrays that a network keeps beside its parameters, such as running averages. A pytree."""


def _no_terms(_outputs: Outputs, _examples: Examples) -> dict[str, jax.Array]:
    return {}


@dataclasses.dataclass(frozen=True)
class Task:
    """Pure functions of one training run."""

    init: Callable[[jax.Array, Examples], tuple[Params, ModelState]]
    """`(key, examples) -> params, state`: plain parameters, drawn from the key, and the network's first state."""

    predict: Callable[[Params, ModelState, Examples, jax.Array], tuple[Outputs, ModelState]]
    """`(params, state, examples, key) -> outputs, state`: the network in training, with plain parameters."""

    losses: Callable[[Outputs, Examples], jax.Array]
    """`(outputs, examples) -> (examples,)`: the loss of each example. Training lowers their mean."""

    evaluate: Callable[[Params, ModelState, Examples, jax.Array], dict[str, jax.Array]]
    """`(params, state, examples, keys) -> {name: (examples,)}`: figures of each example, out of training.

    One of them is "loss". A fraction of errors is named "error". Each example has a key of its own, so that nothing
    depends on which examples are evaluated together.
    """

    likelihood: Literal["categorical", "bernoulli", "normal"] | None
    """The distribution of the outputs whose negative logarithm the losses are, as `wn_jax.curvature.fisher` calls it.

    None where there is no such distribution.
    """

    terms: Callable[[Outputs, Examples], dict[str, jax.Array]] = _no_terms
    """`(outputs, examples) -> {name: (examples,)}`: the parts of the loss in training, recorded with it."""

    stacks: tuple[str, ...] = ()
    """The subtrees of parameters that are stacks of layers. The network gathers them layer by layer."""

    sample: Callable[[Params, ModelState, jax.Array], jax.Array] | None = None
    """`(params, state, key) -> (bytes,)`: text that the network writes, in uint8; None where it writes none."""

    pictures: Callable[[Params, ModelState, Examples, jax.Array], dict[str, jax.Array]] | None = None
    """`(params, state, examples, key) -> {name: (rows, columns, height, width, channels)}`: images in uint8.

    The examples are the first `pictured` held-out ones. None where the network makes no images.
    """

    pictured: int = 0
    """The number of examples that `pictures` wants."""

    log_weight: Callable[[Params, ModelState, Examples, jax.Array], jax.Array] | None = None
    """`(params, state, examples, keys) -> (examples,)`: the logarithm of a random number for each example.

    The mean of that number is the likelihood of the example. At the end of training, the logarithm of the mean of
    `draws` of them is evaluated; where there is no such function, nothing is.
    """

    draws: int = 0
    """The number of draws of `log_weight` for each example."""

    def loss(
        self, params: Params, state: ModelState, examples: Examples, key: jax.Array
    ) -> tuple[jax.Array, tuple[ModelState, dict[str, jax.Array]]]:
        """The loss in training, the network's next state and the loss's terms.

        This is the program that `wn_jax` reads.
        """
        outputs, state = self.predict(params, state, examples, key)
        terms = {name: values.mean() for name, values in self.terms(outputs, examples).items()}
        return self.losses(outputs, examples).mean(), (state, terms)


def _deviations(value: Any) -> Any:
    """A number, or a table of numbers, which must all be positive: in a config's words, as the type would have two."""
    for path, number in value.items() if isinstance(value, dict) else [(None, value)]:
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
            where = "" if path is None else f" for {shortened(repr(path))}"
            raise ValueError(
                "must be a positive number, or a table of such by the path of a weight or a glob of paths; "
                f"got {shortened(repr(number))}{where}"
            )
    return value


class ModelConfig(Table):
    """The part of a network's config that holds for every network."""

    weights: Name = "plain"
    """The parametrization in which the weights are written: see `parametrizations`."""

    scale: Literal["auto", "weight", "output"] = "auto"
    """The place where `wn.wrap` puts the scale of weights that are weight-normalized."""

    init: Literal["framework", "data"] = "framework"
    """The framework's own initialization, or one that goes on from there and sets magnitudes and biases from data."""

    init_examples: Count | None = None
    """The number of training examples that "data" takes, from the first on. Default: a batch."""

    init_scale: Annotated[float | dict[str, float], pydantic.BeforeValidator(_deviations)] = 1.0
    """The standard deviation that "data" gives to pre-activations: a number, or a table of it by path or glob of paths.

    As in `"Dense_*/kernel" = 0.1`. Weights that the table does not name have 1. A path counts more than a glob, and of
    globs the last that matches; `*` stands for any characters. A table of an arm is laid over that of the base.
    """

    init_spread: NonNegativeFloat = 0.0
    """The standard deviation of the logarithm of a random factor on each weight vector, at the start.

    It scales the weights badly, to see what that does.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype of the computation. Parameters and losses are float32."""

    @pydantic.model_validator(mode="after")
    def _data_has_magnitudes_to_set(self) -> ModelConfig:
        if self.init == "data" and self.weights == "plain":
            raise ValueError(
                "init = 'data' sets the magnitudes of weights, and plain ones have none; "
                "set weights = 'weight_norm' or 'frozen_scale', or init = 'framework'"
            )
        return self
