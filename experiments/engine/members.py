"""The members of an arm: its runs, which differ in nothing but seed and learning rate.

In which order they come, and how they lie in arrays. What a member's run is made of is in `training`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.config.experiment import ArmConfig


class Member(NamedTuple):
    """The two numbers that tell one run of an arm from the others; with a leading axis, those of several runs."""

    seed: jax.Array
    """int32."""

    learning_rate: jax.Array
    """float32."""


def members(config: ArmConfig) -> list[tuple[float, int]]:
    """Learning rate and seed of each member, seeds of one rate together."""
    seeds = range(config.train.first_seed, config.train.first_seed + config.train.seeds)
    return [(rate, seed) for rate in config.optimizer.learning_rate for seed in seeds]


def as_arrays(chosen: list[tuple[float, int]]) -> Member:
    """Members as one, with a leading axis."""
    rates, seeds = zip(*chosen, strict=True)
    return Member(jnp.asarray(seeds, jnp.int32), jnp.asarray(rates, jnp.float32))
