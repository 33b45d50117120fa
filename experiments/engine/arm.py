"""One arm at work: the states of its members, and the figures that come of them.

How its functions are compiled is in `programs`, and what they compute in `training`.
"""

from __future__ import annotations

import concurrent.futures
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import data
from experiments.config.experiment import ArmConfig, Experiment
from experiments.devices import mesh, sharding
from experiments.devices.placement import Batch, Placement
from experiments.engine import training
from experiments.engine.members import Member, as_arrays, members
from experiments.engine.programs import Programs
from experiments.engine.training import State
from experiments.errors import ConfigError
from experiments.tasks import Examples

MemberFigures = dict[str, np.ndarray]
"""By name, a number for each member."""


class Advance(NamedTuple):
    """The way up to a record."""

    figures: MemberFigures
    """`train_loss`, the mean over the steps, and the same of its terms."""

    nonfinite_step: np.ndarray
    """Of each member, as in its state."""

    at_fault: list[tuple[str, ...]]
    """Of each member, which terms of the loss were not finite at that step, if it has terms."""


class Arm:
    """An arm's members and their states.

    Attributes:
        config: the arm's.
        placement: where its arrays lie.
        members: learning rate and seed of each.
        functions: what is computed for one member.
        programs: the same, compiled.
        states: an entry for each group of members that makes one call; empty until `prepare` or `restore`.
    """

    def __init__(self, config: ArmConfig, placement: Placement) -> None:
        self.config = config
        self.placement = placement
        self.members = members(config)
        self.functions = training.functions(config, placement.dataset, placement)
        self.programs = Programs(self.functions, placement, self.members)
        self.states: list[State] = []
        sharding.check(self.functions.uses, placement.mesh)
        self._check_init_scale()

    # States

    def prepare(self) -> None:
        """Make the states before the first step, if there are none yet, and compile what trains, at the same time."""
        if jax.process_count() > 1:
            self.programs.advance  # noqa: B018 (several processes must start the same programs in the same order)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            compiled = pool.submit(lambda: self.programs.advance)
            if not self.states:
                self.states = [self._initial(member) for member in self._groups]
            compiled.result()

    def restore(self, states: list[State]) -> None:
        """Go on from states that lie where `abstract` says; from none, at the start."""
        self.states = states

    def snapshot(self) -> list[State]:
        """A copy of the states, which further training does not change."""
        return _copy(self.states)

    def abstract(self) -> list[State]:
        """The shapes of the states, and where they lie; nothing is computed."""
        return [self.programs.state] * (len(self.members) // self.programs.group_size)

    def lower(self) -> jax.stages.Lowered:
        """The function that trains, from shapes alone: nothing is computed, and the devices need not be there."""
        return self.programs.lower()

    def advance(self) -> Advance:
        """Train all members up to the next record."""
        before, taken = int(self.states[0].step[0]), list[list[training.Figures]]()
        for group, member in enumerate(self._groups):
            taken.append([])
            for rows in self._orders(member, self.states[group].step[0]):
                step = self.programs.advance(self.states[group], member, self.placement.train, rows)
                self.states[group], figures = step
                taken[group].append(figures)

        # Only now that all groups are under way does the host wait for figures.
        steps = {name: _joined([_of_all_steps(figures, name) for figures in taken]) for name in taken[0][0]}
        means = {f"train_{name}": values.mean(axis=1) for name, values in steps.items()}
        nonfinite = _joined([state.nonfinite_step for state in self.states])
        at_fault = [_at_fault(steps, member, step - before - 1) for member, step in enumerate(nonfinite)]
        return Advance(means, nonfinite, at_fault)

    # Figures

    def evaluate(self) -> MemberFigures:
        """Means over the held-out examples."""
        sums = []
        for state, member in self._each():
            parts = [
                self.programs["evaluate"](state, member, examples, mask, first)
                for first, examples, mask in self._numbered_held_out()
            ]
            sums.append(functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), parts))
        return {name: _joined([own[name] for own in sums]) / self._held_out_examples for name in sums[0]}

    def log_likelihood(self, check: Callable[[], None]) -> MemberFigures:
        """The mean over the held-out examples of an estimate from below, by importance sampling.

        Nothing of a task that has none. `check` is called again and again meanwhile.

        Source: Burda et al. 2016, arXiv 1509.00519.
        """
        if self.functions.task.log_weight is None:
            return {}
        sums = []
        for state, member in self._each():
            total = np.zeros(len(member.seed))
            for first, examples, mask in self._numbered_held_out():
                log_sum = self.placement.put(np.full((len(member.seed), len(mask)), -np.inf, np.float32))
                for draw in range(self.functions.task.draws):
                    check()
                    log_sum = self.programs["add_weight"](log_sum, state, member, examples, first, np.int32(draw))
                total = total + np.asarray(self.programs["log_mean"](log_sum, mask))
            sums.append(total)
        return {"log_likelihood": _joined(sums) / self._held_out_examples}

    def samples(self) -> list[str]:
        """The text that each member writes; none where the network writes none."""
        if self.functions.task.sample is None:
            return []
        written = [self.programs["sample"](state, member) for state, member in self._each()]
        return [bytes(text).decode(errors="replace") for text in _joined(written)]

    def pictures(self) -> MemberFigures:
        """By name, images (members, rows, columns, height, width, channels) that the network makes, if it makes any."""
        if self.functions.task.pictures is None:
            return {}
        rows = np.arange(self.functions.task.pictured) % self._held_out_examples
        examples = self.placement.put({name: x[rows] for name, x in self.placement.dataset.held_out.items()})
        made = [self.programs["pictures"](state, member, examples) for state, member in self._each()]
        return jax.tree.map(lambda *images: _joined(images), *made)

    def statistics(self) -> dict[str, MemberFigures]:
        """Of the weights' vectors: see `training.Functions.statistics`."""
        each = [self.programs["statistics"](state, member) for state, member in self._each()]
        return jax.tree.map(lambda *values: _joined(values), *each)

    # Groups, and what they are given

    @functools.cached_property
    def _groups(self) -> list[Member]:
        """The members, in groups that make one call."""
        size = self.programs.group_size
        starts = range(0, len(self.members), size)
        return [self.placement.put(as_arrays(self.members[start : start + size])) for start in starts]

    def _each(self) -> Iterable[tuple[State, Member]]:
        """The groups, each with its states."""
        return zip(self.states, self._groups, strict=True)

    def _check_init_scale(self) -> None:
        """Check that `model.init_scale` names weights, by what its states shall look like: nothing is computed.

        Raises:
            ConfigError: it does not.
        """
        if not isinstance(self.config.model.init_scale, dict) or self.config.model.init != "data":
            return
        try:
            self.programs.state  # noqa: B018 (it is kept, and needed later on)
        except ValueError as error:
            if not str(error).startswith("init_scale "):
                raise
            raise ConfigError(f"model.{error}") from None

    def _initial(self, member: Member) -> State:
        """A group's states before the first step."""
        rows = self.placement.feed(self.programs["first"](member))
        return self.programs.init(member, self.placement.train, rows)

    def _orders(self, member: Member, first_step: jax.Array) -> Iterator[Batch]:
        """The batches of the steps up to the next record, in parts of as many as make one call."""
        rows = self.programs["order"](member, first_step)
        calls = self.config.train.record_every // self.programs.steps_per_call
        return map(self.placement.feed, [rows] if calls == 1 else jnp.split(rows, calls, axis=1))

    def _numbered_held_out(self) -> Iterator[tuple[np.int32, Examples, jax.Array]]:
        """The parts of the held-out examples, each with the number of its first."""
        first = 0
        for examples, mask in self.placement.held_out():
            yield np.int32(first), examples, mask
            first += len(mask)

    @property
    def _held_out_examples(self) -> int:
        return len(next(iter(self.placement.dataset.held_out.values())))


def build(experiment: Experiment) -> dict[str, Arm]:
    """The arms of an experiment; a data set that several of them train on lies on the devices once.

    Raises:
        ConfigError: the data set cannot be read, or something does not fit.
    """
    place = functools.cache(lambda config, shape: Placement(data.load(config), mesh.build(shape)))
    arms = {}
    for name, config in experiment.arms.items():
        try:
            shape = mesh.shape(config.mesh, config.data.batch_size)
            own = place(config.data, shape)  # pyright: ignore[reportArgumentType] (frozen, so pydantic gives it a hash)
            arms[name] = Arm(config, own)
        except ConfigError as error:
            raise ConfigError(f"arm {name!r}: {error}") from None
    return arms


@jax.jit
def _copy(states: list[State]) -> list[State]:
    return jax.tree.map(jnp.copy, states)


def _joined(values: Any) -> np.ndarray:
    return np.concatenate([np.asarray(value) for value in values])


def _of_all_steps(calls: list[training.Figures], name: str) -> np.ndarray:
    """A figure (members, steps) that each call gave for its own steps."""
    # In float64, so that the mean over many steps is as exact as the figures of each.
    return np.concatenate([figures[name] for figures in calls], axis=1, dtype=np.float64)


def _at_fault(steps: dict[str, np.ndarray], member: int, step: int) -> tuple[str, ...]:
    """Which of these, each (members, steps), is not finite at a step, the loss aside, which is made of the others."""
    if not 0 <= step < steps["loss"].shape[1]:
        return ()  # it was in an earlier record, or it has not come to that
    return tuple(name for name in steps if name != "loss" and not np.isfinite(steps[name][member, step]))
