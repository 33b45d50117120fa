"""Data sets, whole and in memory, and the order in which training sees them.

A data set is a module that says what `Source` it is, and its line in `SOURCES`.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from experiments.data import files
from experiments.data.batches import batch_indices
from experiments.data.cifar10 import CIFAR10
from experiments.data.digits import DIGITS
from experiments.data.linear import LINEAR
from experiments.data.mnist import MNIST
from experiments.data.source import Raw, Source
from experiments.data.whitening import zca
from experiments.errors import ConfigError

if TYPE_CHECKING:  # the config asks this module which names there are
    from experiments.config import DataConfig

__all__ = ["SOURCES", "Dataset", "batch_indices", "load"]

SOURCES: dict[str, Source] = {source.name: source for source in (DIGITS, MNIST, CIFAR10, LINEAR)}


class Dataset(NamedTuple):
    """Arrays with the examples along their first axis: "x" in float32, and "y", labels in int32 or targets in float32.

    `held_out_name` is "test" or "validation". Experiments share the arrays, which cannot be written.
    """

    train: dict[str, np.ndarray]
    held_out: dict[str, np.ndarray]
    held_out_name: str
    classes: int


def load(config: DataConfig) -> Dataset:
    """The data set that `config` names, cut to the examples that it asks for, and whitened.

    The last `validation` training examples of the whole set are the held-out ones in place of the test set, whatever
    `train_examples` is; training sees the first `train_examples` of the others. Whitening is fitted on all the others:
    from a few thousand images, ZCA of 3,072 pixels would blow up the directions that these hardly vary in.

    Raises:
        ConfigError: files are missing or damaged, or there are fewer examples than asked for, or than a batch has.
    """
    dataset = _prepared(
        config.name,
        files.folders(config.dir),
        config.train_examples,
        config.test_examples,
        config.validation,
        config.whiten,
    )
    cuts = {"train_examples": config.train_examples, "validation": config.validation}
    reasons = ", ".join(f"data.{key} = {value}" for key, value in cuts.items() if value)
    what = f"training examples of {config.name}" + (f" ({reasons})" if reasons else "")
    _check_at_most("batch_size", config.batch_size, len(dataset.train["y"]), what)
    return dataset


@functools.lru_cache(maxsize=1)
def _raw(name: str, folders: tuple[Path, ...]) -> Raw:
    """All of a data set; the arms of an experiment take slices of it one after the other."""
    source = SOURCES[name]
    raw = source.read(files.opener(source, folders))
    for array in raw[:4]:
        array.setflags(write=False)
    return raw


@functools.cache
def _prepared(
    name: str, folders: tuple[Path, ...], train: int | None, test: int | None, validation: int, whiten: bool
) -> Dataset:
    raw = _raw(name, folders)
    total = len(raw.train_y)
    if validation >= total:
        raise ConfigError(
            f"data.validation: {validation} leaves none of the {total} training examples of {name} to train on; "
            f"set it to {total - 1} or less"
        )
    left = total - validation
    reason = f" that data.validation = {validation} leaves" if validation else ""
    _check_at_most("train_examples", train, left, f"training examples of {name}{reason}")
    _check_at_most("test_examples", test, len(raw.test_y), f"test examples of {name}")
    train_x, train_y = raw.train_x[:left][:train], raw.train_y[:left][:train]
    if validation:
        held_out_x, held_out_y = raw.train_x[left:], raw.train_y[left:]
    else:
        held_out_x, held_out_y = raw.test_x[:test], raw.test_y[:test]
    train_x, held_out_x = raw.scale(train_x), raw.scale(held_out_x)
    if whiten:
        whitening = zca(raw.train_x[:left], scale=raw.scale)
        train_x, held_out_x = whitening.apply(train_x), whitening.apply(held_out_x)
    for array in (train_x, held_out_x):
        array.setflags(write=False)
    train_set, held_out = {"x": train_x, "y": train_y}, {"x": held_out_x, "y": held_out_y}
    return Dataset(train_set, held_out, "validation" if validation else "test", raw.classes)


def _check_at_most(key: str, wanted: int | None, available: int, what: str) -> None:
    if wanted is not None and wanted > available:
        raise ConfigError(f"data.{key}: {wanted} is more than the {available} {what}; set it to {available} or less")
