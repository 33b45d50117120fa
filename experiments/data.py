"""Data sets, whole and in memory, and the order in which training sees them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from experiments.config import ConfigError, DataConfig


class Dataset(NamedTuple):
    """Inputs (examples, features) in float32 and integer labels (examples,), for training and for testing."""

    train_x: jax.Array
    train_y: jax.Array
    test_x: jax.Array
    test_y: jax.Array
    classes: int


def load(config: DataConfig) -> Dataset:
    """The data set that `config` names.

    Raises:
        ConfigError: a batch is larger than the training set.
    """
    dataset = _LOADERS[config.name]()
    if config.batch_size > len(dataset.train_x):
        raise ConfigError(
            f"data.batch_size: {config.batch_size} is more than the {len(dataset.train_x)} training examples of "
            f"{config.name}"
        )
    return dataset


def batch_indices(key: jax.Array, examples: int, batch_size: int, first_step: jax.Array, steps: int) -> jax.Array:
    """The examples of `steps` batches from `first_step` on, shape (steps, batch_size).

    A pure function of key and step. Each epoch is a permutation of its own, less the last `examples % batch_size`.
    """
    per_epoch = examples // batch_size
    step = first_step + jnp.arange(steps)
    first_epoch = first_step // per_epoch
    epochs = first_epoch + jnp.arange(-(-steps // per_epoch) + 1)
    orders = jax.vmap(lambda epoch: jax.random.permutation(jax.random.fold_in(key, epoch), examples))(epochs)
    batches = orders[:, : per_epoch * batch_size].reshape(len(epochs), per_epoch, batch_size)
    return batches[step // per_epoch - first_epoch, step % per_epoch]


@functools.cache
def _digits() -> Dataset:
    """1,797 handwritten digits of 8 x 8 pixels (UCI, bundled with scikit-learn): 1,297 to train on, 500 to test on.

    The split is fixed and stratified; pixels are scaled from 0..16 to zero mean, each by itself,
    and unit variance, all together.
    """
    images, digits = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(images, digits, test_size=500, stratify=digits, random_state=0)
    mean = train_x.mean(axis=0)
    std = (train_x - mean).std()
    scaled = [((x - mean) / std).astype(np.float32) for x in (train_x, test_x)]
    return Dataset(
        jnp.asarray(scaled[0]), jnp.asarray(train_y), jnp.asarray(scaled[1]), jnp.asarray(test_y), classes=10
    )


_LOADERS: dict[str, Callable[[], Dataset]] = {"digits": _digits}
