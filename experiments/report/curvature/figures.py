"""The figures of curvature along training, as numbers; `report.curves` and `report.svg` draw them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from experiments.report import spread
from experiments.report.charts import Chart, Line, Panel
from experiments.report.curvature import records
from experiments.report.curvature.records import Curvature, Number
from experiments.run_folder.conditioning import LEVELS


def charts(found: Curvature, named: bool) -> list[Chart]:
    """Condition numbers, spectra, alignment and decrease along training; headings name the run if `named`."""
    kinds: list[Callable[[Curvature], Chart]] = [_condition, _tenth, _spectra, _alignment, _decrease]
    made = []
    for kind in kinds:
        chart = kind(found)
        filled = [panel for panel in chart.panels if panel.lines]
        if filled:
            made.append(_finished(chart, filled, found, named))
    return made


def _finished(chart: Chart, panels: list[Panel], found: Curvature, named: bool) -> Chart:
    """A chart with those panels that show something, and with what its caption and its heading say of the run."""
    error = "Bands are one standard error over seeds to each side." if len(found.seeds) > 1 else "One seed."
    return Chart(
        id=f"{chart.id}-{found.run}" if named else chart.id,
        title=f"{chart.title} of {found.run}" if named else chart.title,
        caption=f"{chart.caption} {error}",
        panels=panels,
        shared=len(panels) > 1,
    )


def _condition(found: Curvature) -> Chart:
    largest = max(map(records.difference, found.records.values()))
    caption = (
        "The largest magnitude of an eigenvalue over the mean one, along the weights of plain training: 1 is "
        "ideal. A gradient step that suits the steepest direction is so many times too small for the mean one. At "
        "each place, the network computes the same function in all parametrizations (largest relative difference "
        f"{largest:.0e})."
    )
    panels = [
        _over_steps(found, records.title(name), "largest |λ| / mean |λ|", records.to_mean(name), log_y=True)
        for name in found.matrices
    ]
    return Chart("condition", "How badly conditioned the loss is", caption, panels)


def _tenth(found: Curvature) -> Chart:
    caption = (
        "The largest eigenvalue over the tenth largest. A network of ten classes has about as many that stand out."
    )
    panels = [
        _over_steps(found, records.title(name), "λ₁ / λ₁₀", records.to_tenth(name), log_y=True)
        for name in found.matrices
    ]
    return Chart("tenth", "The outermost eigenvalues", caption, panels)


def _spectra(found: Curvature) -> Chart:
    caption = (
        "The fraction of eigenvalues above each level, in units of the largest, at the first and the last place. "
        "The more even a spectrum is, the higher lies its line."
    )
    # Of one matrix, as each takes two panels: of the Fisher matrix, which the natural gradient has, too.
    shown = ["fisher"] if "fisher" in found.matrices else found.matrices[:1]
    panels = [_spectrum(found, name, index) for name in shown for index in found.ends]
    return Chart("spectrum", "Spectra", caption, panels)


def _alignment(found: Curvature) -> Chart:
    caption = (
        "The cosine between the direction in which a small step of gradient descent in each parametrization moves "
        "the weights, and that of the (damped) natural gradient, or that of plain weights."
    )
    panels = [
        _over_steps(found, "with the natural gradient", "cosine", records.cosine_natural),
        _over_steps(found, "with the gradient of plain weights", "cosine", records.cosine_gradient),
    ]
    return Chart("alignment", "Where a gradient step moves the weights", caption, panels)


def _decrease(found: Curvature) -> Chart:
    caption = "By how much the best of 25 step sizes along the negative gradient lowers the loss on the examples."
    panels = [_over_steps(found, "best step", "decrease of the loss (%)", records.decrease_percent)]
    return Chart("decrease", "What the best single step gains", caption, panels)


def _over_steps(found: Curvature, title: str, y_label: str, number: Number, log_y: bool = False) -> Panel:
    """A number against steps, a line for each parametrization that has it."""
    lines = []
    for style, name in enumerate(found.coordinates):
        values = found.values(name, number)
        if np.isfinite(values).any():
            lines.append(Line(name, style, found.steps, values.mean(axis=1), spread.over_seeds(values)))
    return Panel(title, "step", y_label, lines, log_y=log_y)


def _spectrum(found: Curvature, matrix: str, index: int) -> Panel:
    """The fraction of eigenvalues above each level at one step, a line for each parametrization that has the matrix."""
    step = int(found.steps[index])
    lines = []
    for style, name in enumerate(found.coordinates):
        matrices = [found.records[name, seed, step]["matrices"] for seed in found.seeds]
        if all(matrix in own for own in matrices):
            above = np.array([own[matrix]["above"] for own in matrices], float).T
            above = np.where(above > 0, above, np.nan)  # a logarithmic axis has no 0
            lines.append(Line(name, style, LEVELS, above.mean(axis=-1), spread.over_seeds(above)))
    title = f"{records.title(matrix)} at step {step}"
    return Panel(title, "|λ| / largest", "fraction above", lines, log_x=True, log_y=True)
