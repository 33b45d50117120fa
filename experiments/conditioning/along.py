"""Along the path: training the arm whose weights it is, and measuring at each place."""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import threadpoolctl

import wn_jax as wn
from experiments import tasks
from experiments.conditioning import coordinates
from experiments.conditioning.coordinates import Coordinates
from experiments.conditioning.measure import Instruments, at, measure, measure_natural
from experiments.config.conditioning import ConditioningConfig
from experiments.config.experiment import Experiment
from experiments.engine import arm, training
from experiments.engine.arm import Arm
from experiments.errors import ConfigError, RunError
from experiments.run_folder.conditioning import Measurement
from experiments.tasks import Examples, Params

Record = dict[str, Any]
"""A `Measurement`, with the `seed` and the `step` of its place."""

_RANDOM = ("noise", "dropout")  # keys of models that make the loss another one at each step


class Along:
    """The places along a path at which an experiment's curvature is measured, and the instruments for it.

    Raises:
        ConfigError: the experiment has no such table, or it asks for more examples than there are.
    """

    def __init__(self, experiment: Experiment) -> None:
        if experiment.conditioning is None:
            raise ConfigError("conditioning: missing; name the steps to measure at, as [conditioning] steps = [0, 100]")
        self.table: ConditioningConfig = experiment.conditioning
        self._arm = arm.build(_only_the_path(experiment, self.table))[self.table.path]
        if self._arm.functions.task.likelihood is None:
            raise ConfigError(
                f"conditioning.path: the loss of arm {self.table.path!r} is no log-likelihood of what its network "
                "predicts, so that there is no Fisher matrix of it; choose an arm with another model.name"
            )
        dataset = self._arm.placement.dataset
        available = dataset.examples
        if self.table.examples > available:
            raise ConfigError(
                f"conditioning.examples: {self.table.examples} is more than the {available} training examples; lower it"
            )
        self._examples: Examples = {name: jnp.asarray(x[: self.table.examples]) for name, x in dataset.train.items()}
        self._instruments = _instruments(self._arm, self.table)

    def left(self, records: Iterable[Record]) -> set[tuple[int, int]]:
        """The places (seed, step) that are not, or not as a whole, in these records.

        A whole place has a record for each parametrization, and one for the natural gradient.
        """
        names: dict[tuple[int, int], set[str]] = collections.defaultdict(set)
        for record in records:
            names[record["seed"], record["step"]].add(record["coordinates"])
        places = {(seed, step) for _, seed in self._arm.members for step in self.table.steps}
        return {place for place in places if len(names[place]) < len(self._instruments) + 1}

    def records(self, places: Collection[tuple[int, int]]) -> Iterator[list[Record]]:
        """The records of each of these places, one place after the other along the path.

        Raises:
            RunError: the path diverged before one of them.
        """
        for step in sorted({step for _, step in places}):
            for (_, seed), weights in zip(self._arm.members, self._weights_at(step), strict=True):
                if (seed, step) in places:
                    # With one thread for LAPACK: beside XLA's, more of them take 30 times as long on busy cores.
                    with threadpoolctl.threadpool_limits(1):
                        records = list(self._measured(weights, seed, step))
                    yield [{"seed": seed, "step": step, **record} for record in records]

    def _weights_at(self, step: int) -> list[Params]:
        """The plain weights of each seed after so many steps. Training goes on until then, and never back."""
        self._arm.prepare()
        while int(self._arm.states[0].step[0]) < step:
            self._arm.advance()
        plain = [wn.reconstruct(state.params) for state in self._arm.states]
        return [member for params in plain for member in _apart(params)]

    def _measured(self, weights: Params, seed: int, step: int) -> Iterator[Measurement]:
        """The measurements of one place, in each parametrization."""
        _, plain = self._instruments[0]
        if not jnp.isfinite(plain.loss(weights, self._examples)):
            rate = self._arm.config.optimizer.learning_rate[0]
            raise RunError(
                f"the path (arm {self.table.path!r}, learning rate {rate:g}, seed {seed}) has no finite loss "
                f"at step {step}, and so no curvature; begin anew with a lower conditioning.learning_rate"
            )
        # Each place has other probes, so that standard errors over seeds have the errors of probes in them.
        key = jax.random.fold_in(jax.random.key(seed), step)
        place = at(plain, weights, self._examples, self.table, key)
        for one, own in self._instruments:
            yield measure(one, own, place)
        yield measure_natural(place)


def _only_the_path(experiment: Experiment, table: ConditioningConfig) -> Experiment:
    """The experiment of one arm, with the one learning rate and the seeds that the table asks for."""
    config = experiment.arms[table.path]
    rate = table.learning_rate or config.optimizer.learning_rate[0]
    train = config.train.model_copy(update={"seeds": table.seeds or config.train.seeds, "members_per_call": None})
    optimizer = config.optimizer.model_copy(update={"learning_rate": (rate,)})
    return Experiment(
        name=experiment.name,
        arms={table.path: config.model_copy(update={"train": train, "optimizer": optimizer})},
    )


def _instruments(path: Arm, table: ConditioningConfig) -> list[tuple[Coordinates, Instruments]]:
    """Each parametrization, the plain one first, and the functions that measure in it."""
    config, dataset = path.config, path.placement.dataset

    def task(norm: str) -> tuple[tasks.Task, coordinates.Axes]:
        model = _without_randomness(config.model, norm)
        own = tasks.build(model, dataset)
        uses = training.weight_uses(own, dataset, config.model_copy(update={"model": model}))
        return own, {use.path: use.reduction for use in uses if use.reduction is not None}

    plain, axes = task("none")
    # The parametrizations of a group predict by one function, so that it is compiled once for all of them.
    groups = [(plain, [coordinates.plain(plain)]), (plain, coordinates.weight_norm(plain, axes, table.norms))]
    if hasattr(config.model, "norm"):
        mean_only, batch = task("mean_only"), task("batch")
        groups.append((mean_only[0], [coordinates.weight_norm_mean_only(plain, *mean_only)]))
        groups.append((batch[0], [coordinates.batch_norm(plain, *batch)]))
    made = [(group, Instruments(own, group[0].predict)) for own, group in groups]
    return [(one, instruments) for group, instruments in made for one in group]


def _without_randomness(model: Any, norm: str) -> Any:
    """The network that is measured: with plain weights, and in float32, as second derivatives in bfloat16 are noise."""
    fields = type(model).model_fields
    update: dict[str, Any] = {name: 0.0 for name in _RANDOM if name in fields}
    update |= {"norm": norm} if "norm" in fields else {}
    update |= {"weights": "plain", "init": "framework", "dtype": "float32"}
    return model.model_copy(update=update)


def _apart(params: Params) -> list[Params]:
    """The parameters of each member, which are stacked along a leading axis."""
    leaves, structure = jax.tree.flatten(params)
    return [jax.tree.unflatten(structure, own) for own in zip(*leaves, strict=True)]
