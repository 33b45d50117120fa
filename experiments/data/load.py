"""Data sets, and the order in which training sees them.

A data set with labels is a module that says what `Source` it is, and its line in `SOURCES`. Text is windows of bytes.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from experiments.data import files, text
from experiments.data.batches import batch_indices
from experiments.data.binarize import binarized
from experiments.data.cifar10 import CIFAR10
from experiments.data.digits import DIGITS
from experiments.data.linear import LINEAR
from experiments.data.mnist import MNIST
from experiments.data.source import Raw, Source
from experiments.data.whitening import zca
from experiments.errors import ConfigError

if TYPE_CHECKING:  # the config asks this module which names there are
    from experiments.config.experiment import DataConfig

__all__ = ["NAMES", "SOURCES", "Dataset", "batch_indices", "load"]

SOURCES: dict[str, Source] = {source.name: source for source in (DIGITS, MNIST, CIFAR10, LINEAR)}
NAMES = (*SOURCES, text.NAME)
_BYTES_AT_A_TIME = 2**15  # of text, in evaluation


class Dataset(NamedTuple):
    """Arrays with the examples along their first axis.

    Those are "x" in float32, and "y", labels in int32 or targets in float32; or of text, "tokens" in uint8.
    `held_out_name` is "test" or "validation". Experiments share the arrays, which cannot be written. Where they are
    `mapped`, they lie in a file that may be larger than memory. `at_a_time` examples are evaluated together. `digest`
    tells one text from another; the files of other data sets are checked where they are read.
    """

    train: dict[str, np.ndarray]
    held_out: dict[str, np.ndarray]
    held_out_name: str
    classes: int
    mapped: bool = False
    at_a_time: int = 500
    digest: str = ""

    @property
    def examples(self) -> int:
        """How many there are to train on."""
        return len(next(iter(self.train.values())))


def load(config: DataConfig) -> Dataset:
    """The data set that `config` names, cut to the examples that it asks for, and whitened.

    The last `validation` training examples of the whole set are the held-out ones in place of the test set, whatever
    `train_examples` is; training sees the first `train_examples` of the others. Whitening is fitted on all the others:
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
    what = f"training examples of {config.name}" + (f" ({reasons})" if reasons else "")
    _check_at_most("batch_size", config.batch_size, dataset.examples, what)
    return dataset


class _Cuts(NamedTuple):
    """Which examples of a data set are used."""

    name: str
    train: int | None
    test: int | None
    validation: int

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
        return train[:left][: self.train], train[left:] if self.validation else test[: self.test]

    @property
    def held_out_name(self) -> str:
        return "validation" if self.validation else "test"


@functools.lru_cache(maxsize=1)
def _raw(name: str, folders: tuple[Path, ...]) -> Raw:
    """All of a data set; the arms of an experiment take slices of it one after the other."""
    source = SOURCES[name]
    raw = source.read(files.opener(source, folders))
    for array in raw[:4]:
        array.setflags(write=False)
    return raw


@functools.cache
def _prepared(folders: tuple[Path, ...], cuts: _Cuts, whiten: bool, binarize: str) -> Dataset:
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
    """The images binarized, as a whole, so that each is the same whatever is cut off; those that are not used, grey."""
    used = (of_training or cuts.validation > 0, cuts.validation == 0)
    sets = enumerate(zip((raw.train_x, raw.test_x), used, strict=True))
    train, test = (binarized(raw.scale(x), cuts.name, seed) if used else x for seed, (x, used) in sets)
    return train, test


@functools.cache
def _windows(path: str | None, window: int, cuts: _Cuts) -> Dataset:
    train, test = text.read(path, window)
    cuts.left(len(train), len(test))
    train, held_out = cuts.of(train, test)
    return Dataset(
        *({"tokens": train}, {"tokens": held_out}, cuts.held_out_name, text.SYMBOLS),
        mapped=path is not None,
        at_a_time=max(1, _BYTES_AT_A_TIME // window),
        digest=text.digest(path),
    )


def _check_at_most(key: str, wanted: int | None, available: int, what: str) -> None:
    if wanted is not None and wanted > available:
        raise ConfigError(f"data.{key}: {wanted} is more than the {available} {what}; set it to {available} or less")
