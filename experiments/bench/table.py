"""The results for people: tables of cells, and these as Markdown. The command line draws them for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from experiments.bench.measure import Cell, Result

LIBRARIES = {
    "wn_jax": "wn_jax",
    "linen": "flax.linen",
    "nnx": "flax.nnx",
    "equinox": "equinox",
    "paramax": "paramax",
    "torch": "torch",
    "torch compiled": "torch compiled",
}
"""The arms of the main table, and the names of their columns."""

WAYS = {
    "on weights": 'scale="weight"',
    "on outputs": 'scale="output"',
    "projected": "project_directions",
    "carried": "carried norm",
    "norm for free": "norm for free",
    "each time": "norm each microbatch",
    "folded": "folded",
}
"""The other arms of wn_jax, and the names of their columns."""

_NAMED = ("jax", "flax", "equinox", "paramax", "torch")
_HEAD = ("row", "plain ms", "bound")


def times(results: Sequence[Result]) -> list[list[str]]:
    """The ratio of times to the library's own plain model. Of wn_jax and the control, also their middle halves."""
    shown = [name for name in LIBRARIES if any(name in result.cells for result in results)]
    head = [*_HEAD, *(LIBRARIES[name] for name in shown), "control"]
    rows = [
        [
            *_first(result),
            *(_cell(result, name, _with_spread if name == "wn_jax" else _ratio) for name in shown),
            _cell(result, "control", _with_spread),
        ]
        for result in results
    ]
    return [head, *rows]


def ways(results: Sequence[Result]) -> list[list[str]]:
    """The same for the ways that wn_jax has."""
    shown = [name for name in WAYS if any(name in result.cells for result in results)]
    rows = [
        [result.row.title, *(_cell(result, name, _ratio) for name in ("wn_jax", *shown))]
        for result in results
        if any(name in result.cells for name in shown)
    ]
    return [["row", "wn_jax", *(WAYS[name] for name in shown)], *rows] if rows else []


def costs(results: Sequence[Result]) -> list[list[str]]:
    """The other costs of the libraries: compilation, memory, the deviation from float64; and examples a second."""
    shown = [name for name in LIBRARIES if any(name in result.cells for result in results)]
    figures: tuple[tuple[str, Callable[[Cell], str]], ...] = (
        ("compile", lambda cell: "-" if cell.compile_ratio is None else f"{cell.compile_ratio:.2f}"),
        ("memory", lambda cell: "-" if cell.memory_ratio is None else f"{cell.memory_ratio:.2f}"),
        ("off by", lambda cell: f"{cell.deviation:.0e}"),
    )
    head = ["row", "figure", *(LIBRARIES[name] for name in shown), "plain"]
    rows = []
    for result in results:
        for title, figure in figures:
            plain = _plain_figure(result.cells["linen plain"], title)
            rows.append([result.row.title, title, *(_cell(result, name, figure) for name in shown), plain])
        speed = result.examples_per_second
        speeds = (f"{speed[name]:.3g}" if name in speed else "-" for name in (*shown, "linen plain"))
        rows.append([result.row.title, "per second", *speeds])
    return [head, *rows]


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """A table of cells, the first row its head."""
    head, *rows = cells
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def where(facts: dict[str, Any]) -> str:
    """Where and when this was measured, in one line.

    Arguments:
        facts: the environment's.
    """
    packages = ", ".join(f"{name} {facts['packages'][name]}" for name in _NAMED if name in facts["packages"])
    memory = ", freed memory kept" if facts.get("freed_memory_kept") else ""
    return f"{facts['started'][:10]}, {packages}, {', '.join(facts['devices'])}, {facts['cpus']} CPU cores{memory}"


def _first(result: Result) -> list[str]:
    return [result.row.title, f"{result.plain:.3g}", f"{result.bound:.2f}"]


def _cell(result: Result, name: str, figure: Callable[[Cell], str]) -> str:
    return figure(result.cells[name]) if name in result.cells else "-"


def _ratio(cell: Cell) -> str:
    return f"{cell.ratio:.2f}"


def _with_spread(cell: Cell) -> str:
    return f"{cell.ratio:.2f} ({cell.spread[0]:.2f}-{cell.spread[1]:.2f})"


def _plain_figure(cell: Cell, title: str) -> str:
    if title == "compile":
        return f"{sorted(cell.compile_seconds)[len(cell.compile_seconds) // 2]:.2f} s"
    if title == "memory":
        return f"{(cell.peak_memory or 0) / 2**20:.0f} MiB"
    return f"{cell.deviation:.0e}"
