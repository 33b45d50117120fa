"""One arm at work: compiled when it is first needed, its members in one program where that is fast."""

from __future__ import annotations

import concurrent.futures
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import data, tasks
from experiments.config.experiment import ArmConfig, Experiment
from experiments.devices import mesh, sharding
from experiments.devices.placement import Batch, Placement, placed
from experiments.engine import training
from experiments.engine.training import State
from experiments.errors import ConfigError

_INIT = (0, None, 0)  # of the arguments of `Functions.init`, the axes of members

Figures = dict[str, np.ndarray]
"""By name, a number for each member."""


class Advance(NamedTuple):
    """What happened up to a record.

    Attributes:
        figures: `train_loss`, the mean over the steps, and the same of its terms.
        nonfinite_step: of each member, as in its state.
        at_fault: of each member, which terms of the loss were not finite at that step, if it has terms.
    """

    figures: Figures
    nonfinite_step: np.ndarray
    at_fault: list[tuple[str, ...]]


class Arm:
    """An arm's members and their states; `states` has an entry for each group of members that makes one call."""

    def __init__(self, config: ArmConfig, placement: Placement):
        self.config = config
        self.placement = placement
        self.members = training.members(config)
        self.functions = training.functions(config, placement.dataset, placement)
        self.states: list[State] = []
        sharding.check(self.functions.uses, placement.mesh)

    def restore(self, states: list[State]) -> None:
        """Go on from states that lie where `abstract` says; from none, at the start."""
        self.states = states

    def snapshot(self) -> list[State]:
        """A copy of the states, which further training does not change."""
        return self._copy(self.states)

    def abstract(self) -> list[State]:
        """The shapes of the states, and where they lie; nothing is computed."""
        return [jax.tree.map(placed, self._shapes, self._shardings)] * (len(self.members) // self._group_size)

    def lower(self) -> jax.stages.Lowered:
        """The function that trains, from shapes alone: nothing is computed, and the devices need not be there."""
        places = (self._shardings, self.placement.everywhere)
        jitted = self._jit(self.functions.advance, (0, 0, None, 0), out_shardings=places, donate_argnums=0)
        member, rows = self._member, jax.eval_shape(jax.vmap(self.functions.order, (0, None)), self._member, 0)
        rows = jax.ShapeDtypeStruct((rows.shape[0], self._steps_per_call, *rows.shape[2:]), rows.dtype)
        return jitted.lower(self.abstract()[0], member, self.placement.train_like, self.placement.feed_like(rows))

    def prepare(self) -> None:
        """Make the states before the first step, if there are none yet, and compile what trains, at the same time."""
        if jax.process_count() > 1:
            self._advance  # noqa: B018 (several processes must start the same programs in the same order)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            compiled = pool.submit(lambda: self._advance)
            if not self.states:
                self.states = [self._init(member, self.placement.train, self._first(member)) for member in self._groups]
            compiled.result()

    def advance(self) -> Advance:
        """Train all members up to the next record."""
        before, taken = int(self.states[0].step[0]), list[list[dict[str, jax.Array]]]()
        for group, member in enumerate(self._groups):
            taken.append([])
            for rows in self._orders(member, self.states[group].step[0]):
                self.states[group], figures = self._advance(self.states[group], member, self.placement.train, rows)
                taken[group].append(figures)
        # Only now that all groups are under way does the host wait for figures.
        steps = {name: _joined([_of_all_steps(figures, name) for figures in taken]) for name in taken[0][0]}
        nonfinite = _joined([state.nonfinite_step for state in self.states])
        at_fault = [_at_fault(steps, member, step - before - 1) for member, step in enumerate(nonfinite)]
        return Advance({f"train_{name}": values.mean(axis=1) for name, values in steps.items()}, nonfinite, at_fault)

    def evaluate(self) -> Figures:
        """Means over the held-out examples."""
        sums = []
        for state, member in self._each():
            parts = [
                self._evaluate(state, member, examples, mask, first)
                for first, examples, mask in self._numbered_held_out()
            ]
            sums.append(functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), parts))
        return {name: _joined([own[name] for own in sums]) / self._held_out_examples for name in sums[0]}

    def log_likelihood(self, check: Callable[[], None]) -> Figures:
        """The mean over the held-out examples of an estimate from below, by importance sampling; nothing of a task
        that has none. `check` is called again and again meanwhile.

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
                    log_sum = self._add_weight(log_sum, state, member, examples, first, np.int32(draw))
                total = total + np.asarray(self._log_mean(log_sum, mask))
            sums.append(total)
        return {"log_likelihood": _joined(sums) / self._held_out_examples}

    def samples(self) -> list[str]:
        """The text that each member writes; none where the network writes none."""
        if self.functions.task.sample is None:
            return []
        written = [self._sample(state, member) for state, member in self._each()]
        return [bytes(text).decode(errors="replace") for text in _joined(written)]

    def pictures(self) -> dict[str, np.ndarray]:
        """By name, images (members, rows, columns, height, width, channels) that the network makes, if it makes any."""
        if self.functions.task.pictures is None:
            return {}
        rows = np.arange(self.functions.task.pictured) % self._held_out_examples
        examples = self.placement.put({name: x[rows] for name, x in self.placement.dataset.held_out.items()})
        made = [self._pictures(state, member, examples) for state, member in self._each()]
        return jax.tree.map(lambda *images: _joined(images), *made)

    def statistics(self) -> dict[str, Figures]:
        """Of the weights' vectors: see `training.Functions`."""
        each = [self._statistics(state, member) for state, member in self._each()]
        return jax.tree.map(lambda *values: _joined(values), *each)

    def _each(self) -> Iterable[tuple[State, training.Member]]:
        """The groups."""
        return zip(self.states, self._groups, strict=True)

    def _numbered_held_out(self) -> Iterator[tuple[np.int32, tasks.Examples, jax.Array]]:
        """The parts of the held-out examples, each with the number of its first."""
        first = 0
        for examples, mask in self.placement.held_out():
            yield np.int32(first), examples, mask
            first += len(mask)

    @property
    def _held_out_examples(self) -> int:
        return len(next(iter(self.placement.dataset.held_out.values())))

    def _orders(self, member: training.Member, first_step: jax.Array) -> Iterator[Batch]:
        """The batches of the steps up to the next record, in parts of as many as make one call."""
        rows = self._order(member, first_step)
        calls = self.config.train.record_every // self._steps_per_call
        return map(self.placement.feed, [rows] if calls == 1 else jnp.split(rows, calls, axis=1))

    def _first(self, member: training.Member) -> Batch:
        return self.placement.feed(self._first_rows(member))

    @functools.cached_property
    def _shapes(self) -> State:
        """Those of a group's states; all groups are of one size."""
        first = self.placement.feed_like(jax.eval_shape(jax.vmap(self.functions.first), self._member))
        return jax.eval_shape(jax.vmap(self.functions.init, _INIT), self._member, self.placement.train_like, first)

    @property
    def _slow_in_loops(self) -> bool:
        """Whether XLA should get the steps and the members one by one.

        Its CPU backend takes a slow path for convolutions inside a loop, and for those of several members at once
        (`overhead configs/cifar10_small.toml --set train.record_every=2 --set train.steps_per_call=2` measures it).
        """
        return self.placement.on_cpu() and self.functions.convolves

    @functools.cached_property
    def _steps_per_call(self) -> int:
        train = self.config.train
        return train.steps_per_call or (1 if self._slow_in_loops or self.placement.fed else train.record_every)

    @functools.cached_property
    def _group_size(self) -> int:
        return self.config.train.members_per_call or (1 if self._slow_in_loops else len(self.members))

    @functools.cached_property
    def _groups(self) -> list[training.Member]:
        """The members, in groups that make one call."""
        size, starts = self._group_size, range(0, len(self.members), self._group_size)
        return [self.placement.put(training.as_arrays(self.members[start : start + size])) for start in starts]

    @functools.cached_property
    def _member(self) -> training.Member:
        """The shapes of a group's members."""
        shapes = jax.eval_shape(lambda: training.as_arrays(self.members[: self._group_size]))
        return jax.tree.map(lambda shape: placed(shape, self.placement.everywhere), shapes)

    @functools.cached_property
    def _shardings(self) -> State:
        """Where the states lie, on a mesh whose axes the parameters are sharded over."""
        by_path = sharding.of_parameters(self.functions.uses, self.placement.mesh)
        return jax.tree.map(self.placement.at, sharding.of_state(self._shapes, by_path))

    @functools.cached_property
    def _copy(self) -> Callable[[list[State]], list[State]]:
        return jax.jit(lambda states: jax.tree.map(jnp.copy, states))

    @functools.cached_property
    def _first_rows(self) -> Callable[..., jax.Array]:
        return self._jit(self.functions.first, (0,))

    @functools.cached_property
    def _init(self) -> Callable[..., State]:
        # It runs once, and LLVM's optimization of its random numbers takes longer than all else at the start.
        options = {"xla_backend_optimization_level": "0"} if self.placement.on_cpu() else {}
        return self._jit(self.functions.init, _INIT, out_shardings=self._shardings, compiler_options=options)

    @functools.cached_property
    def _order(self) -> Callable[..., jax.Array]:
        return self._jit(self.functions.order, (0, None))

    @functools.cached_property
    def _advance(self) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
        return self.lower().compile()

    @functools.cached_property
    def _evaluate(self) -> Callable[..., dict[str, jax.Array]]:
        return self._jit(self.functions.evaluate, (0, 0, None, None, None))

    @functools.cached_property
    def _sample(self) -> Callable[..., jax.Array]:
        return self._jit(self.functions.sample, (0, 0))

    @functools.cached_property
    def _pictures(self) -> Callable[..., dict[str, jax.Array]]:
        return self._jit(self.functions.pictures, (0, 0, None))

    @functools.cached_property
    def _add_weight(self) -> Callable[..., jax.Array]:
        def added(log_sum: jax.Array, *rest: Any) -> jax.Array:
            return jnp.logaddexp(log_sum, self.functions.log_weight(*rest))

        return self._jit(added, (0, 0, 0, None, None, None))

    @functools.cached_property
    def _log_mean(self) -> Callable[..., jax.Array]:
        """From sums over the draws of each example to the sum over the examples of the logarithm of their means."""
        log_draws = np.log(self.functions.task.draws)
        return self._jit(lambda log_sum, mask: jnp.sum(jnp.where(mask, log_sum - log_draws, 0)), (0, None))

    @functools.cached_property
    def _statistics(self) -> Callable[..., Any]:
        return self._jit(self.functions.statistics, (0, 0))

    def _jit(self, function: Callable[..., Any], in_axes: Any, out_shardings: Any = None, **options: Any) -> Any:
        places = self.placement.everywhere if out_shardings is None else out_shardings
        return jax.jit(jax.vmap(function, in_axes=in_axes), out_shardings=places, **options)


def build(experiment: Experiment) -> dict[str, Arm]:
    """The arms of an experiment; a data set that several of them train on lies on the devices once.

    Raises:
        ConfigError: the data set cannot be read, or something does not fit.
    """
    place = functools.cache(lambda config, shape: Placement(data.load(config), mesh.build(shape)))
    arms = {}
    for name, config in experiment.arms.items():
        try:
            arms[name] = Arm(config, place(config.data, mesh.shape(config.mesh, config.data.batch_size)))
        except ConfigError as error:
            raise ConfigError(f"arm {name!r}: {error}") from None
    return arms


def _joined(values: Any) -> np.ndarray:
    return np.concatenate([np.asarray(value) for value in values])


def _of_all_steps(calls: list[dict[str, jax.Array]], name: str) -> np.ndarray:
    """A figure (members, steps) that each call gave for its own steps."""
    return np.concatenate([figures[name] for figures in calls], axis=1, dtype=np.float64)


def _at_fault(steps: dict[str, np.ndarray], member: int, step: int) -> tuple[str, ...]:
    """Which of these, each (members, steps), is not finite at a step, the loss aside, which is made of the others."""
    if not 0 <= step < steps["loss"].shape[1]:
        return ()
    return tuple(name for name in steps if name != "loss" and not np.isfinite(steps[name][member, step]))
