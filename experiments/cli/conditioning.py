"""The command `conditioning`."""

from __future__ import annotations

from experiments.cli.execution import execute
from experiments.cli.options import ConfigFile, RunOptions
from experiments.cli.terminal import user_errors
from experiments.config import toml_file


def conditioning(config_file: ConfigFile, *, options: RunOptions) -> None:
    """Train the arms of CONFIG, and measure the loss's curvature along the weights of one, in many parametrizations."""
    with user_errors():
        experiment = toml_file.load(config_file, options.settings)
        execute(config_file, experiment, options, then_measure=True)
