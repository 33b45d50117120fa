"""The commands that measure how long things take."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from experiments import interrupt, overhead, step_time, toml_file
from experiments.options import ArmName, ConfigFile, Settings, one_arm
from experiments.terminal import about_config, console, interruptible, progress_bar, user_errors


def time_steps(
    only: Annotated[
        list[str] | None, typer.Option(help="Measure this model. May be repeated. Default: all.", metavar="NAME")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds over which the median is taken.")] = 31,
    json: Annotated[Path | None, typer.Option(help="Write everything that was measured to this file.")] = None,
    serving: Annotated[
        bool, typer.Option("--serving", help="Measure a forward pass on one input instead: what folding saves.")
    ] = False,
) -> None:
    """Measure a training step with weight normalization against the plain model's; print a table of the ratios."""
    with user_errors():
        cases, rows = step_time.choose(only or (), serving), list[step_time.Row]()
        if json:
            step_time.write([], json)  # one that cannot be written is an error now, not after minutes
        try:
            for row in _measure(cases, rounds):
                rows.append(row)
                if json:
                    step_time.write(rows, json)
        finally:  # after a Ctrl-C, what is complete
            if rows:
                console.print(step_time.table(rows))
                console.print(step_time.machine(), soft_wrap=True)


def measure_overhead(
    config_file: ConfigFile,
    set_: Settings = None,
    arm: ArmName = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds over which the median is taken.")] = 11,
) -> None:
    """Measure what the engine adds to the bare jitted step of one arm of CONFIG."""
    with user_errors(), interruptible(lambda: "interrupted"):
        experiment = one_arm(toml_file.load(config_file, set_ or ()), arm, config_file)
        with about_config(config_file):
            found = overhead.measure(experiment, rounds, interrupt.check)
        console.print(
            f"bare step {statistics.median(found.bare):.2f} ms, engine {statistics.median(found.engine):.2f} ms, "
            f"ratio {found.ratio():.3f} (medians over {rounds} rounds of {experiment.train.record_every} steps)"
        )
        console.print(step_time.machine(), soft_wrap=True)


def _measure(cases: list[step_time.Case], rounds: int) -> Iterator[step_time.Row]:
    with interruptible(lambda: "interrupted"), progress_bar() as progress:
        task = progress.add_task("", total=len(cases) * rounds)

        def on_round() -> None:
            interrupt.check()
            progress.advance(task)

        for case in cases:
            progress.update(task, description=case.name)
            yield step_time.measure(case, rounds, on_round)
