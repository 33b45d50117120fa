"""An arm's training step, compiled for a TPU that need not be there, and the figures of it."""

from __future__ import annotations

import dataclasses
import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from experiments import data
from experiments.config.experiment import ArmConfig
from experiments.devices import mesh
from experiments.devices.placement import Placement
from experiments.engine.arm import Arm
from experiments.errors import ConfigError, RunError
from experiments.tpu import hlo, traffic
from experiments.tpu.traffic import Collective

# The messages of the compiler where it has placed every array, and where it cannot begin to.
_OUT_OF_MEMORY = (
    re.compile(r"Used (?P<used>[\d.]+)G of (?P<limit>[\d.]+)G hbm"),
    re.compile(r"\((?P<used>[\d.]+)G\) exceeds available HBM \((?P<limit>[\d.]+)G\)"),
)
_ROUNDS = 5  # of lowering, of which the median is taken


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The figures of a step, each for one chip, in bytes and seconds."""

    parameters: int
    """The number of parameters of the network."""

    flops: float
    """The compiler's own count, in which the body of a loop counts once."""

    bytes_accessed: float
    """The compiler's own count, in which the body of a loop counts once, and the chip's caches as much as the rest."""

    memory_bytes: int
    """The bytes that main memory is read or written, with every trip of a loop."""

    cycles: int
    """The sum of the compiler's estimates for each operation, with every trip of a loop."""

    peak_memory: int
    """The most bytes in use."""

    arguments: int
    """The bytes of the arguments of the step."""

    collectives: tuple[Collective, ...]
    """The communication between chips, by kind."""

    unknown_loops: int
    """The number of loops that count once, as their trips are not known."""

    lowering_seconds: float
    """The seconds of tracing and lowering."""

    compile_seconds: float
    """The seconds of compiling."""


def prepare(config: ArmConfig, devices: Sequence[Any]) -> Arm:
    """An arm whose step is for one seed, on the mesh that the config asks for.

    Each batch is an argument of the step, as it is where several processes train together.

    Raises:
        ConfigError: the batch or the network cannot be shared out among the devices, or the data cannot be read.
    """
    config = config.model_copy(update={"train": config.train.model_copy(update={"seeds": 1, "steps_per_call": 1})})
    shape = mesh.shape(config.mesh, config.data.batch_size, devices)
    arm = Arm(config, Placement(data.load(config.data), mesh.build(shape, devices), fed=True))
    if all(use.reduction is None for use in arm.functions.uses):
        raise ConfigError("the network of this arm has no weights to normalize; choose another one with --arm")
    return arm


def lower(arms: Sequence[Arm], on_round: Callable[[], None] = lambda: None) -> list[float]:
    """The seconds of tracing and lowering each arm: the median over rounds in which they take turns.

    A first round is not counted: it fills JAX's caches, for whichever comes first.
    """
    seconds = []
    for _ in range(1 + _ROUNDS):
        on_round()
        seconds.append([_seconds(arm.lower) for arm in arms])
    return [statistics.median(own) for own in zip(*seconds[1:], strict=True)]


def compile_step(arm: Arm, lowering_seconds: float) -> Compiled:
    """Compile the step of a prepared arm.

    Arguments:
        arm: the arm.
        lowering_seconds: those that `lower` found, to stand beside the other figures.

    Raises:
        RunError: the step needs more memory than a chip has.
    """
    lowered, start = arm.lower(), time.perf_counter()
    shape = mesh.Shape(**arm.placement.mesh.shape)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise _explained(error, shape) from None
    return _figures(arm, compiled, lowering_seconds, time.perf_counter() - start)


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _figures(arm: Arm, compiled: Any, lowering: float, compiling: float) -> Compiled:
    costs = compiled.cost_analysis() or {}
    memory = compiled.memory_analysis()
    module = hlo.parse(compiled.as_text())
    return Compiled(
        parameters=sum(leaf.size for leaf in jax.tree.leaves(arm.abstract()[0].params)),
        flops=costs.get("flops", 0.0),
        bytes_accessed=costs.get("bytes accessed", 0.0),
        memory_bytes=traffic.memory_bytes(module),
        cycles=traffic.cycles(module),
        peak_memory=memory.peak_memory_in_bytes,
        arguments=memory.argument_size_in_bytes,
        collectives=tuple(traffic.collectives(module)),
        unknown_loops=traffic.unknown_loops(module),
        lowering_seconds=lowering,
        compile_seconds=compiling,
    )


def _explained(error: Exception, shape: mesh.Shape) -> RunError:
    """The compiler's error as one that says what to change in the config."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        return RunError(f"the TPU compiler refuses this step: {error}")
    found = next(filter(None, (pattern.search(str(error)) for pattern in _OUT_OF_MEMORY)), None)
    if found:
        used, limit = float(found["used"]), float(found["limit"])
        what = f"it needs {used:.2f} GiB, and a chip has {limit:.2f} GiB: {used - limit:.2f} GiB too much"
    else:
        what = str(error).splitlines()[0]
    return RunError(
        f"the step does not fit a chip's memory on the mesh {shape}: {what}; set mesh.fsdp or mesh.model higher, or "
        "data.batch_size lower, or take a larger topology"
    )
