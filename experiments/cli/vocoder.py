"""The command `vocoder`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from experiments.cli import interrupt
from experiments.cli.options import ConfigFile, Out, Settings, new_folder
from experiments.cli.terminal import console, interruptible, progress_bar, user_errors
from experiments.config import toml_file
from experiments.vocoder.config import VocoderConfig
from experiments.vocoder.run import run

Checkpoint = Annotated[
    Path | None,
    typer.Option(
        help="A PyTorch state dict with weight norms (.safetensors). Default: random weights.", metavar="FILE"
    ),
]


def vocoder(config_file: ConfigFile, checkpoint: Checkpoint = None, set_: Settings = None, out: Out = None) -> None:
    """Port a HiFi-GAN generator from PyTorch, train it on (g, v) towards a sound, fold, export, and write WAV files."""
    with user_errors():
        config = toml_file.load_table(VocoderConfig, config_file, set_ or ())
        path = out or new_folder(config.name)
        with interruptible(lambda: f"interrupted; {path} is not complete"), progress_bar() as progress:
            task = progress.add_task("compiling", total=config.tuning.steps)

            def on_step(step: int, loss: float) -> None:
                interrupt.check()
                progress.update(task, completed=step, description=f"mel loss {loss:.4f}")

            result = run(config, checkpoint, path, on_step)
            interrupt.check()
        console.print(
            f"mel loss {result.before:.4f} before, {result.after:.4f} after {config.tuning.steps} steps\n"
            f"level {result.levels[1]:.1f} dB of full scale, of the target {result.levels[0]:.1f}\n"
            f"folded is apart from live by {result.folded_apart:.1e}, exported by {result.exported_apart:.1e}\n"
            f"listen to {path / 'after.wav'}, look at {path / 'spectrograms.png'}\nall of it: {path}",
            soft_wrap=True,
            markup=False,
        )
