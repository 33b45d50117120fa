"""Run folders as a report reads them: the records of each arm and rate as arrays, and what the config asked for.

A line of a file is `run_folder.record`'s. What a report makes of the arrays is in the files beside this one.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pydantic
from pydantic import FiniteFloat

from experiments import environment, files
from experiments.errors import ConfigError
from experiments.run_folder.record import (
    CONFIG,
    ENVIRONMENT,
    METRICS,
    TIMES,
    Numbers,
    Record,
    read_metrics,
    read_seconds,
)
from experiments.schema import checked, several, shortened

_FILES = (CONFIG, ENVIRONMENT, METRICS)


class _Train(pydantic.BaseModel):
    """The part of a config's `[train]` that a report needs, whichever version wrote it."""

    steps: int | None = None
    target_loss: Annotated[tuple[FiniteFloat, ...], pydantic.BeforeValidator(several)] = ()
    first_seed: int = 0


class _Asked(pydantic.BaseModel):
    """The part of a config that a report needs."""

    name: str | None = None
    train: _Train = _Train()


_ASKED = pydantic.TypeAdapter(_Asked)


@dataclasses.dataclass(frozen=True)
class Series:
    """One quantity over time."""

    steps: np.ndarray
    """(records,), ascending."""

    values: np.ndarray
    """(records, seeds), NaN where not finite."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """The records of one arm at one learning rate, and what of its run a row or a figure needs with them."""

    run: str
    """The name of the run."""

    arm: str
    """The name of the arm."""

    learning_rate: float
    """One of the arm's."""

    label: str
    """The words that tell this curve from all others of the report."""

    metrics: dict[str, Series]
    """By name, all but what follows."""

    norms: dict[str, Series]
    """By layer, the norms of the vectors that are trained."""

    effective_step: dict[str, Series]
    """By layer, how far a step turns its weight."""

    nonfinite: tuple[int | None, ...]
    """For each seed the step at which its loss first was not finite, or None."""

    at_fault: dict[str, str]
    """By seed, which terms of its loss were not finite then, if it has terms."""

    seconds: dict[int, float]
    """By the step of the record, the seconds per step, of all seeds and rates of the arm together."""

    @property
    def stayed_finite(self) -> np.ndarray:
        """By seed, whether its loss was finite throughout."""
        return np.array([step is None for step in self.nonfinite])

    @property
    def held_out(self) -> list[str]:
        """The metrics on held-out examples, the main one first.

        An error comes before a loss, and both of the test set before others.
        """
        names = [name for name in self.metrics if not name.startswith("train_")]
        main = ("_error", "_loss")

        def rank(name: str) -> tuple[bool, ...]:
            return not name.endswith(main[0]), not name.endswith(main[1]), not name.startswith("test")

        return sorted(names, key=rank)

    @property
    def terms(self) -> list[str]:
        """The metrics on held-out examples that the loss is made of."""
        in_training = {name.removeprefix("train_") for name in self.metrics if name.startswith("train_")} - {"loss"}
        return [name for name in self.held_out if name.partition("_")[2] in in_training]

    @property
    def metric(self) -> str | None:
        """The main metric on held-out examples."""
        return next(iter(self.held_out), None)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder."""

    path: Path
    """The folder."""

    name: str
    """Its name; of several runs with the same, its path."""

    title: str
    """The name of the experiment."""

    config: str
    """The text of its TOML file."""

    environment: dict[str, Any]
    """Versions and hardware, as `environment.json` has them."""

    steps: int | None
    """The length of training, which the config asks for."""

    target_losses: tuple[float, ...]
    """The training losses to which it has steps counted."""

    first_seed: int
    """The first of its seeds, which follow each other."""

    curves: list[Curve]
    """Arms in the order of their first records, rates ascending."""


def read(path: Path) -> Run:
    """Read one run folder.

    Raises:
        ConfigError: there is none at `path`, or a file of it is missing, empty or damaged. A last line that is not
            whole is no damage: the run was stopped while it wrote it.
    """
    if not os.path.isdir(path):
        what = "not a folder" if os.path.exists(path) else "no such folder"
        raise ConfigError(f"{shortened(str(path))}: {what}; give a run folder")
    missing = [name for name in _FILES if not os.path.lexists(path / name)]
    if missing:
        raise ConfigError(f"{path}: not a run folder: it has no {', '.join(missing)}")
    config = files.load(path / CONFIG, files.text)
    asked = checked(_ASKED, files.load(path / CONFIG, files.toml), str(path / CONFIG))
    name = path.resolve().name
    return Run(
        path=path,
        name=name,
        title=asked.name or name,
        config=config,
        environment=environment.read(path / ENVIRONMENT),
        steps=asked.train.steps,
        target_losses=asked.train.target_loss,
        first_seed=asked.train.first_seed,
        curves=_curves(path, name),
    )


def read_all(paths: Iterable[Path]) -> list[Run]:
    """Read run folders, each once; of several, every label names the run.

    Raises:
        ConfigError: as `read`; or none is given.
    """
    runs = [read(path) for path in {path.resolve(): path for path in paths}.values()]
    if not runs:
        raise ConfigError("no run folder given; name one or more")
    if len(runs) == 1:
        return runs
    names = [run.name for run in runs]
    return [_named(run, run.name if names.count(run.name) == 1 else str(run.path)) for run in runs]


def _named(run: Run, name: str) -> Run:
    curves = [dataclasses.replace(curve, run=name, label=f"{name}: {curve.label}") for curve in run.curves]
    return dataclasses.replace(run, name=name, curves=curves)


def _curves(path: Path, run: str) -> list[Curve]:
    """A curve for each arm and learning rate: arms in the order of their first records, rates ascending."""
    members: dict[str, dict[float, dict[int, Record]]] = {}
    for record in read_metrics(path / METRICS):  # of a step that was recorded twice, the later record counts
        members.setdefault(record.arm, {}).setdefault(record.learning_rate, {})[record.step] = record
    if not members:
        raise ConfigError(f"{path / METRICS}: holds no record; the run ended before its first one")
    seconds = read_seconds(path / TIMES)
    return [
        _curve(
            [by_step[step] for step in sorted(by_step)],
            run=run,
            label=arm if len(rates) == 1 else f"{arm}, rate {rate:g}",
            seconds=seconds.get(arm, {}),
        )
        for arm, rates in members.items()
        for rate, by_step in sorted(rates.items())
    ]


def _curve(records: list[Record], run: str, label: str, seconds: dict[int, float]) -> Curve:
    """The curve of these records of one arm and rate, in the order of their steps."""
    return Curve(
        run=run,
        arm=records[0].arm,
        learning_rate=records[0].learning_rate,
        label=label,
        metrics=_by_name(records, lambda record: record.figures),
        norms=_by_name(records, lambda record: record.by_layer.get("norms", {})),
        effective_step=_by_name(records, lambda record: record.by_layer.get("effective_step", {})),
        nonfinite=_nonfinite(records),
        at_fault=_at_fault(records),
        seconds=seconds,
    )


def _by_name(records: list[Record], figures: Callable[[Record], Mapping[str, Numbers]]) -> dict[str, Series]:
    """A series of each figure, from the records that have it."""
    points: dict[str, list[tuple[int, Numbers]]] = {}
    for record in records:
        for name, numbers in figures(record).items():
            points.setdefault(name, []).append((record.step, numbers))
    return {name: _series(own) for name, own in points.items()}


def _series(points: list[tuple[int, Numbers]]) -> Series:
    steps, numbers = zip(*points, strict=True)
    values = np.array(numbers, float)  # null reads as NaN
    return Series(np.array(steps), np.where(np.isfinite(values), values, np.nan))


def _nonfinite(records: list[Record]) -> tuple[int | None, ...]:
    """By seed, the step that the run noted, or else that of the first record without a finite loss."""
    losses = _series([(record.step, record.figures["train_loss"]) for record in records])
    noted = [record.nonfinite_step for record in records if record.nonfinite_step is not None]
    first = []
    for seed in range(losses.values.shape[1]):
        steps = [int(step) for step in losses.steps[np.isnan(losses.values[:, seed])]]
        steps += [step for note in noted if (step := note[seed]) is not None]
        first.append(min(steps, default=None))
    return tuple(first)


def _at_fault(records: list[Record]) -> dict[str, str]:
    """By seed, which terms of the loss the run found not to be finite when it first was not."""
    # From the last record to the first, so that of several notes on a seed the first counts.
    return {str(seed): str(terms) for record in reversed(records) for seed, terms in record.at_fault.items()}
