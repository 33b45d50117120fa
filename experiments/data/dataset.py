"""A data set as training sees it. Which files it comes from, `source` says."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Dataset(NamedTuple):
    """Arrays with the examples along their first axis. Experiments share them, and they cannot be written.

    A dictionary of arrays holds "x" in float32, and "y", labels in int32 or targets in float32. Of text, it holds
    "tokens" in uint8.
    """

    train: dict[str, np.ndarray]
    """The examples to train on."""

    held_out: dict[str, np.ndarray]
    """The examples to evaluate on."""

    held_out_name: str
    """Where these come from: "test" or "validation"."""

    classes: int
    """How many labels there are. Of text, the number of symbols; where targets are numbers, 1."""

    mapped: bool = False
    """Whether the arrays lie in a file that may be larger than memory."""

    at_a_time: int = 500
    """How many examples are evaluated together."""

    digest: str = ""
    """Tells one text from another. The files of other data sets are checked where they are read."""

    @property
    def examples(self) -> int:
        """How many there are to train on."""
        return len(next(iter(self.train.values())))
