"""The texts that networks wrote at the end of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from experiments import files
from experiments.errors import ConfigError
from experiments.report.runs import Run

_FILE = "samples.jsonl"


@dataclasses.dataclass(frozen=True)
class Sample:
    """A text of a curve's first seed, after so many steps."""

    label: str
    step: int
    text: str


def read(runs: Sequence[Run]) -> list[Sample]:
    """The last text of each curve whose network writes any, in the order of the curves.

    Raises:
        ConfigError: a record has no text.
    """
    return [sample for run in runs for sample in _of_run(run)]


def _of_run(run: Run) -> list[Sample]:
    path = run.path / _FILE
    last = {}
    for number, record in files.read_lines(path) if path.is_file() else []:
        try:
            last[record["arm"], record["learning_rate"]] = int(record["step"]), _shown(record["texts"][0])
        except (KeyError, IndexError, TypeError, ValueError):
            raise ConfigError(f"{path}, line {number}: expected arm, learning_rate, step and texts") from None
    own = ((curve.label, last.get((curve.arm, curve.learning_rate))) for curve in run.curves)
    return [Sample(label, *found) for label, found in own if found]


def _shown(text: str) -> str:
    """With a sign in place of what has none."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
