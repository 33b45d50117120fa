"""Curvature at the first and at the last place, as a table for people; at all places, as JSON for other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments import files
from experiments.report import spread
from experiments.report.curvature import records
from experiments.report.curvature.records import Curvature, Number, Record
from experiments.report.summary import Column, plus_minus

_FEW = 100  # rows of a matrix whose smallest eigenvalue is not yet rounding


class _Quantity(NamedTuple):
    """A number that is tabulated."""

    name: str
    """Its name in the table and in JSON."""

    number: Number
    """Where it is in a record."""

    digits: int
    """Its digits after the point, in the table."""


def columns(found: Curvature) -> list[Column]:
    """The columns of a table with a row for each parametrization."""
    view = [Column("parametrization", found.coordinates, is_text=True)]
    for quantity in _quantities(found):
        values = {name: found.values(name, quantity.number) for name in found.coordinates}
        for index in found.ends:
            cells = [_cell(values[name][index], quantity.digits) for name in found.coordinates]
            view.append(Column(f"{quantity.name}, step {found.steps[index]}", cells))
    return view


def caption(found: Curvature) -> str:
    """Sentences on the table's figures."""
    over = f"Mean ± standard error over {len(found.seeds)} seeds" if len(found.seeds) > 1 else "One seed"
    smallest = any("smallest" in quantity.name for quantity in _quantities(found))
    sentences = [
        f"{over}. Every parametrization stands for the same function.",
        "Largest / mean is of the magnitudes of eigenvalues; lower is better.",
        "Largest / smallest is without those that cannot be told from 0." if smallest else "",
        "The natural gradient's row is that of the Fisher matrix in its own, damped coordinates.",
        "The loss is a mean over examples, and the Fisher matrix equals the Gauss-Newton matrix.",
    ]
    return " ".join(filter(None, sentences))


def write_summary(found: Curvature, path: Path) -> None:
    """Write means and standard errors over seeds, by parametrization, quantity and step, as JSON.

    `over_plain` is the mean of the ratios to what plain weights have, seed by seed.
    """
    plain = found.coordinates[0]
    rows = []
    for name in found.coordinates:
        for quantity in _quantities(found):
            values, plain_values = found.values(name, quantity.number), found.values(plain, quantity.number)
            for step, own, other in zip(found.steps, values, plain_values, strict=True):
                where = {"parametrization": name, "quantity": quantity.name, "step": int(step)}
                rows.append({**where, **_over_seeds(own, ""), **_over_seeds(own / other, "over_plain_")})
    files.write(path, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def _quantities(found: Curvature) -> list[_Quantity]:
    """All that is tabulated, in the order of the columns."""
    all_records = found.records.values()
    known = [name for name in found.matrices if all(_smallest_is_known(record, name) for record in all_records)]
    to_smallest = [
        _Quantity(f"{records.title(name)}: largest / smallest", records.to_smallest(name), 1) for name in known
    ]
    to_mean = [_Quantity(f"{records.title(name)}: largest / mean", records.to_mean(name), 1) for name in found.matrices]
    return [
        *to_smallest,
        *to_mean,
        _Quantity("cosine with natural gradient", records.cosine_natural, 3),
        _Quantity("best step's decrease %", records.decrease_percent, 1),
    ]


def _smallest_is_known(record: Record, matrix: str) -> bool:
    """Whether the smallest eigenvalue means something.

    Among many, those of float32 products are rounding; and the Hessian of weight norm has one along each `v` that goes
    to 0 with the gradient, which is no property of the problem.
    """
    spectrum = record["matrices"].get(matrix, {"size": 0})
    return matrix != "hessian" and spectrum.get("size", 0) <= _FEW and spectrum.get("exact", True)


def _over_seeds(values: np.ndarray, prefix: str) -> dict[str, float | None]:
    return {f"{prefix}mean": spread.mean(values), f"{prefix}se": spread.standard_error(values)}


def _cell(values: np.ndarray, digits: int) -> str:
    return plus_minus(spread.mean(values), spread.standard_error(values), digits=digits)
