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
    """An arm's figures. Ratios are to the arm that it is compared with."""

    against: str
    """The name of the arm that it is compared with."""

    milliseconds: list[float]
    """The milliseconds of a step, in each round."""

    ratio: float
    """The median of the ratios of times, each within a round."""

    spread: tuple[float, float]
    """The first and the third quartile of these ratios."""

    compile_seconds: list[float]
    """The seconds of each compilation."""

    compile_ratio: float | None
    """The median of the ratios of these; None where nothing is compiled."""

    peak_memory: int | None
    """The most bytes in use, as the compiler counts them, where it does."""

    memory_ratio: float | None
    """The ratio of the bytes, where both are known."""

    deviation: float
    """The largest difference of the output from that in float64, over the largest of the latter."""


@dataclasses.dataclass(frozen=True)
class Result:
    """The figures of a row."""

    row: Row
    """The row."""

    device: str
    """The device that it was timed on."""

    bytes: tuple[int, int]
    """The bytes that must move in a step: of the plain network, and with weight normalization."""

    cells: dict[str, Cell]
    """The figures of each arm."""

    missing: dict[str, str]
    """The libraries without an arm, and why."""

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
        """The examples that each arm takes in."""
        return {
            name: 1e3 * self.row.examples / statistics.median(cell.milliseconds) for name, cell in self.cells.items()
        }


def measure(row: Row, seconds: float, libraries: Sequence[str], on_step: Callable[[str], None]) -> Result:
    """Time a row for about `seconds`; `on_step` is told what is done next."""
    made, missing = _make(row, libraries, on_step)
    compilations = _compile(made, on_step)
    times = _time(made, seconds, on_step)
    cells = {name: cell(arm, made, times, compilations) for name, arm in made.items()}
    device = jax.devices()[0]
    return Result(row, f"{device.platform}: {device.device_kind}", bound.of(row), cells, missing)


def _make(row: Row, libraries: Sequence[str], on_step: Callable[[str], None]) -> tuple[dict[str, Arm], dict[str, str]]:
    """The arms by name; and the libraries that have none, and why. A library that fails does not stop the others."""
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
        except Exception as error:  # another library may fail in its own way on any machine
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
    """The milliseconds of a step, by arm and round: of as many rounds as fit, but a few at least."""
    alone = {}
    for name, arm in made.items():
        on_step(f"warm up {name}")
        alone[name] = _seconds(arm, 1)
    steps = max(1, math.ceil(_SECONDS_PER_TURN / min(alone.values())))
    fitting = int(seconds / (steps * sum(alone.values())))
    rounds = min(_MOST_ROUNDS, max(_FEWEST_ROUNDS, fitting))
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
    """The seconds that so many steps take."""
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
