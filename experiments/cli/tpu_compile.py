"""The command `tpu-compile`: plain against weight norm, in the TPU compiler's words."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from rich.markup import escape
from rich.table import Table

from experiments import files
from experiments.cli import interrupt, tables
from experiments.cli.options import ArmName, ConfigFile, Settings, one_arm
from experiments.cli.terminal import about_config, console, interruptible, user_errors
from experiments.config import toml_file
from experiments.config.experiment import ArmConfig
from experiments.devices import mesh
from experiments.engine.arm import Arm
from experiments.environment import environment
from experiments.errors import ConfigError, RunError
from experiments.tpu import topology
from experiments.tpu.compiled import Compiled, compile_step, lower, prepare
from experiments.tpu.traffic import Collective

ARMS = ("plain", "weight_norm")


def tpu_compile(
    config_file: ConfigFile,
    topology_: Annotated[str, typer.Option("--topology", help="The TPU and its chips: v5e:2x4.", metavar="KIND:CHIPS")],
    set_: Settings = None,
    arm: ArmName = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
) -> None:
    """Compile the training step of one arm of CONFIG for a TPU, plain and weight-normalized; no TPU is needed."""
    interrupt.at_once()
    with user_errors(), interruptible(lambda: "interrupted"):
        jax.config.update("jax_platforms", "cpu")  # what JAX computes itself, it does here
        jax.config.update("jax_enable_compilation_cache", False)  # whose hits would be taken for the time to compile
        experiment = one_arm(toml_file.load(config_file, set_ or ()), arm, config_file)
        (config,) = experiment.arms.values()
        if json_:
            _check_writable(json_)
        devices = topology.devices(topology_)
        with about_config(config_file):
            arms = {weights: prepare(_with_weights(config, weights), devices) for weights in ARMS}
            found = _compile(arms)
        shape = mesh.Shape(**arms["plain"].placement.mesh.shape)
        console.print(table(found, f"{experiment.name} on {topology_}"))
        console.print(
            f"One step, each chip's part, on the mesh {shape}. {_caption(found)}", soft_wrap=True, highlight=False
        )
        if json_:
            what = {"topology": topology_, "mesh": shape._asdict(), "config": config.model_dump(mode="json")}
            _write(json_, what | {name: dataclasses.asdict(step) for name, step in found.items()})


def table(found: dict[str, Compiled], title: str) -> Table:
    """The figures of both, and their ratio."""
    plain, normed = (found[name] for name in ARMS)
    view = tables.empty(escape(title))
    for column in ("", "plain", "weight norm", "ratio"):
        view.add_column(column, justify="right" if column else "left", no_wrap=True)

    for name, figure, shown in _ROWS:
        a, b = figure(plain), figure(normed)
        view.add_row(name, shown(a), shown(b), f"{b / a:.3f}" if a else "-")

    kinds = dict.fromkeys(own.kind for step in (plain, normed) for own in step.collectives)
    for kind in kinds:
        before, after = (_sent(step, kind) for step in (plain, normed))
        cells = (f"{own.times} x, {_bytes(own.bytes)}" for own in (before, after))
        view.add_row(kind, *cells, f"{after.bytes / before.bytes:.3f}" if before.bytes else "-")
    return view


def _with_weights(config: ArmConfig, weights: str) -> ArmConfig:
    """The arm with its weights written in this way. How they began has no part in a step."""
    model = config.model.model_copy(update={"weights": weights, "init": "framework"})
    keeps_norms = config.optimizer.keep_norms and weights == "weight_norm"
    optimizer = config.optimizer.model_copy(update={"keep_norms": keeps_norms})
    return config.model_copy(update={"model": model, "optimizer": optimizer})


def _compile(arms: dict[str, Arm]) -> dict[str, Compiled]:
    """The compiled steps, by the names of the arms.

    Raises:
        RunError: the compiler refuses one of them; the message names it.
    """
    found = {}
    with console.status("tracing and lowering") as status:
        seconds = lower(list(arms.values()))
        for (weights, own), lowering in zip(arms.items(), seconds, strict=True):
            status.update(f"compiling {weights}")
            try:
                found[weights] = compile_step(own, lowering)
            except RunError as error:
                raise RunError(f"{weights}: {error}") from None
    return found


def _sent(step: Compiled, kind: str) -> Collective:
    """The collectives of this kind in a step, which may be none."""
    return next((own for own in step.collectives if own.kind == kind), Collective(kind, 0, 0))


def _caption(found: dict[str, Compiled]) -> str:
    """How the figures were counted, and the versions that they hold for."""
    unknown = max(step.unknown_loops for step in found.values())
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu", "flax")}
    return (
        "FLOPs and bytes accessed as XLA counts them: the body of a loop once. Memory traffic, cycles and collectives: "
        "every trip"
        + (f" (but for {unknown} loops, whose trips are not known)" if unknown else "")
        + "; traffic is of main memory alone, cycles are the sum of the compiler's estimates. The batch is an "
        "argument.\n" + ", ".join(f"{name} {version}" for name, version in versions.items())
    )


def _check_writable(path: Path) -> None:
    """Check that the file can be written: now, not after minutes.

    Raises:
        ConfigError: it cannot.
    """
    with _file_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(f"{path.parent} is not writable")


def _write(path: Path, figures: dict[str, Any]) -> None:
    """Write all figures, with the environment that they are from."""
    compiler = {"libtpu": importlib.metadata.version("libtpu")}
    with _file_errors(path):
        files.write(path, json.dumps({"environment": environment() | compiler, **figures}, indent=2) + "\n")


@contextlib.contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    """Let errors of the file name the remedy."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error}; choose another with --json") from None


def _bytes(count: float) -> str:
    return f"{count / 1e9:.3f} GB" if count >= 1e8 else f"{count / 1e6:.3f} MB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s"


def _millions(count: float) -> str:
    return f"{count / 1e6:,.1f} M"


# The name of each figure, how it is read from a compiled step, and how it is shown.
_ROWS: tuple[tuple[str, Callable[[Compiled], float], Callable[[float], str]], ...] = (
    ("parameters", lambda step: step.parameters, _millions),
    ("FLOPs", lambda step: step.flops, _millions),
    ("bytes accessed", lambda step: step.bytes_accessed, _bytes),
    ("memory traffic", lambda step: step.memory_bytes, _bytes),
    ("cycles", lambda step: step.cycles, _millions),
    ("peak memory", lambda step: step.peak_memory, _bytes),
    ("arguments", lambda step: step.arguments, _bytes),
    ("tracing and lowering", lambda step: step.lowering_seconds, _seconds),
    ("compiling", lambda step: step.compile_seconds, _seconds),
)
