"""The texts that networks wrote at the end of a run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from experiments import files
from experiments.errors import ConfigError
from experiments.report.runs import Run
from experiments.run_folder.record import SAMPLES


@dataclasses.dataclass(frozen=True)
class Sample:
    """A text by a curve's first seed."""

    label: str
    """The name of the curve."""

    step: int
    """The steps after which it was written."""

    text: str
    """The text, with a sign in place of letters that cannot be shown."""


def read(runs: Sequence[Run]) -> list[Sample]:
    """The last text of each curve whose network writes any, in the order of the curves.

    Raises:
        ConfigError: a record has no text.
    """
    return [sample for run in runs for sample in _of_run(run)]


def _of_run(run: Run) -> list[Sample]:
    """The last text of each curve of a run."""
    path = run.path / SAMPLES
    if not os.path.lexists(path):
        return []
    last = {}
    for number, record in files.read_lines(path):
        try:
            last[record["arm"], record["learning_rate"]] = int(record["step"]), _shown(record["texts"][0])
        except (KeyError, IndexError, OverflowError, TypeError, ValueError):
            raise ConfigError(f"{path}, line {number}: expected arm, learning_rate, step and texts") from None
    own = ((curve.label, last.get((curve.arm, curve.learning_rate))) for curve in run.curves)
    return [Sample(label, *found) for label, found in own if found]


def _shown(text: str) -> str:
    """The text, with a sign in place of each letter that cannot be shown."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
