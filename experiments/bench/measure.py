"""Timing the arms of a row side by side.

All arms of a row run in one process, in turn, so that whatever else the machine does falls on all of them: each round
runs every arm for the same number of steps, in a random order, and a ratio is taken within a round.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import jax

from experiments.bench import bound
from experiments.bench.arms import Arm, CannotError
from experiments.bench.libraries import arms
from experiments.bench.rows import Row

_SECONDS_PER_TURN = 0.05  # of one arm in one round; much less, and the clock and the dispatch would be in it
_MOST_ROUNDS, _FEWEST_ROUNDS = 41, 4
_COMPILATIONS, _COMPILE_SECONDS = 3, 20.0


@dataclasses.dataclass(frozen=True)
class Cell:
    """An arm's figures: of each round the milliseconds of a step, and of each compilation the seconds.

    `spread` has the quartiles of the ratio of times.
    """

    against: str
    milliseconds: list[float]
    ratio: float
    spread: tuple[float, float]
    compile_seconds: list[float]
    compile_ratio: float | None
    peak_memory: int | None
    memory_ratio: float | None
    deviation: float


@dataclasses.dataclass(frozen=True)
class Result:
    """A row's cells by arm, the bytes that must move (plain, and with weight norm), and who has no cell, and why."""

    row: Row
    device: str
    bytes: tuple[int, int]
    cells: dict[str, Cell]
    missing: dict[str, str]

    @property
    def bound(self) -> float:
        """The ratio of the bytes."""
        return self.bytes[1] / self.bytes[0]

    @property
    def plain(self) -> float:
        """The milliseconds of a plain step."""
        return statistics.median(self.cells["linen plain"].milliseconds)

    @property
    def examples_per_second(self) -> dict[str, float]:
        """How many examples each arm takes in."""
        return {name: 1e3 * self.row.examples / statistics.median(c.milliseconds) for name, c in self.cells.items()}


def measure(row: Row, seconds: float, libraries: Sequence[str], on_step: Callable[[str], None]) -> Result:
    """Time a row for about `seconds`; `on_step` is told what is done next."""
    made, missing = _make(row, libraries, on_step)
    compilations = _compile(made, on_step)
    times = _time(made, seconds, on_step)
    cells = {name: cell(arm, made, times, compilations) for name, arm in made.items()}
    device = jax.devices()[0]
    return Result(row, f"{device.platform}: {device.device_kind}", bound.of(row), cells, missing)


def _make(row: Row, libraries: Sequence[str], on_step: Callable[[str], None]) -> tuple[dict[str, Arm], dict[str, str]]:
    """The arms by name, and of libraries that have none, why. A library that fails does not stop the others."""
    made, missing = dict[str, Arm](), dict[str, str]()
    for library, make in arms(row, libraries).items():
        on_step(f"compile {library}")
        try:
            new = {arm.name: arm for arm in make()}
            for arm in new.values():
                arm.run(1)
                if arm.against not in {**made, **new}:
                    raise CannotError(f"{arm.against} could not be made")
            made |= new
        except CannotError as reason:
            missing[library] = str(reason)
        except Exception as error:
            if library == "wn_jax":
                raise
            missing[library] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return made, missing


def _compile(made: dict[str, Arm], on_step: Callable[[str], None]) -> dict[str, list[float]]:
    """The seconds that each takes to compile: several times in turn, but once where that takes long."""
    seconds: dict[str, list[float]] = {name: [] for name in made}
    start = time.perf_counter()
    for _ in range(_COMPILATIONS):
        for name, arm in made.items():
            if arm.compile:
                on_step(f"compile {name} again")
                seconds[name].append(arm.compile())
        if time.perf_counter() - start > _COMPILE_SECONDS:
            break
    return seconds


def _time(made: dict[str, Arm], seconds: float, on_step: Callable[[str], None]) -> dict[str, list[float]]:
    """The milliseconds of a step, by arm and round.

    PyTorch's arms take their turns after all others, as its threads keep a core busy for a while after each.
    """
    groups = [{name: arm for name, arm in made.items() if arm.of_torch is of_torch} for of_torch in (False, True)]
    times = dict[str, list[float]]()
    for group in filter(None, groups):
        gc.collect()
        times |= _take_turns(group, seconds * len(group) / len(made), on_step)
    return times


def _take_turns(made: dict[str, Arm], seconds: float, on_step: Callable[[str], None]) -> dict[str, list[float]]:
    """As many rounds as fit, but a few at least."""
    alone = {}
    for name, arm in made.items():
        on_step(f"warm up {name}")
        alone[name] = _seconds(arm, 1)
    steps = max(1, math.ceil(_SECONDS_PER_TURN / min(alone.values())))
    rounds = min(_MOST_ROUNDS, max(_FEWEST_ROUNDS, int(seconds / (steps * sum(alone.values())))))
    times: dict[str, list[float]] = {name: [] for name in made}
    for round_, order in enumerate(_orders(list(made), rounds), 1):
        for name in order:
            on_step(f"round {round_} of {rounds}, {name}")
            times[name].append(1e3 * _seconds(made[name], steps) / steps)
    return times


def _orders(names: list[str], rounds: int) -> Iterator[list[str]]:
    """A random order for each round: whoever followed the same arm each time would find the same caches."""
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(names)
        yield list(names)


def _seconds(arm: Arm, steps: int) -> float:
    start = time.perf_counter()
    arm.run(steps)
    return time.perf_counter() - start


def cell(arm: Arm, made: dict[str, Arm], times: dict[str, list[float]], compilations: dict[str, list[float]]) -> Cell:
    """An arm's figures, from what was measured of all."""
    plain = made[arm.against]
    ratios = [own / other for own, other in zip(times[arm.name], times[plain.name], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else [ratios[0]] * 3
    compiled = [own / other for own, other in zip(compilations[arm.name], compilations[plain.name], strict=True)]
    return Cell(
        against=arm.against,
        milliseconds=times[arm.name],
        ratio=statistics.median(ratios),
        spread=(quartiles[0], quartiles[2]),
        compile_seconds=compilations[arm.name],
        compile_ratio=statistics.median(compiled) if compiled else None,
        peak_memory=arm.peak_memory,
        memory_ratio=arm.peak_memory / plain.peak_memory if arm.peak_memory and plain.peak_memory else None,
        deviation=arm.deviation,
    )
