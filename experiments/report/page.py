"""The report as one HTML page that needs nothing else: no network, no other file."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import jinja2

from experiments.drawing import COLOURS, look
from experiments.report import charts, curvature, pictures, samples, summary, svg
from experiments.report.charts import Chart
from experiments.report.curvature import Curvature
from experiments.report.runs import Curve, Run
from experiments.report.summary import Row

_POINTS = 3000  # of all lines of a figure together: more than the picture has pixels across, and small enough to send


def page(runs: Sequence[Run], rows: Sequence[Row], measured: Sequence[Curvature], heading: str) -> str:
    """The page's HTML."""
    figures = [
        *(chart for found in measured for chart in curvature.charts(found, named=len(runs) > 1)),
        *charts.over_time(runs, rows, _POINTS),
        *charts.sweep(runs, rows),
        *charts.layers(runs, rows, _POINTS),
    ]
    return _template().render(
        heading=heading,
        runs=[_how_made(run) for run in runs],
        incomplete=[sentence for run in runs for sentence in _incomplete(run)],
        tables=[*(_curvature(found, named=len(runs) > 1) for found in measured), *_results(rows)],
        figures=[{"chart": chart, "pictures": svg.pictures(chart), "legend": _legend(chart)} for chart in figures],
        diverged=[sentence for run in runs for sentence in _diverged(run)],
        samples=samples.read(runs),
        pictures=pictures.read(runs),
        terms=any(curve.terms for run in runs for curve in run.curves),
        log_likelihood=any(figure.metric.endswith("log_likelihood") for row in rows for figure in row.others),
        sweep=any(row.chosen for row in rows),
        spread=any(row.seeds > 1 for row in rows),
    )


def _template() -> jinja2.Template:
    """The template of the page. A name that it does not get is an error, and not an empty place."""
    loader = jinja2.PackageLoader("experiments.report", package_path=".")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.jinja")


def _results(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The table of results, and that of steps to targets where there are several."""
    columns, caption = summary.columns(rows), " ".join(summary.caption(rows))
    results = {"id": "results", "title": "Results", "columns": columns, "caption": caption}
    if not summary.has_several_targets(rows):
        return [results]
    columns, caption = summary.steps_columns(rows), summary.steps_caption(rows)
    return [results, {"id": "steps", "title": "Steps to training losses", "columns": columns, "caption": caption}]


def _curvature(found: Curvature, named: bool) -> dict[str, Any]:
    """The table of one run's curvature."""
    return {
        "id": f"curvature-{found.run}" if named else "curvature",
        "title": f"Curvature of {found.run}" if named else "Curvature at the same function",
        "columns": curvature.columns(found),
        "caption": curvature.caption(found),
    }


def _legend(chart: Chart) -> list[dict[str, Any]]:
    """An entry for each look, in the order of the lines."""
    lines = {(line.label, line.style): line for panel in chart.panels for line in panel.lines}
    return [
        {
            "label": line.label,
            "series": line.style % len(COLOURS),
            "dashes": " ".join(f"{2 * dash:g}" for dash in look(line.style)[1]),
        }
        for line in lines.values()
    ]


def _incomplete(run: Run) -> list[str]:
    """A sentence where a run has not come to its end."""
    reached = min(int(curve.metrics["train_loss"].steps[-1]) for curve in run.curves)
    if run.steps is None or reached >= run.steps:
        return []
    return [f"{run.name} is not complete: its last common record is that of step {reached} of {run.steps}."]


def _diverged(run: Run) -> list[str]:
    """A sentence for each curve of which seeds diverged: which, when, and by which terms of the loss."""
    sentences = []
    for curve in run.curves:
        by_step = _diverged_seeds(curve, run.first_seed)
        if by_step:
            count = sum(map(len, by_step.values()))
            places = [
                f"at step {step} seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}"
                for step, seeds in sorted(by_step.items())
            ]
            sentences.append(f"{curve.label}: {summary.diverged(count, len(curve.nonfinite))}: {'; '.join(places)}.")
    return sentences


def _diverged_seeds(curve: Curve, first_seed: int) -> dict[int, list[str]]:
    """The seeds that diverged, by step; with each the terms of the loss that were not finite, where it has terms."""
    by_step: dict[int, list[str]] = {}
    for seed, step in enumerate(curve.nonfinite, first_seed):
        if step is not None:
            terms = curve.at_fault.get(str(seed))
            by_step.setdefault(step, []).append(f"{seed} ({terms})" if terms else str(seed))
    return by_step


def _how_made(run: Run) -> dict[str, Any]:
    """The name of a run, the facts that it took place in, and its config."""
    first = run.environment
    facts = {**_facts(first), "Packages": _packages(first)}
    for number, later in enumerate(first.get("resumed", []), 1):
        changed = {name: text for name, text in _facts(later).items() if text != facts[name]}
        facts[f"Went on, {number}"] = "; ".join(f"{name.lower()}: {text}" for name, text in changed.items())
    return {"name": run.name, "title": run.title, "facts": facts, "config": run.config}


def _facts(environment: dict[str, Any]) -> dict[str, str]:
    """The facts of one start of a run, by the names under which the page lists them."""
    cpus, processes = environment.get("cpus", "unknown"), environment.get("processes", 1)
    devices = collections.Counter(map(str, environment.get("devices", [])))
    kinds = ", ".join(kind if count == 1 else f"{count} x {kind}" for kind, count in devices.items()) or "unknown"
    several = f" in {processes} processes" if processes != 1 else ""
    return {
        "Started": _known(environment.get("started")),
        "Command": _known(environment.get("command")),
        "Commit": _known(environment.get("commit")),
        "Hardware": f"{kinds}{several}; CPUs: {cpus}",
        "Platform": _known(environment.get("platform")),
        "Python": _known(environment.get("python")),
    }


def _packages(environment: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in environment.get("packages", {}).items()) or "unknown"


def _known(value: Any) -> str:
    return "unknown" if value is None else str(value)
