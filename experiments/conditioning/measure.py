"""Measuring a loss at one place, in one parametrization: its curvature, and where a step of descent leads.

The records that come of it are described in `run_folder.conditioning`.
"""

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
from experiments.run_folder.conditioning import LEVELS, Measurement, NaturalMeasurement, Spectrum
from experiments.tasks import Examples, Params, Task
from wn_jax import curvature

_RATIOS = (5, 10, 20)  # numbers k of which the largest eigenvalue over the k-th largest is recorded
_STEP_SIZES = 2.0 ** np.arange(-12, 13)  # in units of the best one where the Fisher matrix is the whole curvature


class Instruments:
    """The functions that measure one way to predict from parameters, compiled once for all places."""

    def __init__(self, task: Task, predict: Callable[[Params, Examples], Any]) -> None:
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


class Place(NamedTuple):
    """Weights of the plain network, and all that is known there before a parametrization is looked at."""

    plain: Instruments
    """The instruments of the plain network."""

    weights: Params
    """The weights of the plain network."""

    examples: Examples
    """The examples that the loss is the mean over."""

    table: ConditioningConfig
    """The table that says what to measure, and how exactly."""

    key: jax.Array
    """The key that draws the probes. All parametrizations have the same."""

    gradient: Params
    """The gradient in these weights."""

    natural: curvature.NaturalGradient
    """The natural gradient in these weights."""

    damping: float
    """The damping of the natural gradient."""

    fisher: curvature.SpectralDensity
    """The eigenvalues of the Fisher matrix in these weights."""


def at(plain: Instruments, weights: Params, examples: Examples, table: ConditioningConfig, key: jax.Array) -> Place:
    """The place of some weights of the plain network, with the gradient and the natural gradient there."""
    fisher = plain.matrices["fisher"](weights, examples)
    density = curvature.spectral_density(fisher, key, table.probes, table.lanczos_steps)
    mean_eigenvalue = float(np.mean(np.sum(density.values * density.weights, axis=1)))
    damping = table.damping * mean_eigenvalue
    gradient = plain.gradient(weights, examples)
    natural = curvature.natural_gradient(fisher, gradient, damping, tolerance=1e-3)
    return Place(plain, weights, examples, table, key, gradient, natural, damping, density)


def measure(coordinates: Coordinates, own: Instruments, place: Place) -> Measurement:
    """Everything about one parametrization at one place."""
    examples = place.examples
    params = coordinates.start(place.weights, examples)
    outputs = place.plain.predict(place.weights, examples)
    differences = abs(own.predict(params, examples) - outputs)
    step = _weight_step(place.plain.loss, coordinates.weights, params, examples)
    return {
        "coordinates": coordinates.name,
        "loss": float(own.loss(params, examples)),
        "difference": float(jnp.max(differences) / jnp.max(abs(outputs))),
        "cosine_natural": float(curvature.cosine(step, place.natural.value)),
        "cosine_gradient": float(curvature.cosine(step, place.gradient)),
        "decrease": _best_decrease(own, params, own.gradient(params, examples), examples),
        "matrices": {name: _spectrum(own.matrices[name](params, examples), place) for name in place.table.matrices},
    }


def measure_natural(place: Place) -> NaturalMeasurement:
    """The same of the natural gradient, in whose coordinates the eigenvalues of the Fisher matrix are `l / (l + d)`."""
    positive = np.maximum(place.fisher.values, 0)
    whitened = curvature.SpectralDensity(positive / (positive + place.damping), place.fisher.weights)
    spectrum = _figures(whitened, place.table.damping)
    return {
        "coordinates": "natural gradient",
        "loss": float(place.plain.loss(place.weights, place.examples)),
        "difference": 0.0,
        "cosine_natural": 1.0,
        "cosine_gradient": float(curvature.cosine(place.natural.value, place.gradient)),
        "decrease": _best_decrease(place.plain, place.weights, place.natural.value, place.examples),
        "residual": place.natural.residual,
        "products": place.natural.steps,
        "matrices": {"fisher": spectrum} if "fisher" in place.table.matrices else {},
    }


def _spectrum(operator: curvature.LinearOperator, place: Place) -> Spectrum:
    """The eigenvalues of a matrix, in figures."""
    table = place.table
    density = curvature.spectral_density(operator, place.key, table.probes, table.lanczos_steps)
    return {"size": operator.size, "exact": density.exact, **_figures(density, table.damping)}


def _figures(density: curvature.SpectralDensity, damping: float) -> Spectrum:
    """Condition numbers of a matrix, and which fraction of the magnitudes is above each of `LEVELS`.

    `damped` has `damping` times the mean magnitude added. Both it and `numerical_range` are lower bounds where the
    density is not exact.
    """
    values, weights = density.values, density.weights
    magnitudes = abs(values)
    largest = magnitudes.max()
    mean = float(np.sum(magnitudes * weights, axis=1).mean())
    numbers = [curvature.condition_numbers(probe, damping * mean, _RATIOS) for probe in values]

    # A matrix of zeros has no largest eigenvalue to divide by.
    relative = curvature.SpectralDensity(magnitudes / max(largest, np.finfo(values.dtype).tiny), weights)
    below = relative.cumulative(LEVELS * (1 - 1e-6))[0]  # a little less, so that the largest is above the last level
    return {
        "largest": float(values.max()),
        "smallest": float(values.min()),
        "to_mean": float(largest) / mean if mean else float("nan"),
        "damped": max(probe.damped for probe in numbers),
        "numerical_range": max(probe.numerical_range for probe in numbers),
        "to": {str(k): float(np.mean([probe.to[k] for probe in numbers])) for k in numbers[0].to},
        "above": [float(f"{1 - share:.4g}") for share in below],
    }


def _best_decrease(own: Instruments, params: Params, gradient: Params, examples: Examples) -> float:
    """The fraction of the loss that the best of many step sizes along a direction takes off."""
    fisher = own.matrices["fisher"](params, examples)
    curvature_along = float(jnp.asarray(optax.tree.vdot(gradient, fisher(gradient))))
    slope = float(jnp.asarray(optax.tree.vdot(gradient, own.gradient(params, examples))))
    before = float(own.loss(params, examples))
    if not curvature_along > 0 or not before:
        return 0.0

    sizes = _STEP_SIZES * slope / curvature_along
    after = np.array([float(own.loss_after(params, gradient, size, examples)) for size in sizes])
    lowest = float(np.min(after[np.isfinite(after)], initial=before))
    return max(0.0, 1 - lowest / before)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _weight_step(loss: Any, weights: Any, params: Params, examples: Examples) -> Params:
    """The direction in which a small step of gradient descent in the parameters moves the plain network's weights."""
    return curvature.weight_step(loss, lambda params: weights(params, examples))(params, examples)
