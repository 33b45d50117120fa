"""Versions, hardware, command and commit: what it takes to run something again."""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import pydantic

import wn_jax as wn
from experiments import files
from experiments.schema import checked

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy", "scikit-learn", "orbax-checkpoint")


def environment(also: Iterable[str] = ()) -> dict[str, Any]:
    """Versions, hardware, command and commit, as a dict that JSON takes.

    Arguments:
        also: packages whose versions belong to it if they are installed, beside those of required ones.
    """
    others = {name: metadata.version(name) for name in also if importlib.util.find_spec(name)}
    return {
        "command": shlex.join(["python", "-m", "experiments", *sys.argv[1:]]),
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {"wn-jax": wn.__version__} | {name: metadata.version(name) for name in _PACKAGES} | others,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processes": jax.process_count(),
        "devices": [f"{device.platform}: {device.device_kind}" for device in jax.devices()],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def of_run(path: Path, data: dict[str, str]) -> dict[str, Any] | None:
    """The content of a run's file of its environment, brought up to date with this one.

    A run's first environment is the whole of it. Each one that went on with the run is added to a list in it.

    Arguments:
        path: the file, which need not be there.
        data: the digests of what the run trains on.

    Returns:
        The content. None, if the digests in the file are others.

    Raises:
        ConfigError: it cannot be read, or is about something else. Of what is no JSON, as where the machine lost its
            power, nothing is kept.
    """
    now = environment() | ({"data": data} if data else {})
    if not os.path.lexists(path) or _is_torn(path):
        return now
    first = read(path)
    if first.get("data", data) != data:
        return None
    return {**first, "resumed": [*first.get("resumed", []), now]}


def read(path: Path) -> dict[str, Any]:
    """The content of such a file, whichever version wrote it.

    Raises:
        ConfigError: it cannot be read, or is about something else.
    """
    content = files.load(path, files.json_object)
    checked(_FILE, content, str(path))
    return content


def _is_torn(path: Path) -> bool:
    """Whether a file is no JSON."""
    try:
        files.json_object(files.read(path))
    except files.NoJSONError:
        return True
    except (OSError, ValueError):
        pass  # `read` says what it is
    return False


class _Start(pydantic.BaseModel):
    """The facts of one start of a run."""

    command: str | None = None
    commit: str | None = None
    python: str | None = None
    packages: dict[str, str] = {}
    platform: str | None = None
    cpus: int | None = None
    processes: int = 1
    devices: list[str] = []
    started: str | None = None
    data: dict[str, str] = {}


class _File(_Start):
    """That of the first start, and those of later ones."""

    resumed: list[_Start] = []


_FILE = pydantic.TypeAdapter(_File)


def _commit() -> str | None:
    """The commit of the code, marked where the work tree differs from it; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
