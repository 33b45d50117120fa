"""Executing arms and writing the run folder.

All arms advance together, one record of each in turn, so that their times are measured side by side under the same
load; the order within a round rotates. A record is written and flushed whole, so that `metrics.jsonl` is readable
whenever the run ends.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tomli_w

import wn_jax as wn
from experiments import config, data, step

Record = dict[str, Any]


class RunFolder:
    """A fresh folder with `config.toml` (it runs again), `environment.json` and, record by record, `metrics.jsonl`."""

    def __init__(self, path: Path, experiment: config.Experiment):
        check_free(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / "config.toml").write_text(tomli_w.dumps(config.to_dict(experiment)), encoding="utf-8")
            (path / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n", encoding="utf-8")
            self._metrics = (path / "metrics.jsonl").open("a", encoding="utf-8")
        except OSError as error:
            raise config.ConfigError(f"{path}: the run folder cannot be written: {error}") from None
        self.path = path

    def write(self, record: Record) -> None:
        """Append one record."""
        self._metrics.write(json.dumps(_finite(record), allow_nan=False) + "\n")
        self._metrics.flush()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._metrics.close()


def check_free(path: Path) -> None:
    """That a run folder can be made at `path`.

    Raises:
        ConfigError: there is something already.
    """
    try:
        taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
    except OSError as error:
        raise config.ConfigError(f"{path}: the run folder cannot be written: {error}") from None
    if taken:
        raise config.ConfigError(f"{path}: already exists and is not an empty folder; choose another with --out")


def prepare(experiment: config.Experiment, on_compile: Callable[[str], None]) -> dict[str, Callable[[], Record]]:
    """Load and compile every arm, so that no time includes compilation; `on_compile` hears of each.

    Returns:
        By arm, a function that trains all seeds of it, in one vmapped program, up to the next record and returns that.
    """
    runners = {}
    for name, arm in experiment.arms.items():
        on_compile(name)
        runners[name] = _compile(arm)
    return runners


def execute(runners: dict[str, Callable[[], Record]], train: config.TrainConfig) -> Iterator[Record]:
    """Train all arms side by side and yield the records.

    A record holds `arm`, `step`, `seconds_per_step` (of all seeds together), and lists with a number a seed:
    `train_loss` (the mean minibatch loss since the last record), `test_loss` and `test_error`.
    """
    names = list(runners)
    for round_ in range(train.steps // train.steps_per_record):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            yield {"arm": name, "step": (round_ + 1) * train.steps_per_record, **runners[name]()}


def _compile(arm: config.ArmConfig) -> Callable[[], Record]:
    """A function that advances the arm's seeds by one record and returns the figures."""
    functions = step.make_arm(arm, data.load(arm.data))
    seeds = arm.train.first_seed + jnp.arange(arm.train.seeds)
    state = jax.jit(jax.vmap(functions.init))(jax.vmap(jax.random.key)(seeds))
    advance = jax.jit(jax.vmap(functions.advance), donate_argnums=0).lower(state).compile()
    evaluate = jax.jit(jax.vmap(functions.evaluate)).lower(state).compile()

    def next_record() -> Record:
        nonlocal state
        start = time.perf_counter()
        state, loss = jax.block_until_ready(advance(state))
        seconds = time.perf_counter() - start
        figures = {"train_loss": loss, **evaluate(state)}
        lists = {name: np.asarray(value, np.float64).tolist() for name, value in figures.items()}
        return {"seconds_per_step": seconds / arm.train.steps_per_record, **lists}

    return next_record


def environment() -> dict[str, Any]:
    """Versions, hardware, command and commit: what it takes to run this again."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn")
    return {
        "command": shlex.join(["python", "-m", "experiments", *sys.argv[1:]]),
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {"wn-jax": wn.__version__} | {name: metadata.version(name) for name in packages},
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "devices": [f"{device.platform}: {device.device_kind}" for device in jax.devices()],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _commit() -> str | None:
    """The commit of the code, marked where the work tree differs from it; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: those become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
