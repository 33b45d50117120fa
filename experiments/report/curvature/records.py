"""The records of `conditioning.jsonl` as arrays, and the numbers in them that figures and tables show."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pydantic
from pydantic import Field

from experiments import files
from experiments.errors import ConfigError
from experiments.run_folder.conditioning import KEYS, LEVELS
from experiments.run_folder.record import MEASURED
from experiments.schema import checked

Record = dict[str, Any]
"""A `run_folder.conditioning.Measurement` with its `seed` and `step`."""

Number = Callable[[Record], float]
"""A number in a record, NaN where there is none."""


class _Spectrum(pydantic.BaseModel):
    """The parts of a `run_folder.conditioning.Spectrum` that are shown. A number that is not finite is null."""

    size: int = 0
    exact: bool = True
    to_mean: float | None = None
    numerical_range: float | None = None
    to: dict[str, float | None] = {}
    above: Annotated[list[float | None], Field(min_length=len(LEVELS), max_length=len(LEVELS))] = []


class _Line(pydantic.BaseModel):
    """The parts of a record that are shown."""

    seed: int
    step: int
    coordinates: str
    difference: float | None
    cosine_natural: float | None
    cosine_gradient: float | None
    decrease: float | None
    matrices: dict[str, _Spectrum]


_LINE = pydantic.TypeAdapter(_Line)

_MATRICES = {
    "hessian": "Hessian",
    "fisher": "Fisher matrix",
    "empirical_fisher": "empirical Fisher matrix",
    "gradient_covariance": "covariance of gradients",
}


@dataclasses.dataclass(frozen=True)
class Curvature:
    """The records of one run. A place, a seed after a step, counts where all parametrizations were measured there."""

    run: str
    """The name of the run."""

    records: dict[tuple[str, int, int], Record]
    """The records by parametrization, seed and step."""

    @property
    def coordinates(self) -> list[str]:
        return list(dict.fromkeys(name for name, _, _ in self.records))

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for _, seed, _ in self.records})

    @property
    def steps(self) -> np.ndarray:
        """The steps at which all seeds were measured in all parametrizations."""
        steps = sorted({step for _, _, step in self.records})
        at_each = [(name, seed) for name in self.coordinates for seed in self.seeds]
        whole = [step for step in steps if all((name, seed, step) in self.records for name, seed in at_each)]
        return np.array(whole, int)

    @property
    def ends(self) -> list[int]:
        """The indices of the first and the last of `steps`, once where they are the same."""
        return list(dict.fromkeys((0, len(self.steps) - 1)))

    @property
    def matrices(self) -> list[str]:
        return list(dict.fromkeys(name for record in self.records.values() for name in record["matrices"]))

    def values(self, coordinates: str, number: Number) -> np.ndarray:
        """A number of each place, (steps, seeds), NaN where there is none."""
        rows = [[number(self.records[coordinates, seed, step]) for seed in self.seeds] for step in self.steps]
        return np.array(rows, float)


def read(path: Path, run: str) -> Curvature | None:
    """The records of a run folder, or None where it has none of a whole place.

    Raises:
        ConfigError: the file is damaged.
    """
    file = path / MEASURED
    if not os.path.lexists(file):
        return None
    records = {}
    for number, record in files.read_lines(file):
        if missing := [key for key in KEYS if key not in record]:
            raise ConfigError(f"{file}, line {number}: {', '.join(missing)} missing; remove or mend the line")
        checked(_LINE, record, f"{file}, line {number}")
        records[record["coordinates"], record["seed"], record["step"]] = record
    found = Curvature(run, records)
    return found if len(found.steps) else None


def title(matrix: str) -> str:
    """The name of a matrix, for people."""
    return _MATRICES.get(matrix, matrix)


def to_mean(matrix: str) -> Number:
    """The largest magnitude of an eigenvalue over the mean one."""
    return lambda record: _float(_spectrum(record, matrix).get("to_mean"))


def to_tenth(matrix: str) -> Number:
    """The largest eigenvalue over the tenth largest."""
    return lambda record: _float(_spectrum(record, matrix).get("to", {}).get("10"))


def to_smallest(matrix: str) -> Number:
    """The largest magnitude of an eigenvalue over the smallest one that can be told from 0."""
    return lambda record: _float(_spectrum(record, matrix).get("numerical_range"))


def cosine_natural(record: Record) -> float:
    """The cosine between a gradient step's move of the weights and the natural gradient."""
    return _float(record["cosine_natural"])


def cosine_gradient(record: Record) -> float:
    """The cosine between a gradient step's move of the weights and the gradient of plain weights."""
    return _float(record["cosine_gradient"])


def difference(record: Record) -> float:
    """The largest difference of outputs from those of plain weights, over the largest of the latter."""
    return _float(record["difference"])


def decrease_percent(record: Record) -> float:
    """The percentage of the loss that the best single step takes off."""
    return 100 * _float(record["decrease"])


def _spectrum(record: Record, matrix: str) -> dict[str, Any]:
    """The figures of a matrix. The natural gradient has those of the Fisher matrix alone."""
    return record["matrices"].get(matrix, {})


def _float(value: float | None) -> float:
    return np.nan if value is None else float(value)  # a number that is not finite is null in JSON
