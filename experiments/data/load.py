"""Loading the data set that a config names: read, cut to the examples that are used, whitened or made black and white.

What is loaded is kept, as the arms of an experiment share it. How a set's files are read, its own file says.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.data import files, text
from experiments.data.binarize import binarized
from experiments.data.config import DataConfig
from experiments.data.dataset import Dataset
from experiments.data.names import SOURCES
from experiments.data.source import Raw
from experiments.data.whitening import zca
from experiments.errors import ConfigError

_BYTES_AT_A_TIME = 2**15  # of text, in evaluation


def load(config: DataConfig) -> Dataset:
    """The data set that `config` names, cut to the examples that it asks for, and whitened.

    The last `validation` training examples of the whole set are the held-out ones in place of the test set, whatever
    `train_examples` is. Training sees the first `train_examples` of the others. Whitening is fitted on all the others:
    from a few thousand images, ZCA of 3,072 pixels would blow up the directions that these hardly vary in.

    Raises:
        ConfigError: files are missing or damaged, or there are fewer examples than asked for, or than a batch has.
    """
    cuts = _Cuts(config.name, config.train_examples, config.test_examples, config.validation)
    if config.name == text.NAME:
        dataset = _windows(config.path, config.window, cuts)
    else:
        dataset = _prepared(files.folders(config.dir), cuts, config.whiten, config.binarize)
    keys = {"train_examples": config.train_examples, "validation": config.validation}
    reasons = ", ".join(f"data.{key} = {value}" for key, value in keys.items() if value)
    available = f"training examples of {config.name}" + (f" ({reasons})" if reasons else "")
    _check_at_most("batch_size", config.batch_size, dataset.examples, available)
    return dataset


class _Cuts(NamedTuple):
    """Which examples of a data set are used."""

    name: str
    """The data set."""

    train: int | None
    """How many are trained on, or all."""

    test: int | None
    """How many are tested on, or all."""

    validation: int
    """How many of the training examples stand in for the test set."""

    def left(self, train: int, test: int) -> int:
        """How many training examples are left, where there are so many of each.

        Raises:
            ConfigError: there are fewer than asked for.
        """
        if self.validation >= train:
            raise ConfigError(
                f"data.validation: {self.validation} leaves none of the {train} training examples of {self.name} to "
                f"train on; set it to {train - 1} or less"
            )
        left = train - self.validation
        reason = f" that data.validation = {self.validation} leaves" if self.validation else ""
        _check_at_most("train_examples", self.train, left, f"training examples of {self.name}{reason}")
        _check_at_most("test_examples", self.test, test, f"test examples of {self.name}")
        return left

    def of(self, train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The examples to train on, and those that are held out."""
        left = len(train) - self.validation
        held_out = train[left:] if self.validation else test[: self.test]
        return train[:left][: self.train], held_out

    @property
    def held_out_name(self) -> str:
        return "validation" if self.validation else "test"


# One set, not all: CIFAR-10 takes 180 MB.
@functools.lru_cache(maxsize=1)
def _raw(name: str, folders: tuple[Path, ...]) -> Raw:
    """All of a data set. The arms of an experiment take slices of it one after the other."""
    source = SOURCES[name]
    raw = source.read(files.opener(source, folders))
    for array in raw[:4]:
        array.setflags(write=False)
    return raw


@functools.cache
def _prepared(folders: tuple[Path, ...], cuts: _Cuts, whiten: bool, binarize: str) -> Dataset:
    """A data set with labels or targets, from the first of the folders that has it."""
    raw = _raw(cuts.name, folders)
    left = cuts.left(len(raw.train_y), len(raw.test_y))
    train_y, held_out_y = cuts.of(raw.train_y, raw.test_y)
    train_x, held_out_x = map(raw.scale, cuts.of(raw.train_x, raw.test_x))

    if whiten:
        whitening = zca(raw.train_x[:left], scale=raw.scale)
        train_x, held_out_x = whitening.apply(train_x), whitening.apply(held_out_x)

    if binarize != "none":
        drawn = cuts.of(*_black_and_white(raw, cuts, of_training=binarize == "fixed"))
        train_x, held_out_x = drawn if binarize == "fixed" else (train_x, drawn[1])

    for array in (train_x, held_out_x):
        array.setflags(write=False)
    return Dataset({"x": train_x, "y": train_y}, {"x": held_out_x, "y": held_out_y}, cuts.held_out_name, raw.classes)


def _black_and_white(raw: Raw, cuts: _Cuts, of_training: bool) -> tuple[np.ndarray, np.ndarray]:
    """The training and the test images, binarized where they are used. Those that are not used stay grey."""
    train, test = raw.train_x, raw.test_x
    # Binarized as a whole, so that an image is the same whatever is cut off.
    if of_training or cuts.validation:
        train = binarized(raw.scale(train), cuts.name, seed=0)
    if not cuts.validation:
        test = binarized(raw.scale(test), cuts.name, seed=1)
    return train, test


@functools.cache
def _windows(path: str | None, window: int, cuts: _Cuts) -> Dataset:
    """A text, or without a path that of the standard library."""
    train, test = text.read(path, window)
    cuts.left(len(train), len(test))
    train, held_out = cuts.of(train, test)
    return Dataset(
        train={"tokens": train},
        held_out={"tokens": held_out},
        held_out_name=cuts.held_out_name,
        classes=text.SYMBOLS,
        mapped=path is not None,
        at_a_time=max(1, _BYTES_AT_A_TIME // window),
        digest=text.digest(path),
    )


def _check_at_most(key: str, wanted: int | None, available: int, what: str) -> None:
    """Check that no more examples are wanted than there are.

    Raises:
        ConfigError: more are wanted.
    """
    if wanted is not None and wanted > available:
        raise ConfigError(f"data.{key}: {wanted} is more than the {available} {what}; set it to {available} or less")
