"""The whole way of a vocoder: port, train, fold, export, and files that one can hear and see."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tomli_w

import wn_jax as wn
from experiments import files
from experiments.environment import environment
from experiments.errors import ConfigError, RunError
from experiments.vocoder import checkpoint, picture, sound
from experiments.vocoder.config import VocoderConfig
from experiments.vocoder.hifigan import Generator
from experiments.vocoder.mel import log_mel
from experiments.vocoder.tuning import check_finite, mel_loss, tune


@dataclasses.dataclass(frozen=True)
class Result:
    """The figures of a run."""

    before: float
    """The mel loss before training."""

    after: float
    """The mel loss after training."""

    levels: tuple[float, float]
    """The levels of the target and of the sound after training.

    A level is the root mean square in dB of full scale, less a constant part.
    """

    folded_apart: float
    """The largest difference of the folded generator's sound from the live one's."""

    exported_apart: float
    """The largest difference of the exported generator's sound from the live one's."""


def run(config: VocoderConfig, source: Path | None, out: Path, on_step: Callable[[int, float], None]) -> Result:
    """Load a generator, train it, and write everything to a folder.

    Arguments:
        config: the vocoder.
        source: the checkpoint. None: one of random weights is made, as PyTorch would write it.
        out: the folder, new or empty.
        on_step: is given each step and its loss.

    Raises:
        ConfigError: the folder or the checkpoint cannot be used. Nothing was written then.
        RunError: training diverged, or a file could not be written.
    """
    _check_folder(out)
    # Before anything is written, so that a wrong checkpoint leaves no folder behind.
    ported = None if source is None else checkpoint.load(config.generator, source)
    target = _target(config)
    mel = jax.jit(log_mel(config))(target[None])
    live, loss = jax.jit(wn.wrap(Generator(config.generator).apply)), jax.jit(mel_loss(config))
    try:
        files.write(out / "config.toml", tomli_w.dumps(config.model_dump(mode="json")))
        files.write(out / "environment.json", json.dumps(environment(), indent=2) + "\n")
        if ported is None:
            ported = checkpoint.load(config.generator, _random_checkpoint(config, out))
        trained = _trained(config, ported, mel, out, on_step)
        before, after = live(ported, mel), live(trained, mel)
        losses = [float(loss(variables, mel)) for variables in (ported, trained)]
        check_finite(config, losses[1], config.tuning.steps + 1)
        _write_sounds(config, {"target": target, "before": before[0], "after": after[0]}, out)
        apart = _write_served(config, trained, mel, after, out)
    except OSError as error:
        raise RunError(
            f"{out}: cannot be written to: {error}; make room or change permissions, and begin anew with another --out"
        ) from None
    return Result(losses[0], losses[1], (_level(target), _level(after[0])), *apart)


def _check_folder(path: Path) -> None:
    """Raise where a new run cannot be written to this folder.

    Raises:
        ConfigError: it has something in it, or is none.
    """
    try:
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path}: is a file; choose another folder with --out")
        if path.exists() and any(path.iterdir()):
            raise ConfigError(f"{path}: already exists and is not empty; choose another folder with --out")
    except OSError as error:
        raise ConfigError(f"{path}: the folder cannot be used: {error}; choose another one with --out") from None


def _export(generator: Generator, plain: Any) -> bytes:
    """The folded generator as StableHLO, for any number of sounds and of frames, on CPU, CUDA and TPU."""
    shape = jax.export.symbolic_shape(f"batch, frames, {generator.config.model_in_dim}")
    function = jax.jit(lambda mel: generator.apply(plain, mel))
    exported = jax.export.export(function, platforms=("cpu", "cuda", "tpu"))
    return bytes(exported(jax.ShapeDtypeStruct(shape, jnp.float32)).serialize())


def _random_checkpoint(config: VocoderConfig, out: Path) -> Path:
    """A checkpoint of random weights, in a file."""
    path = out / "checkpoint.safetensors"
    files.write(path, safetensors.numpy.save(checkpoint.random_state_dict(config.generator, config.tuning.seed)))
    return path


def _target(config: VocoderConfig) -> np.ndarray:
    """The sound to train towards, of whole frames."""
    hop, rate = config.generator.hop_length, config.mel.sampling_rate
    frames = int(config.tuning.seconds * rate) // hop
    return sound.chord(config.tuning.seconds, rate, frames * hop)


def _level(waveform: Any) -> float:
    """The level in dB of full scale; of silence -180, and not minus infinity."""
    return 20 * math.log10(max(float(np.std(waveform)), 1e-9))


def _trained(
    config: VocoderConfig, variables: Any, mel: jax.Array, out: Path, on_step: Callable[[int, float], None]
) -> Any:
    """Train, write the losses on the way into a file, and return the variables."""
    records = ""
    for step, loss, new in tune(config, variables, mel):
        on_step(step, loss)
        variables = new
        if step % config.tuning.record_every == 0:
            records += json.dumps({"step": step, "mel_loss": loss}) + "\n"
            files.write(out / "metrics.jsonl", records)
    return variables


def _write_sounds(config: VocoderConfig, sounds: dict[str, Any], out: Path) -> None:
    """Write WAV files, and a picture of the log-mel spectrograms."""
    spectrogram, rate = jax.jit(log_mel(config)), config.mel.sampling_rate
    for name, waveform in sounds.items():
        files.write(out / f"{name}.wav", sound.wav(np.asarray(waveform), rate))
    mels = {name: np.asarray(spectrogram(jnp.asarray(waveform)[None])[0]) for name, waveform in sounds.items()}
    files.write(out / "spectrograms.png", picture.spectrograms(mels, len(sounds["target"]) / rate))


def _write_served(
    config: VocoderConfig, variables: Any, mel: jax.Array, live: jax.Array, out: Path
) -> tuple[float, float]:
    """Write the generator as it is served, and return how far it is from the live one: folded, and exported.

    The files are PyTorch's state dicts of the live and of the folded generator, and StableHLO of the latter.
    """
    generator, plain = Generator(config.generator), wn.reconstruct(variables)
    for name, tree in (("generator", variables), ("generator-folded", plain)):
        state = checkpoint.state_dict(config.generator, tree)
        files.write(out / f"{name}.safetensors", safetensors.numpy.save(state))
    exported = _export(generator, plain)
    files.write(out / "generator.stablehlo", exported)
    folded = jax.jit(generator.apply)(plain, mel)
    served = jax.export.deserialize(bytearray(exported)).call(mel)
    return float(jnp.max(jnp.abs(folded - live))), float(jnp.max(jnp.abs(served - live)))
