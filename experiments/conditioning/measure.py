"""What is measured of a loss at one place, in one parametrization."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.conditioning.coordinates import Coordinates
from experiments.config.conditioning import ConditioningConfig
from experiments.tasks import Examples, Params, Task
from wn_jax import curvature

RATIOS = (5, 10, 20)  # largest eigenvalue over the k-th largest
LEVELS = np.geomspace(1e-6, 1, 37)
_STEP_SIZES = 2.0 ** np.arange(-12, 13)  # times the one that is best where the Fisher matrix is the whole truth


class Directions(NamedTuple):
    """In the weights of the plain network: the gradient and the natural gradient, and how the latter was had."""

    gradient: Params
    natural: curvature.NaturalGradient
    damping: float
    fisher: curvature.SpectralDensity


class Instruments:
    """The functions that measure a prediction of parameters, compiled once for all places."""

    def __init__(self, task: Task, predict: Callable[[Params, Examples], Any]):
        assert task.likelihood is not None

        def losses(params: Params, examples: Examples) -> jax.Array:
            return task.losses(predict(params, examples), examples)

        def loss(params: Params, examples: Examples) -> jax.Array:
            return losses(params, examples).mean()

        def move(params: Params, gradient: Params, size: float, examples: Examples) -> jax.Array:
            return loss(optax.tree.add_scale(params, -size, gradient), examples)

        self.predict = jax.jit(predict)
        self.loss = jax.jit(loss)
        self.gradient = jax.jit(jax.grad(loss))
        self.loss_after = jax.jit(move)
        self.matrices: dict[str, Callable[..., curvature.LinearOperator]] = {
            "hessian": curvature.hessian(loss),
            "fisher": curvature.fisher(predict, task.likelihood),
            "empirical_fisher": curvature.empirical_fisher(losses),
            "gradient_covariance": curvature.gradient_covariance(losses),
        }


def directions(
    plain: Instruments, weights: Params, examples: Examples, table: ConditioningConfig, key: jax.Array
) -> Directions:
    """The gradient and the natural gradient at some weights of the plain network."""
    fisher = plain.matrices["fisher"](weights, examples)
    density = curvature.spectral_density(fisher, key, table.probes, table.lanczos_steps)
    damping = table.damping * float(np.mean(np.sum(density.values * density.weights, axis=1)))
    gradient = plain.gradient(weights, examples)
    return Directions(gradient, curvature.natural_gradient(fisher, gradient, damping, tolerance=1e-3), damping, density)


def measure(
    coordinates: Coordinates,
    own: Instruments,
    plain: Instruments,
    weights: Params,
    examples: Examples,
    to: Directions,
    table: ConditioningConfig,
    key: jax.Array,
) -> dict[str, Any]:
    """Everything about one parametrization at one place; numbers, and lists of numbers. The key draws the probes."""
    params = coordinates.start(weights, examples)
    outputs = plain.predict(weights, examples)
    step = _weight_step(plain.loss, coordinates.weights, params, examples)
    loss = float(own.loss(params, examples))
    return {
        "coordinates": coordinates.name,
        "loss": loss,
        "difference": float(jnp.max(abs(own.predict(params, examples) - outputs)) / jnp.max(abs(outputs))),
        "cosine_natural": float(curvature.cosine(step, to.natural.value)),
        "cosine_gradient": float(curvature.cosine(step, to.gradient)),
        "decrease": _best_decrease(own, params, own.gradient(params, examples), examples),
        "matrices": {name: _spectrum(own.matrices[name](params, examples), table, key) for name in table.matrices},
    }


def measure_natural(
    plain: Instruments, weights: Params, examples: Examples, to: Directions, table: ConditioningConfig
) -> dict[str, Any]:
    """The same of the natural gradient, in whose coordinates the eigenvalues of the Fisher matrix are `l / (l + d)`."""
    positive = np.maximum(to.fisher.values, 0)
    whitened = curvature.SpectralDensity(positive / (positive + to.damping), to.fisher.weights)
    return {
        "coordinates": "natural gradient",
        "loss": float(plain.loss(weights, examples)),
        "difference": 0.0,
        "cosine_natural": 1.0,
        "cosine_gradient": float(curvature.cosine(to.natural.value, to.gradient)),
        "decrease": _best_decrease(plain, weights, to.natural.value, examples),
        "residual": to.natural.residual,
        "products": to.natural.steps,
        "matrices": {"fisher": _numbers(whitened, table.damping)} if "fisher" in table.matrices else {},
    }


def _spectrum(operator: curvature.LinearOperator, table: ConditioningConfig, key: jax.Array) -> dict[str, Any]:
    density = curvature.spectral_density(operator, key, table.probes, table.lanczos_steps)
    return {"size": operator.size, "exact": density.exact, **_numbers(density, table.damping)}


def _numbers(density: curvature.SpectralDensity, damping: float) -> dict[str, Any]:
    """Condition numbers, and which fraction of the magnitudes is above each of `LEVELS` times the largest.

    `damped` has `damping` times the mean magnitude added. Both it and `numerical_range` are lower bounds where the
    density is not exact.
    """
    values = density.values
    sizes = curvature.SpectralDensity(
        abs(values) / max(abs(values).max(), np.finfo(values.dtype).tiny), density.weights
    )
    mean = float(np.sum(abs(values) * density.weights, axis=1).mean())
    numbers = [curvature.condition_numbers(probe, damping * mean, RATIOS) for probe in values]
    return {
        "largest": float(values.max()),
        "smallest": float(values.min()),
        "to_mean": float(abs(values).max()) / mean if mean else float("nan"),
        "damped": max(probe.damped for probe in numbers),
        "numerical_range": max(probe.numerical_range for probe in numbers),
        "to": {str(k): float(np.mean([probe.to[k] for probe in numbers])) for k in numbers[0].to},
        "above": [float(f"{1 - below:.4g}") for below in sizes.cumulative(LEVELS * (1 - 1e-6))[0]],
    }


def _best_decrease(own: Instruments, params: Params, gradient: Params, examples: Examples) -> float:
    """By how much, relatively, the best of many step sizes along a direction lowers the loss."""
    fisher = own.matrices["fisher"](params, examples)
    curvature_along = float(optax.tree.vdot(gradient, fisher(gradient)))
    slope = float(optax.tree.vdot(gradient, own.gradient(params, examples)))
    if not curvature_along > 0:
        return 0.0
    before = float(own.loss(params, examples))
    if not before:
        return 0.0
    sizes = _STEP_SIZES * slope / curvature_along
    after = np.array([float(own.loss_after(params, gradient, size, examples)) for size in sizes])
    return max(0.0, 1 - float(np.min(after[np.isfinite(after)], initial=before)) / before)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _weight_step(loss: Any, weights: Any, params: Params, examples: Examples) -> Params:
    """Where a small step of gradient descent in the parameters moves the weights of the plain network."""
    return curvature.weight_step(loss, lambda params: weights(params, examples))(params, examples)
