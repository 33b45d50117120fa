"""The command `overhead`."""

from __future__ import annotations

import statistics
from typing import Annotated

import typer

from experiments.bench import overhead as measuring
from experiments.bench import table
from experiments.cli import interrupt
from experiments.cli.options import ArmName, ConfigFile, Settings, one_arm
from experiments.cli.terminal import about_config, console, interruptible, user_errors
from experiments.config import toml_file
from experiments.environment import environment


def overhead(
    config_file: ConfigFile,
    set_: Settings = None,
    arm: ArmName = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds over which the median is taken.")] = 11,
) -> None:
    """Measure what the engine adds to the bare jitted step of one arm of CONFIG."""
    with user_errors(), interruptible(lambda: "interrupted"):
        experiment = one_arm(toml_file.load(config_file, set_ or ()), arm, config_file)
        with about_config(config_file):
            found = measuring.measure(experiment, rounds, interrupt.check)
        console.print(
            f"bare step {statistics.median(found.bare):.2f} ms, engine {statistics.median(found.engine):.2f} ms, "
            f"ratio {found.ratio():.3f} (medians over {rounds} rounds of {experiment.train.record_every} steps)"
        )
        console.print(table.where(environment()), soft_wrap=True)
