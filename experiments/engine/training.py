"""From a config to the pure functions that train one member of an arm.

Nothing here touches files, clocks or the screen, and nothing is compiled: `programs` does that, for several members.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import wn_jax as wn
from experiments import data, optimizers, parametrizations, tasks
from experiments.config.experiment import ArmConfig
from experiments.devices.layout import Layout
from experiments.engine.members import Member
from experiments.errors import ConfigError
from experiments.tasks import Examples, Params

NOT_YET = -1
"""In place of a step: it has not come to that."""

Figures = dict[str, jax.Array]
"""Numbers by name."""


class State(NamedTuple):
    """One member's state; with a leading axis, that of several."""

    params: Params
    """The parameters, written as `model.weights` says."""

    model_state: tasks.ModelState
    """Everything that the network keeps beside them, such as running averages."""

    opt_state: Any
    """The optimizer's."""

    average: Params
    """The moving average of the parameters; `()` without one."""

    step: jax.Array
    """How many steps were made."""

    nonfinite_step: jax.Array
    """The first step, counted from 1, whose loss or update was not finite, or `NOT_YET`."""


def functions(config: ArmConfig, dataset: data.Dataset, layout: Layout | None = None) -> Functions:
    """The functions of an arm.

    Arguments:
        config: the arm.
        dataset: only its shapes, names and classes are used.
        layout: how arrays lie on several devices.

    Raises:
        ConfigError: the network does not fit the data, or it asks for more examples than there are.
    """
    wanted = _init_examples(config)
    if config.model.init == "data" and wanted > dataset.examples:
        raise ConfigError(
            f"model.init_examples: {wanted} is more than the {dataset.examples} training examples; lower it"
        )
    layout = layout or Layout()
    gather = _LayerGather(layout)
    task = tasks.build(config.model, dataset, gather)
    gather.uses = uses = weight_uses(task, dataset, config)
    return Functions(config, layout, task, uses, dataset.examples)


@dataclasses.dataclass(frozen=True, eq=False)
class Functions:
    """The functions of one arm, for a single member; `vmap` them over members and states.

    Compared and hashed by identity: `jax.jit` takes only what has a hash, and a config, which holds dicts, has none.
    """

    config: ArmConfig
    """The arm."""

    layout: Layout
    """How arrays lie on the devices."""

    task: tasks.Task
    """The network and its loss."""

    uses: Any
    """How the network uses each parameter, as `wn.weight_uses` gives it."""

    examples: int
    """How many there are to train on."""

    @property
    def axes(self) -> parametrizations.Axes:
        """The reduction axes of each weight, by path."""
        return {use.path: use.reduction for use in self.uses if use.reduction is not None}

    @property
    def convolves(self) -> bool:
        """Whether the network has convolutions."""
        return any("conv_general_dilated" in use.uses for use in self.uses)

    # Before training

    def first(self, member: Member) -> jax.Array:
        """The rows of the training examples that `init` looks at."""
        if self.config.model.init != "data":
            return jnp.zeros(1, jnp.int32)  # shapes are all that is looked at
        key = _key(member, "order")  # those that training sees first, too
        return data.batch_indices(key, self.examples, _init_examples(self.config), jnp.int32(0), 1)[0]

    def init(self, member: Member, examples: Examples, rows: Any) -> State:
        """The state before the first step, from these rows of the training examples."""
        model, batch = self.config.model, self.layout.take(examples, rows)
        # Flax derives each kernel from the key and its path, so all arms of one seed start from the same kernels.
        params, model_state = self.task.init(_key(member, "init"), batch)
        if model.init_spread:
            params = _spread(params, self.axes, _key(member, "spread"), model.init_spread)

        def from_data(nodes: Params) -> Params:
            initialize = wn.init_from_data(self.task.loss, model.init_scale)
            return initialize(nodes, model_state, batch, _key(member, "init from data"))

        by_data = from_data if model.init == "data" else None
        params = parametrizations.rewrite(model.weights, params, self.axes, by_data)
        # A copy: an array that stood in a state twice could not be donated to the next step.
        average = jax.tree.map(jnp.copy, params) if self.config.train.ema else ()
        zero = jnp.zeros((), jnp.int32)
        return State(params, model_state, self._optimizer(member).init(params), average, zero, zero + NOT_YET)

    def start(self, member: Member, examples: Examples) -> State:
        """The state before the first step, from all training examples."""
        return self.init(member, examples, self.first(member))

    # Training

    def order(self, member: Member, first_step: jax.Array) -> jax.Array:
        """The rows (record_every, batch size) of the training examples of each step from this one to the next record.

        A function of seed and step alone: all arms of a seed see the same batches, and so does a run that goes on.
        """
        size, steps = self.config.data.batch_size, self.config.train.record_every
        return data.batch_indices(_key(member, "order"), self.examples, size, first_step, steps)

    def step(self, state: State, member: Member, examples: Examples, rows: Any) -> tuple[State, Figures]:
        """A step of training.

        Arguments:
            state: the state before it.
            member: the seed and the learning rate.
            examples: all training examples.
            rows: those of this batch.

        Returns:
            The state after the step; the "loss" before it, and the terms of that loss.
        """
        batch = self.layout.take(examples, rows)
        # A key for each step, made of its number, and not one that is split again and again: nothing has to be kept.
        key = jax.random.fold_in(_key(member, "step"), state.step)

        gradient = jax.value_and_grad(self._on_nodes(self.task.loss), has_aux=True)
        (loss, (model_state, terms)), grads = gradient(state.params, state.model_state, batch, key)

        updates, opt_state = self._optimizer(member).update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        decay = self.config.train.ema
        average = _averaged(state.average, params, state.step, decay) if decay else ()

        # The updates count, too: an update that is infinite is seen here, and not a step later by its loss.
        finite = jnp.all(jnp.stack([jnp.isfinite(array).all() for array in (loss, *jax.tree.leaves(updates))]))
        unseen = (state.nonfinite_step == NOT_YET) & ~finite
        nonfinite_step = jnp.where(unseen, state.step + 1, state.nonfinite_step)

        after = State(params, model_state, opt_state, average, state.step + 1, nonfinite_step)
        return after, {"loss": loss, **terms}

    def advance(self, state: State, member: Member, examples: Examples, order: Any) -> tuple[State, Figures]:
        """A step for each row of `order`, and the figures of each: `step`'s, with a leading axis of steps."""

        def next_step(state: State, rows: Any) -> tuple[State, Figures]:
            return self.step(state, member, examples, rows)

        if len(jax.tree.leaves(order)[0]) == 1:
            # XLA would keep a loop of one trip, with what loops cost on CPU: see `Programs`.
            state, figures = next_step(state, jax.tree.map(lambda x: x[0], order))
            return state, jax.tree.map(lambda x: x[None], figures)
        return jax.lax.scan(next_step, state, order)

    # Looking at what was trained

    def evaluate(self, state: State, member: Member, examples: Examples, mask: jax.Array, first: jax.Array) -> Figures:
        """The task's figures, each summed over the examples where the mask is 1.

        The first of the examples is number `first` of those that are held out.
        """
        # The same keys at each evaluation: what changes between two of them was trained.
        keys = _key_of_each(_key(member, "evaluate"), examples, first)
        evaluate = self._on_nodes(self.task.evaluate)
        figures = evaluate(self._evaluated(state), state.model_state, self.layout.share(examples), keys)
        return {name: jnp.sum(jnp.where(mask, values, 0)) for name, values in figures.items()}

    def log_weight(
        self, state: State, member: Member, examples: Examples, first: jax.Array, draw: jax.Array
    ) -> jax.Array:
        """The task's `log_weight` of each example in one of its draws; only where the task has one."""
        assert self.task.log_weight is not None
        keys = _key_of_each(jax.random.fold_in(_key(member, "draw"), draw), examples, first)
        log_weight = self._on_nodes(self.task.log_weight)
        return log_weight(self._evaluated(state), state.model_state, self.layout.share(examples), keys)

    def add_weight(
        self,
        log_sum: jax.Array,
        state: State,
        member: Member,
        examples: Examples,
        first: jax.Array,
        draw: jax.Array,
    ) -> jax.Array:
        """The logarithm of a sum of weights of each example, with those of one more draw in the sum."""
        return jnp.logaddexp(log_sum, self.log_weight(state, member, examples, first, draw))

    def log_mean(self, log_sum: jax.Array, mask: jax.Array) -> jax.Array:
        """The sum over the examples where the mask is 1 of the logarithm of the mean over all draws.

        `log_sum` has for each example the logarithm of the sum over them.
        """
        return jnp.sum(jnp.where(mask, log_sum - np.log(self.task.draws), 0))

    def sample(self, state: State, member: Member) -> jax.Array:
        """Bytes of text that the network writes; only where the task has it written."""
        assert self.task.sample is not None
        key = jax.random.fold_in(_key(member, "sample"), state.step)
        return self._on_nodes(self.task.sample)(self._evaluated(state), state.model_state, key)

    def pictures(self, state: State, member: Member, examples: Examples) -> Figures:
        """By name, images that the network makes of the examples; only where the task has them made."""
        assert self.task.pictures is not None
        # The same noise each time: a row of pictures shows how one image becomes sharp.
        key = _key(member, "sample")
        return self._on_nodes(self.task.pictures)(self._evaluated(state), state.model_state, examples, key)

    def statistics(self, state: State, member: Member) -> dict[str, Figures]:
        """By path of the weight, means over its features.

        Of "norms", the norms of the vectors that are trained; of "effective_step", how far a step turns a weight: the
        learning rate times the weight vector's norm over the square of the trained one's.
        """
        factor = self._schedule(state.step - 1)  # of the step that was made last
        vectors = parametrizations.vectors(state.params, self.axes)
        effective = {path: of_weight / trained**2 for path, (trained, of_weight) in vectors.items()}
        return {
            "norms": {path: jnp.mean(trained) for path, (trained, _) in vectors.items()},
            "effective_step": {path: member.learning_rate * factor * jnp.mean(x) for path, x in effective.items()},
        }

    # What they are made of

    def _on_nodes(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of plain parameters, as one of parameters that hold nodes."""
        stacks = self.task.stacks  # gathered by the network itself, layer by layer
        at_once = [use for use in self.uses if use.path.partition("/")[0] not in stacks]

        def gathering(params: Params, *rest: Any) -> Any:
            return function(self.layout.gather(params, at_once), *rest)

        return wn.wrap(gathering, scale=self.config.model.scale)

    def _evaluated(self, state: State) -> Params:
        """The parameters to evaluate."""
        return state.average if self.config.train.ema else state.params

    def _optimizer(self, member: Member) -> optax.GradientTransformation:
        steps = self.config.train.steps
        return optimizers.build(self.config.optimizer, member.learning_rate, steps, self._steps_per_epoch)

    @property
    def _schedule(self) -> optimizers.Schedule:
        return optimizers.schedule(self.config.optimizer, self.config.train.steps, self._steps_per_epoch)

    @property
    def _steps_per_epoch(self) -> int:
        return self.examples // self.config.data.batch_size


class _LayerGather:
    """The gather of the layers of a stack, for a network whose uses of its parameters are still to be read.

    Until `uses` are set, it leaves parameters as they are: they are read from the very program that gathers by them.
    So the task is built once, which for some takes a pass over all examples (a bigram model counts them).
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.uses: Any = None

    def __call__(self, stack: str, params: Params) -> Params:
        return params if self.uses is None else self.layout.gather_layer(stack, params, self.uses)


def weight_uses(task: tasks.Task, dataset: data.Dataset, config: ArmConfig) -> Any:
    """How the network uses each of its parameters."""

    def like(size: int) -> Any:
        return {name: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for name, x in dataset.train.items()}

    key = jax.eval_shape(jax.random.key, 0)
    params, model_state = jax.eval_shape(task.init, key, like(1))
    return wn.weight_uses(task.loss)(params, model_state, like(config.data.batch_size), key)


def _init_examples(config: ArmConfig) -> int:
    """How many examples initialization from data looks at."""
    return config.model.init_examples or config.data.batch_size


_PURPOSES = ("init", "order", "init from data", "step", "spread", "sample", "evaluate", "draw")


def _key(member: Member, purpose: str) -> jax.Array:
    """A key of the member's own for each purpose, so that arms of one seed see the same batches and the same noise."""
    return jax.random.fold_in(jax.random.key(member.seed), _PURPOSES.index(purpose))


def _key_of_each(key: jax.Array, examples: Examples, first: jax.Array) -> jax.Array:
    """A key for each example by its number, whichever others are with it: so figures are the same on any mesh."""
    count = len(next(iter(examples.values())))
    return jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(count))


def _spread(params: Params, axes: parametrizations.Axes, key: jax.Array, deviation: float) -> Params:
    """Each weight vector times a random factor."""
    numbers = {path: number for number, path in enumerate(axes)}

    def scaled(path: Any, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name not in axes:
            return leaf
        shape = jnp.sum(leaf, axes[name], keepdims=True).shape
        normal = jax.random.normal(jax.random.fold_in(key, numbers[name]), shape)
        return leaf * jnp.exp(deviation * normal)

    return jax.tree.map_with_path(scaled, params)


def _averaged(average: Params, params: Params, step: jax.Array, decay: float) -> Params:
    """The moving average with its decay warmed up, so that the start is soon forgotten."""
    warm = jnp.minimum(decay, (1 + step) / (10 + step))
    return optax.incremental_update(params, average, 1 - warm)
