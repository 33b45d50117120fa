"""The time that the engine adds to a step of training: members, records, marks of losses that are not finite.

The bare step is what one would write by hand for one seed: gradient, optimizer, batch by batch from examples that lie
on the device. Both run in turn in one process; the median of the ratios is reported. Evaluation and checkpoints, whose
number the config chooses, are not in it.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import wn_jax as wn
from experiments import optimizers, tasks
from experiments.config.experiment import Experiment
from experiments.devices.mesh import MeshConfig
from experiments.engine import arm, run
from experiments.engine.members import Member
from experiments.errors import ConfigError
from experiments.run_folder.folder import RunFolder


@dataclasses.dataclass(frozen=True)
class Overhead:
    """Milliseconds of a step, in each round."""

    bare: list[float]
    """Of the step written by hand."""

    engine: list[float]
    """Of the engine's, with all that it does for a record."""

    def ratio(self) -> float:
        """The median over rounds of the engine's time over the bare step's."""
        return statistics.median(engine / bare for engine, bare in zip(self.engine, self.bare, strict=True))


def measure(experiment: Experiment, rounds: int, on_round: Callable[[], None] = lambda: None) -> Overhead:
    """Time one arm of an experiment, up to the next record in each round. It must have one seed and one learning rate.

    Raises:
        ConfigError: it has several.
    """
    name, config = next(iter(experiment.arms.items()))
    alone = experiment.model_copy(update={"arms": {name: config.model_copy(update={"mesh": MeshConfig(data=1)})}})
    own = arm.build(alone)[name]
    if len(own.members) > 1:
        raise ConfigError(
            f"the overhead is measured for one seed and one learning rate, and {name} has {len(own.members)} of them; "
            "set train.seeds=1 and one optimizer.learning_rate"
        )
    every = experiment.train.record_every
    train = experiment.train.model_copy(update={"steps": every * rounds * 2, "evaluate_every": every * rounds * 2})
    bare, overhead = _bare(own), Overhead([], [])
    own.prepare()
    with tempfile.TemporaryDirectory() as folder, RunFolder(Path(folder), experiment) as run_folder:
        run_folder.begin(None)
        for round_ in range(rounds + 1):
            on_round()
            engine = functools.partial(run.advance, name, own, train, run_folder, (round_ + 1) * every)
            turns: list[tuple[list[float], Callable[[], Any]]] = [(overhead.bare, bare), (overhead.engine, engine)]
            for times, turn in turns if round_ % 2 else reversed(turns):
                start = time.perf_counter()
                turn()
                if round_:  # the first compiles what is left
                    times.append(1e3 * (time.perf_counter() - start) / every)
    return overhead


def _bare(own: arm.Arm) -> Callable[[], None]:
    """A function that makes as many steps as there are to a record, with nothing around them."""
    config, dataset = own.config, own.placement.dataset
    task = tasks.build(config.model, dataset)
    optimizer = optimizers.build(config.optimizer, config.optimizer.learning_rate[0], config.train.steps, 1)
    member = Member(jnp.int32(config.train.first_seed), jnp.float32(config.optimizer.learning_rate[0]))
    examples = own.placement.train
    first = jax.jit(own.functions.start)(member, examples)
    state = jax.tree.map(lambda array: array[None], (first.params, first.model_state, first.opt_state))

    # Mapped over one seed, as the engine's: XLA's CPU backend then gives the convolutions another, faster path.
    @functools.partial(jax.jit, donate_argnums=0)
    @functools.partial(jax.vmap, in_axes=(0, None, None, None))
    def step(state: Any, examples: Any, rows: jax.Array, key: jax.Array) -> Any:
        params, model_state, opt_state = state
        batch = {name: array[rows] for name, array in examples.items()}
        gradient = jax.value_and_grad(wn.wrap(task.loss), has_aux=True)
        (_, (model_state, _)), grads = gradient(params, model_state, batch, key)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), model_state, opt_state

    count, size = config.train.record_every, config.data.batch_size
    orders = [jnp.asarray(np.random.default_rng(i).choice(dataset.examples, size)) for i in range(count)]
    keys = list(jax.random.split(jax.random.key(0), count))

    def steps() -> None:
        nonlocal state
        for rows, key in zip(orders, keys, strict=True):
            state = step(state, examples, rows, key)
        jax.block_until_ready(state)

    return steps
