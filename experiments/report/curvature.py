"""What `python -m experiments conditioning` recorded, as figures and a table."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments import files
from experiments.conditioning.measure import LEVELS
from experiments.errors import ConfigError
from experiments.report import spread
from experiments.report.charts import Chart, Line, Panel
from experiments.report.summary import Column, plus_minus
from experiments.run_folder.folder import MEASURED

_FEW = 100
_MATRICES = {
    "hessian": "Hessian",
    "fisher": "Fisher matrix",
    "empirical_fisher": "empirical Fisher matrix",
    "gradient_covariance": "covariance of gradients",
}
Number = Callable[[dict[str, Any]], Any]
"""A number in a record."""

_KEYS = (
    "seed",
    "step",
    "coordinates",
    "loss",
    "difference",
    "cosine_natural",
    "cosine_gradient",
    "decrease",
    "matrices",
)


@dataclasses.dataclass(frozen=True)
class Curvature:
    """The records of one run by parametrization, seed and step. A place counts where all of these are there."""

    run: str
    records: dict[tuple[str, int, int], dict[str, Any]]

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
        whole = [
            step for step in steps if all((c, s, step) in self.records for c in self.coordinates for s in self.seeds)
        ]
        return np.array(whole, int)

    @property
    def matrices(self) -> list[str]:
        return list(dict.fromkeys(name for record in self.records.values() for name in record["matrices"]))

    def values(self, coordinates: str, number: Number) -> np.ndarray:
        """A number of each place, (steps, seeds, ...), NaN where there is none."""
        rows = [[number(self.records[coordinates, seed, step]) for seed in self.seeds] for step in self.steps]
        return np.array(rows, float)


def read(path: Path, run: str) -> Curvature | None:
    """What a run folder holds of it; None where it holds nothing.

    Raises:
        ConfigError: the file is damaged.
    """
    if not (path / MEASURED).is_file():
        return None
    records = {}
    for number, record in files.read_lines(path / MEASURED):
        if missing := [key for key in _KEYS if key not in record]:
            raise ConfigError(
                f"{path / MEASURED}, line {number}: {', '.join(missing)} missing; remove or mend the line"
            )
        records[record["coordinates"], record["seed"], record["step"]] = record
    found = Curvature(run, records)
    return found if len(found.steps) else None


def charts(found: Curvature, named: bool) -> list[Chart]:
    """Condition numbers, spectra, alignment and decrease along training; headings name the run if `named`."""
    of = f" of {found.run}" if named else ""
    error = "Bands are one standard error over seeds to each side." if len(found.seeds) > 1 else "One seed."
    conditions = [
        _panel(
            found,
            _MATRICES.get(name, name),
            "largest |λ| / mean |λ|",
            functools.partial(_to_mean, matrix=name),
            log_y=True,
        )
        for name in found.matrices
    ]
    tenths = [
        _panel(found, _MATRICES.get(name, name), "λ₁ / λ₁₀", functools.partial(_to_tenth, matrix=name), log_y=True)
        for name in found.matrices
    ]
    ends = dict.fromkeys((0, len(found.steps) - 1))
    spectra = [_spectrum(found, name, index) for name in _shown(found) for index in ends]
    alignment = [
        _panel(found, "with the natural gradient", "cosine", lambda record: record["cosine_natural"]),
        _panel(found, "with the gradient of plain weights", "cosine", lambda record: record["cosine_gradient"]),
    ]
    decrease = [_panel(found, "best step", "decrease of the loss (%)", lambda record: 100 * record["decrease"])]
    largest = max(float(record["difference"]) for record in found.records.values())
    shown = [
        (
            "condition", "How badly conditioned the loss is",
            "The largest magnitude of an eigenvalue over the mean one, along the weights of plain training: 1 is "
            "ideal. A gradient step that suits the steepest direction is so many times too small for the mean one. At "
            "each place, the network computes the same function in all parametrizations (largest relative difference "
            f"{largest:.0e}).",
            conditions,
        ),
        (
            "tenth", "The outermost eigenvalues",
            "The largest eigenvalue over the tenth largest. A network of ten classes has about as many that stand out.",
            tenths,
        ),
        (
            "spectrum", "Spectra",
            "The fraction of eigenvalues above each level, in units of the largest, at the first and the last place. "
            "The more even a spectrum is, the higher lies its line.",
            spectra,
        ),
        (
            "alignment", "Where a gradient step moves the weights",
            "The cosine between the direction in which a small step of gradient descent in each parametrization moves "
            "the weights, and that of the (damped) natural gradient, or that of plain weights.",
            alignment,
        ),
        (
            "decrease", "What the best single step gains",
            "By how much the best of 25 step sizes along the negative gradient lowers the loss on the examples.",
            decrease,
        ),
    ]  # fmt: skip
    suffix = f"-{found.run}" if named else ""
    made = []
    for id_, title, caption, panels in shown:
        if filled := [panel for panel in panels if panel.lines]:
            own_caption = f"{caption} {error}"
            made.append(Chart(f"{id_}{suffix}", f"{title}{of}", own_caption, filled, shared=len(filled) > 1))
    return made


def columns(found: Curvature) -> list[Column]:
    """A row for each parametrization: at the first and at the last place."""
    view = [Column("parametrization", found.coordinates, is_text=True)]
    for heading, number, digits in _quantities(found):
        for index in dict.fromkeys((0, len(found.steps) - 1)):
            cells = [_cell(found.values(name, number)[index], digits) for name in found.coordinates]
            view.append(Column(f"{heading}, step {found.steps[index]}", cells))
    return view


def write_summary(found: Curvature, path: Path) -> None:
    """Means and standard errors over seeds, by parametrization, quantity and step, as JSON for other programs.

    `over_plain` is the mean of the ratios to what plain weights have, seed by seed.
    """
    rows = []
    for name in found.coordinates:
        for quantity, number, _ in _quantities(found):
            own, plain = found.values(name, number), found.values(found.coordinates[0], number)
            for step, values, others in zip(found.steps, own, plain, strict=True):
                where = {"parametrization": name, "quantity": quantity, "step": int(step)}
                rows.append({**where, **_spread(values, ""), **_spread(values / others, "over_plain_")})
    files.write(path, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def _spread(values: np.ndarray, prefix: str) -> dict[str, float | None]:
    return {f"{prefix}mean": spread.mean(values), f"{prefix}se": spread.standard_error(values)}


def caption(found: Curvature) -> str:
    """What the table's figures are."""
    over = f"Mean ± standard error over {len(found.seeds)} seeds" if len(found.seeds) > 1 else "One seed"
    smallest = any("smallest" in heading for heading, _, _ in _quantities(found))
    sentences = [
        f"{over}. Every parametrization stands for the same function.",
        "Largest / mean is of the magnitudes of eigenvalues; lower is better.",
        "Largest / smallest is without those that cannot be told from 0." if smallest else "",
        "The natural gradient's row is that of the Fisher matrix in its own, damped coordinates.",
        "The loss is a mean over examples, and the Fisher matrix equals the Gauss-Newton matrix.",
    ]
    return " ".join(filter(None, sentences))


def _quantities(found: Curvature) -> list[tuple[str, Number, int]]:
    """What is tabulated: its name, the number in a record, and its digits."""
    small = [
        name for name in found.matrices if all(_smallest_is_known(record, name) for record in found.records.values())
    ]
    return [
        *(
            (f"{_MATRICES.get(name, name)}: largest / smallest", functools.partial(_to_smallest, matrix=name), 1)
            for name in small
        ),
        *(
            (f"{_MATRICES.get(name, name)}: largest / mean", functools.partial(_to_mean, matrix=name), 1)
            for name in found.matrices
        ),
        ("cosine with natural gradient", lambda record: record["cosine_natural"], 3),
        ("best step's decrease %", lambda record: 100 * record["decrease"], 1),
    ]


def _panel(found: Curvature, title: str, y_label: str, number: Number, log_y: bool = False) -> Panel:
    lines = []
    for style, name in enumerate(found.coordinates):
        values = found.values(name, number)
        if np.isfinite(values).any():
            lines.append(Line(name, style, found.steps, values.mean(axis=1), spread.over_seeds(values)))
    return Panel(title, "step", y_label, lines, log_y=log_y)


def _shown(found: Curvature) -> list[str]:
    return ["fisher"] if "fisher" in found.matrices else found.matrices[:1]


def _spectrum(found: Curvature, matrix: str, index: int) -> Panel:
    lines = []
    for style, name in enumerate(found.coordinates):
        rows = [found.records[name, seed, int(found.steps[index])] for seed in found.seeds]
        if all(matrix in record["matrices"] for record in rows):
            above = np.array([record["matrices"][matrix]["above"] for record in rows], float).T
            above = np.where(above > 0, above, np.nan)  # a logarithmic axis has no 0
            lines.append(Line(name, style, LEVELS, above.mean(axis=-1), spread.over_seeds(above)))
    title = f"{_MATRICES.get(matrix, matrix)} at step {found.steps[index]}"
    return Panel(title, "|λ| / largest", "fraction above", lines, log_x=True, log_y=True)


def _to_mean(record: dict[str, Any], matrix: str) -> float:
    value = record["matrices"].get(matrix, {}).get("to_mean")
    return np.nan if value is None else float(value)


def _smallest_is_known(record: dict[str, Any], matrix: str) -> bool:
    """Whether the smallest eigenvalue means something.

    Among many, those of float32 products are rounding; and the Hessian of weight norm has one along each `v` that goes
    to 0 with the gradient, which is no property of the problem.
    """
    found = record["matrices"].get(matrix, {"size": 0})
    return matrix != "hessian" and found.get("size", 0) <= _FEW and found.get("exact", True)


def _to_smallest(record: dict[str, Any], matrix: str) -> float:
    value = record["matrices"].get(matrix, {}).get("numerical_range")
    return np.nan if value is None else float(value)


def _to_tenth(record: dict[str, Any], matrix: str) -> float:
    value = record["matrices"].get(matrix, {}).get("to", {}).get("10")
    return np.nan if value is None else float(value)


def _cell(values: np.ndarray, digits: int) -> str:
    return plus_minus(spread.mean(values), spread.standard_error(values), digits=digits)
