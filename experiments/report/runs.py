"""Reading run folders: what was recorded, as arrays, and what it took."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments import files
from experiments.errors import ConfigError
from experiments.schema import several

_FILES = ("config.toml", "environment.json", "metrics.jsonl")
_BY_LAYER = ("norms", "effective_step")
_KINDS: dict[str, type | tuple[type, ...]] = {
    "arm": str,
    "learning_rate": (int, float),
    "step": int,
    "train_loss": list,
}


@dataclasses.dataclass(frozen=True)
class Series:
    """One quantity over time: `steps` (records,) and `values` (records, seeds), NaN where not finite."""

    steps: np.ndarray
    values: np.ndarray


@dataclasses.dataclass(frozen=True)
class Curve:
    """What one arm recorded at one learning rate; the other fields of the run that a row or a figure needs with it.

    `metrics` are series by name, `norms` and `effective_step` by layer. `nonfinite` holds for each seed the step at
    which its loss first was not finite, or None, and `at_fault` by seed which terms of it were not, if it has terms.
    `seconds` are those per step, of all seeds and rates of the arm together, by the step of the record.
    """

    run: str
    arm: str
    learning_rate: float
    label: str
    metrics: dict[str, Series]
    norms: dict[str, Series]
    effective_step: dict[str, Series]
    nonfinite: tuple[int | None, ...]
    at_fault: dict[str, str]
    seconds: dict[int, float]

    @property
    def stayed_finite(self) -> np.ndarray:
        """By seed, whether its loss was finite throughout."""
        return np.array([step is None for step in self.nonfinite])

    @property
    def held_out(self) -> list[str]:
        """The metrics on held-out examples, the main one first: an error before a loss, both of the test set before
        others.
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
    """A run folder. `config` is the text of its TOML file; `steps` and `target_losses` are what that asks for."""

    path: Path
    name: str
    title: str
    config: str
    environment: dict[str, Any]
    steps: int | None
    target_losses: tuple[float, ...]
    first_seed: int
    curves: list[Curve]


def read(path: Path) -> Run:
    """Read one run folder.

    Raises:
        ConfigError: there is none at `path`, or a file of it is missing, empty or damaged. A last line that is not
            whole is no damage: the run was stopped while it wrote it.
    """
    if not path.is_dir():
        raise ConfigError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}; give a run folder")
    missing = [name for name in _FILES if not (path / name).is_file()]
    if missing:
        raise ConfigError(f"{path}: not a run folder: it has no {', '.join(missing)}")
    config = _text(path / "config.toml")
    tables = _toml(path / "config.toml", config)
    train = tables.get("train", {})
    name = path.resolve().name
    return Run(
        path=path,
        name=name,
        title=str(tables.get("name", name)),
        config=config,
        environment=_json(path / "environment.json"),
        steps=train.get("steps"),
        target_losses=tuple(several(train.get("target_loss", ()))),
        first_seed=train.get("first_seed", 0),
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
    members: dict[str, dict[float, dict[int, dict[str, Any]]]] = {}
    for record in _records(path / "metrics.jsonl"):  # of a step that was recorded twice, the later record counts
        members.setdefault(record["arm"], {}).setdefault(record["learning_rate"], {})[record["step"]] = record
    if not members:
        raise ConfigError(f"{path / 'metrics.jsonl'}: holds no record; the run ended before its first one")
    seconds = _seconds(path / "times.jsonl")
    curves = []
    for arm, rates in members.items():
        for rate, by_step in sorted(rates.items()):
            records = [by_step[step] for step in sorted(by_step)]
            names = dict.fromkeys(name for record in records for name in _metrics(record))
            curves.append(
                Curve(
                    run=run,
                    arm=arm,
                    learning_rate=rate,
                    label=arm if len(rates) == 1 else f"{arm}, rate {rate:g}",
                    metrics={name: _series(records, name) for name in names},
                    norms=_by_layer(records, "norms"),
                    effective_step=_by_layer(records, "effective_step"),
                    nonfinite=_nonfinite(records),
                    at_fault=_at_fault(records),
                    seconds=seconds.get(arm, {}),
                )
            )
    return curves


def _records(path: Path) -> list[dict[str, Any]]:
    records = files.read_lines(path)
    seeds: dict[tuple[str, float], int] = {}
    for number, record in records:
        where = f"{path}, line {number}"
        for key, kind in _KINDS.items():
            if not isinstance(record.get(key), kind):
                raise ConfigError(
                    f"{where}: {key} is {record.get(key, 'missing')!r}; is this file from another program?"
                )
        expected = seeds.setdefault((record["arm"], record["learning_rate"]), len(record["train_loss"]))
        for name, values in _lists(record):
            if not expected or not isinstance(values, list) or len(values) != expected or not _numbers(values):
                raise ConfigError(
                    f"{where}: {name} must be a list of {max(expected, 1)} numbers, one a seed; got {values!r}"
                )
    return [record for _, record in records]


def _lists(record: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Everything in a record that has a number a seed, with its name."""
    layers = [(f"{key}, {layer}", v) for key in _BY_LAYER for layer, v in (record.get(key) or {}).items()]
    return [(key, value) for key, value in record.items() if isinstance(value, list)] + layers


def _metrics(record: Mapping[str, Any]) -> list[str]:
    return [key for key, value in record.items() if isinstance(value, list) and key != "nonfinite_step"]


def _numbers(values: list[Any]) -> bool:
    return all(value is None or isinstance(value, (int, float)) for value in values)


def _series(records: list[dict[str, Any]], name: str) -> Series:
    own = [record for record in records if name in record]
    values = np.array([record[name] for record in own], float)  # null reads as NaN
    return Series(np.array([record["step"] for record in own]), np.where(np.isfinite(values), values, np.nan))


def _by_layer(records: list[dict[str, Any]], key: str) -> dict[str, Series]:
    own = [{"step": record["step"], **record[key]} for record in records if record.get(key)]
    layers = dict.fromkeys(layer for record in own for layer in record if layer != "step")
    return {layer: _series(own, layer) for layer in layers}


def _nonfinite(records: list[dict[str, Any]]) -> tuple[int | None, ...]:
    """By seed, the step that the run noted, or else that of the first record without a finite loss."""
    losses = _series(records, "train_loss")
    noted = [record["nonfinite_step"] for record in records if "nonfinite_step" in record]
    first = []
    for seed in range(losses.values.shape[1]):
        steps = [int(step) for step in losses.steps[np.isnan(losses.values[:, seed])]]
        steps += [note[seed] for note in noted if note[seed] is not None]
        first.append(min(steps, default=None))
    return tuple(first)


def _at_fault(records: list[dict[str, Any]]) -> dict[str, str]:
    """By seed, which terms of the loss the run found not to be finite when it first was not."""
    noted = [record["at_fault"] for record in records if isinstance(record.get("at_fault"), dict)]
    return {str(seed): str(terms) for note in reversed(noted) for seed, terms in note.items()}


def _seconds(path: Path) -> dict[str, dict[int, float]]:
    """Seconds per step by arm and step; times are a supplement, so a run folder may be without them."""
    seconds: dict[str, dict[int, float]] = {}
    for number, record in files.read_lines(path) if path.is_file() else []:
        try:
            seconds.setdefault(record["arm"], {})[record["step"]] = float(record["seconds_per_step"])
        except (KeyError, TypeError, ValueError):
            raise ConfigError(f"{path}, line {number}: expected arm, step and seconds_per_step; got {record}") from None
    return seconds


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def _toml(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(path))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must be a JSON object; got {value!r}")
    return value
