"""The `[data]` table of a config. Its keys are obeyed in `load`, and by the tasks that draw pixels."""

from __future__ import annotations

from typing import Literal

import pydantic

from experiments.data import names
from experiments.schema import Count, CountOrZero, Table, unknown


class DataConfig(Table):
    """The data set, and how many examples a step sees."""

    name: str
    """One of `names.NAMES`."""

    batch_size: Count
    """Examples a step."""

    dir: str | None = None
    """The folder where the files lie. Default: the environment variable WN_JAX_DATA, else where `fetch` puts them."""

    path: str | None = None
    """Of `text`, the file. Default: the source of Python's standard library."""

    window: Count = 256
    """Of `text`, how many bytes make an example."""

    whiten: bool = False
    """Whether to apply ZCA, fitted on all training examples that are not held out."""

    binarize: Literal["none", "fixed", "dynamic"] = "none"
    """How pixels from 0 to 1 become black or white, at random with the grey value as probability.

    "fixed": once and for all. "dynamic": only those that are held out, so that training draws its own anew each time.
    """

    train_examples: Count | None = None
    """How many training examples are used: the first ones. Default: all."""

    test_examples: Count | None = None
    """How many test examples are used: the first ones. Default: all."""

    validation: CountOrZero = 0
    """How many training examples are left out of training, the last ones.

    They stand in for the test set, to choose hyperparameters on.
    """

    @pydantic.model_validator(mode="after")
    def _one_held_out_set(self) -> DataConfig:
        if self.validation and self.test_examples:
            raise ValueError("test_examples has no meaning with validation examples, which stand in for the test set")
        return self

    @pydantic.model_validator(mode="after")
    def _keys_have_a_meaning(self) -> DataConfig:
        others = ("dir", "whiten", "binarize") if self.name == "text" else ("path", "window")
        for key in others:
            # A resolved config writes every key out, so a default that stands there is no error.
            if key in self.model_fields_set and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} has no meaning for {self.name}; leave it out")
        if self.whiten and self.binarize != "none":
            raise ValueError("whiten makes of pixels other numbers than the 0 to 1 of binarize; leave one out")
        return self

    @pydantic.field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in names.NAMES:
            raise ValueError(unknown("data set", name, names.NAMES))
        return name
