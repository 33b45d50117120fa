"""An arm's training step, compiled for a TPU that need not be there, and what the compiler says of it."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from experiments import data, mesh
from experiments.arm import Arm
from experiments.config import ArmConfig
from experiments.errors import RunError
from experiments.placement import Placement
from experiments.tpu import hlo, traffic
from experiments.tpu.traffic import Collective

_OUT_OF_MEMORY = re.compile(
    r"Used (?P<used>\S+) of (?P<limit>\S+) (?P<space>\w+)\. Exceeded \w+ capacity by (?P<by>\S+?)\.?\s"
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The figures of a step, each for one chip. Bytes and seconds.

    `flops` and `bytes_accessed` are the compiler's own counts, in which the body of a loop counts once, and what stays
    in the chip's caches as much as the rest. `memory_bytes` counts every trip, and only what main memory is read or
    written; `cycles` adds up the compiler's estimates for each operation, over all trips.
    """

    parameters: int
    flops: float
    bytes_accessed: float
    memory_bytes: int
    cycles: int
    peak_memory: int
    arguments: int
    collectives: tuple[Collective, ...]
    lowering_seconds: float
    compile_seconds: float


def compile_step(
    config: ArmConfig, devices: Sequence[Any], on_stage: Callable[[str], None] = lambda _: None
) -> Compiled:
    """Compile one step of one seed for the mesh that the config asks for.

    Arguments:
        config: the arm.
        devices: those of a topology.
        on_stage: hears what is done next.

    Raises:
        ConfigError: the batch or the network cannot be shared out among the devices, or the data cannot be read.
        RunError: the step needs more memory than a chip has.
    """
    config = config.model_copy(update={"train": config.train.model_copy(update={"seeds": 1, "steps_per_call": 1})})
    shape = mesh.shape(config.mesh, config.data.batch_size, devices)
    arm = Arm(config, Placement(data.load(config.data), mesh.build(shape, devices)))
    on_stage("tracing")
    arm.lower()  # fills JAX's caches, so that whichever step is the first does not pay for both
    start = time.perf_counter()
    lowered = arm.lower()
    lowered_at = time.perf_counter()
    on_stage("compiling")
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise _explained(error, config, shape) from None
    seconds = lowered_at - start, time.perf_counter() - lowered_at
    return _figures(arm, compiled, *seconds)


def _figures(arm: Arm, compiled: Any, lowering: float, compiling: float) -> Compiled:
    costs, memory, module = compiled.cost_analysis() or {}, compiled.memory_analysis(), hlo.parse(compiled.as_text())
    return Compiled(
        parameters=sum(leaf.size for leaf in jax.tree.leaves(arm.abstract()[0].params)),
        flops=costs.get("flops", 0.0),
        bytes_accessed=costs.get("bytes accessed", 0.0),
        memory_bytes=traffic.memory_bytes(module),
        cycles=traffic.cycles(module),
        peak_memory=memory.peak_memory_in_bytes,
        arguments=memory.argument_size_in_bytes,
        collectives=tuple(traffic.collectives(module)),
        lowering_seconds=lowering,
        compile_seconds=compiling,
    )


def _explained(error: Exception, config: ArmConfig, shape: mesh.Shape) -> RunError:
    """What the compiler's error means for the config."""
    found = _OUT_OF_MEMORY.search(f"{error} ")
    if found is None:
        return RunError(f"the TPU compiler refuses this step: {error}")
    return RunError(
        f"the step does not fit: it needs {found['used']} of the {found['limit']} of memory "
        f"({found['space']}) that a chip has, {found['by']} too much, on the mesh {shape}; set mesh.fsdp or mesh.model "
        "higher, or data.batch_size lower, or take a larger topology"
    )
