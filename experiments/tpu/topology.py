"""The devices of a TPU slice that is not there: `libtpu` compiles for them all the same."""

from __future__ import annotations

import importlib.metadata
import os
import re
from typing import Any

import jax
from jax.experimental import topologies
from packaging.requirements import Requirement

from experiments.errors import ConfigError

# Nothing is asked of a cloud that this machine is not in; `setdefault`, for a machine that is in one.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # to compile needs no TPU for itself
}


def devices(name: str) -> list[Any]:
    """The chips of a topology such as "v5e:2x4".

    Raises:
        ConfigError: `libtpu` is missing, or is not the one that this jax needs; or there is no such topology.
    """
    _check_libtpu()
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    try:
        if not re.fullmatch(r"\w+:[1-9]\d*(x[1-9]\d*)+", name):
            raise ValueError("it must be a kind and numbers of chips, KIND:NxN")
        found = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
        jax.make_mesh((len(found),), ("all",), devices=found)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError, AssertionError) as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"--topology {name}: libtpu {importlib.metadata.version('libtpu')} has no such TPU: {cause}; name a kind "
            "and its chips, such as v5e:2x2, v5e:2x4, v5e:4x4, v6e:2x4 or v5p:2x2x1"
        ) from None
    return list(found)


def _check_libtpu() -> None:
    """Raise where `libtpu` is missing, or is not the one that this jax needs."""
    version = importlib.metadata.version("jax")
    install = f"`pip install 'jax[tpu]=={version}'` installs the one that fits"
    try:
        installed = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"the TPU compiler needs the package libtpu, and it is not installed; {install}") from None
    requirements = map(Requirement, importlib.metadata.requires("jax") or ())
    for requirement in requirements:
        if requirement.name == "libtpu" and not requirement.specifier.contains(installed, prereleases=True):
            raise ConfigError(
                f"libtpu {installed} is installed, and jax {version} needs libtpu {requirement.specifier}; {install}"
            )
