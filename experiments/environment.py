"""Versions, hardware, command and commit: what it takes to run something again."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import wn_jax as wn

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy", "scikit-learn", "orbax-checkpoint")


def environment() -> dict[str, Any]:
    """As a dict that JSON takes."""
    return {
        "command": shlex.join(["python", "-m", "experiments", *sys.argv[1:]]),
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {"wn-jax": wn.__version__} | {name: metadata.version(name) for name in _PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processes": jax.process_count(),
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
