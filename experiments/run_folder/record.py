"""The records of a run: what stands in each file of JSON lines, as types; reading, checking and writing a line.

It owns the names of the files, and the way from a record to its line and back. Which process writes when is `folder`'s,
and what a reader makes of the records that of `tensorboard` and `report`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments import files
from experiments.errors import ConfigError
from experiments.schema import shortened

CONFIG, ENVIRONMENT = "config.toml", "environment.json"
METRICS, TIMES, SAMPLES, MEASURED = "metrics.jsonl", "times.jsonl", "samples.jsonl", "conditioning.jsonl"

BY_LAYER = ("norms", "effective_step")
"""The keys of a record that hold figures of each layer's weight."""

_NONFINITE, _AT_FAULT = "nonfinite_step", "at_fault"  # marks, which are no figures

JsonLine = dict[str, Any]
"""A record as JSON has it."""

Numbers = list[float | None]
"""A number for each seed.

One that is not finite is NaN or infinite in a record that was just made, and None, which is JSON's null, in one that
was read from a file.
"""


@dataclasses.dataclass(frozen=True)
class Record:
    """A line of `metrics.jsonl`: what one arm at one learning rate learned up to a step."""

    arm: str
    """The arm's name."""

    learning_rate: float
    """One of the arm's."""

    step: int
    """How many steps were made."""

    figures: dict[str, Numbers]
    """By name: "train_loss" and others of training since the last record, "test_..." of held-out examples."""

    by_layer: dict[str, dict[str, Numbers]] = dataclasses.field(default_factory=dict)
    """By one of `BY_LAYER` and the path of the weight; empty where nothing was evaluated."""

    nonfinite_step: list[int | None] | None = None
    """For each seed the first step whose loss or update was not finite; None where all were."""

    at_fault: dict[str, str] = dataclasses.field(default_factory=dict)
    """By seed, as a string, the terms of the loss that were not finite at that step; of seeds with none, nothing."""

    def to_json(self) -> JsonLine:
        """The record as a line has it, keys in their order there; NaN is still NaN, which `line` makes null."""
        marks: JsonLine = {}
        if self.nonfinite_step is not None:
            marks[_NONFINITE] = self.nonfinite_step
        if self.at_fault:
            marks[_AT_FAULT] = self.at_fault
        place = {"arm": self.arm, "learning_rate": self.learning_rate, "step": self.step}
        return {**place, **self.figures, **self.by_layer, **marks}

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Record:
        """The record of a line, which `read_metrics` has checked, or `to_json` made."""
        at_fault = line.get(_AT_FAULT)
        return cls(
            arm=line["arm"],
            learning_rate=line["learning_rate"],
            step=line["step"],
            figures={key: value for key, value in line.items() if isinstance(value, list) and key != _NONFINITE},
            by_layer={kind: line[kind] for kind in BY_LAYER if line.get(kind)},
            nonfinite_step=line.get(_NONFINITE),
            at_fault=at_fault if isinstance(at_fault, dict) else {},
        )

    def by_tag(self) -> Iterator[tuple[str, Numbers]]:
        """All figures: the tag of each, which for a layer's is "norms/PATH", and its numbers."""
        yield from self.figures.items()
        for kind in BY_LAYER:
            for layer, numbers in self.by_layer.get(kind, {}).items():
                yield f"{kind}/{layer}", numbers


class Time(NamedTuple):
    """A line of `times.jsonl`: how long the steps up to a record took, of all seeds and rates of an arm together."""

    arm: str
    """The arm's name."""

    step: int
    """The step of the record."""

    seconds_per_step: float
    """The mean since the last record."""


class Sample(NamedTuple):
    """A line of `samples.jsonl`: texts that the networks of an arm at one learning rate wrote."""

    arm: str
    """The arm's name."""

    learning_rate: float
    """One of the arm's."""

    step: int
    """How many steps were made."""

    texts: list[str]
    """One a seed."""


def line(record: Mapping[str, Any]) -> str:
    """A record as a line of a file: JSON, in which numbers that are not finite are null."""
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[Record]:
    """All records of `metrics.jsonl`, each checked.

    Raises:
        ConfigError: the file cannot be read, or a line of it is no record.
    """
    lines = files.read_lines(path)
    seeds: dict[tuple[str, float], int] = {}
    for number, found in lines:
        where = f"{path}, line {number}"
        _check_kinds(found, where)
        # An arm has as many seeds at a rate as its first record there says.
        _check_numbers(found, seeds.setdefault((found["arm"], found["learning_rate"]), len(found["train_loss"])), where)
    return [Record.from_json(found) for _, found in lines]


def read_seconds(path: Path) -> dict[str, dict[int, float]]:
    """Seconds per step, by arm and step, of `times.jsonl`; nothing where there is no file, as times are a supplement.

    Raises:
        ConfigError: a line has no time.
    """
    seconds: dict[str, dict[int, float]] = {}
    for number, found in files.read_lines(path) if os.path.lexists(path) else []:
        try:
            seconds.setdefault(found["arm"], {})[found["step"]] = float(found["seconds_per_step"])
        except (KeyError, TypeError, ValueError):
            got = shortened(str(found))
            raise ConfigError(f"{path}, line {number}: expected arm, step and seconds_per_step; got {got}") from None
    return seconds


def read_records(path: Path, strict: bool = True) -> list[JsonLine]:
    """The lines of a file of records of arms, which a run goes on from; none where there is no file.

    As JSON, so that a run that goes on writes again what it has read, whichever version wrote it.

    Raises:
        ConfigError: a line is no record. If not `strict`, it is left out.
    """
    lines = files.read_lines(path, strict) if os.path.lexists(path) else []
    for number, found in lines:
        if strict and not (isinstance(found.get("step"), int) and "arm" in found):
            raise ConfigError(f"{path}, line {number}: has no arm or no step; remove or mend the line")
    return [found for _, found in lines if isinstance(found.get("step"), int)]


def read_measured(path: Path) -> list[JsonLine]:
    """The lines of `conditioning.jsonl`, which a run goes on from; none where there is no file.

    Only the place is asked for, as a run that goes on writes again what it has read, whichever version wrote it. The
    report, which shows the rest, too, asks for all of `conditioning.KEYS`.

    Raises:
        ConfigError: a line does not say where it was measured.
    """
    lines = files.read_lines(path) if os.path.lexists(path) else []
    for number, found in lines:
        if not {"seed", "step", "coordinates"} <= found.keys():
            raise ConfigError(f"{path}, line {number}: has no seed, step or coordinates; remove or mend the line")
    return [found for _, found in lines]


_LONGEST = 200  # letters of an arm's name
_KINDS: dict[str, type | tuple[type, ...]] = {
    "arm": str,
    "learning_rate": (int, float),
    "step": int,
    "train_loss": list,
}


def _check_kinds(found: JsonLine, where: str) -> None:
    """Check that a line has what every record has.

    Raises:
        ConfigError: it has not.
    """
    for key, kind in _KINDS.items():
        if not isinstance(found.get(key), kind):
            got = shortened(repr(found.get(key, "missing")))
            raise ConfigError(f"{where}: {key} is {got}; is this file from another program?")
    if len(found["arm"]) > _LONGEST or "\0" in found["arm"]:
        raise ConfigError(f"{where}: arm is {shortened(repr(found['arm']))}, which no folder of pictures can be called")


def _check_numbers(found: JsonLine, seeds: int, where: str) -> None:
    """Check that every list of a record has a number for each seed, and that there is one at least.

    Raises:
        ConfigError: one has not.
    """
    lists = [(key, value) for key, value in found.items() if isinstance(value, list) and key not in BY_LAYER]
    if found.get(_NONFINITE) is not None:
        lists.append((_NONFINITE, found[_NONFINITE]))
    for kind in BY_LAYER:
        layers = found.get(kind) or {}
        if not isinstance(layers, dict):
            raise ConfigError(f"{where}: {kind} must be a table of layers; got {shortened(repr(layers))}")
        lists += [(f"{kind}, {layer}", value) for layer, value in layers.items()]
    for name, values in lists:
        if not seeds or not isinstance(values, list) or len(values) != seeds or not all(map(_is_number, values)):
            what, got = f"a list of {max(seeds, 1)} numbers, one a seed", shortened(repr(values))
            raise ConfigError(f"{where}: {shortened(name)} must be {what}; got {got}")


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: those become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
