"""From a config to the pure functions that train. Nothing here touches files, clocks or the screen."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import wn_jax as wn
from experiments import data, optimizers, parametrizations, tasks
from experiments.config.experiment import ArmConfig
from experiments.errors import ConfigError
from experiments.tasks import Examples

NOT_YET = -1


class Member(NamedTuple):
    """What tells the runs of one arm apart; with a leading axis, several of them."""

    seed: jax.Array
    learning_rate: jax.Array


class State(NamedTuple):
    """One run's state; with a leading axis, that of several members.

    `average` is the moving average of the parameters (`()` without one). `nonfinite_step` is the first step, counted
    from 1, whose loss or update was not finite, or `NOT_YET`.
    """

    params: Any
    model_state: Any
    opt_state: Any
    average: Any
    step: jax.Array
    nonfinite_step: jax.Array


@dataclasses.dataclass(frozen=True)
class Functions:
    """The functions of one arm, for a single member; `vmap` them over members and states.

    Attributes:
        first: `member -> rows`: the training examples that `init` looks at.
        init: `(member, training examples, rows) -> state`.
        order: `(member, first step) -> (record_every, batch size)`: the rows of the steps up to the next record.
        advance: `(state, member, training examples, order) -> state, {name: (steps,)}`: a step for each row of `order`,
            and of each the "loss" and its terms.
        evaluate: `(state, member, examples, mask, first) -> {name: sum over the examples where the mask is 1}`, where
            the first of the examples is number `first` of those that are held out.
        log_weight: `(state, member, examples, first, draw) -> (examples,)`, as the task's, where it has one.
        sample, pictures: `(state, member) -> (bytes,)`, `(state, member, examples) -> {name: images}`, as the task's,
            where it has them.
        statistics: `state, member -> {"norms": {weight: mean}, "effective_step": {weight: mean}}`, over the features.
        uses: how the network uses each parameter, as `wn.weight_uses` gives it.
        task: what is trained.
    """

    first: Callable[[Member], jax.Array]
    init: Callable[[Member, Examples, Any], State]
    order: Callable[[Member, jax.Array], jax.Array]
    advance: Callable[[State, Member, Examples, Any], tuple[State, dict[str, jax.Array]]]
    evaluate: Callable[[State, Member, Examples, jax.Array, jax.Array], dict[str, jax.Array]]
    log_weight: Callable[[State, Member, Examples, jax.Array, jax.Array], jax.Array]
    sample: Callable[[State, Member], jax.Array]
    pictures: Callable[[State, Member, Examples], dict[str, jax.Array]]
    statistics: Callable[[State, Member], dict[str, dict[str, jax.Array]]]
    uses: Any
    task: tasks.Task

    def start(self, member: Member, examples: Examples) -> State:
        """The first state, from all training examples."""
        return self.init(member, examples, self.first(member))

    @property
    def convolves(self) -> bool:
        """Whether the network has convolutions."""
        return any("conv_general_dilated" in use.uses for use in self.uses)


class Layout:
    """How arrays lie in a compiled function. This one leaves it open; `Placement` is one on a mesh of devices."""

    def take(self, examples: Examples, rows: Any) -> Examples:
        """The examples of a batch."""
        return {name: array[rows] for name, array in examples.items()}

    def share(self, examples: Examples) -> Examples:
        """A batch, shared out among the devices."""
        return examples

    def gather(self, params: Any, uses: Any) -> Any:
        """Plain parameters, as layers that use them so need them."""
        return params

    def gather_layer(self, stack: str, params: Any, uses: Any) -> Any:
        """The same, of one layer of the subtree `stack`, whose leaves have a leading axis of layers."""
        return params


def functions(
    config: ArmConfig,
    dataset: data.Dataset,
    layout: Layout | None = None,
) -> Functions:
    """The functions of an arm.

    Arguments:
        config: the arm.
        dataset: only its shapes, names and classes are used.
        layout: how arrays lie on several devices.

    Raises:
        ConfigError: the network does not fit the data, or it asks for more examples than there are.
    """
    train, layout = config.train, layout or Layout()
    examples = dataset.examples
    steps_per_epoch = examples // config.data.batch_size
    init_examples = config.model.init_examples or config.data.batch_size
    if config.model.init == "data" and init_examples > examples:
        raise ConfigError(
            f"model.init_examples: {init_examples} is more than the {examples} training examples; lower it"
        )
    uses = weight_uses(tasks.build(config.model, dataset), dataset, config)
    task = tasks.build(config.model, dataset, functools.partial(layout.gather_layer, uses=uses))
    at_once = [use for use in uses if use.path.partition("/")[0] not in task.stacks]
    axes = {use.path: use.reduction for use in uses if use.reduction is not None}

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def gathering(params: Any, *rest: Any) -> Any:
            return function(layout.gather(params, at_once), *rest)

        return wn.wrap(gathering, scale=config.model.scale)

    def optimizer(member: Member) -> optax.GradientTransformation:
        return optimizers.build(config.optimizer, member.learning_rate, train.steps, steps_per_epoch)

    def order(member: Member, first_step: jax.Array) -> jax.Array:
        key = _key(member, "order")
        return data.batch_indices(key, examples, config.data.batch_size, first_step, train.record_every)

    def first(member: Member) -> jax.Array:
        if config.model.init != "data":
            return jnp.zeros(1, jnp.int32)  # shapes are all that is looked at
        return data.batch_indices(_key(member, "order"), examples, init_examples, jnp.int32(0), 1)[0]

    def init(member: Member, dataset: Examples, rows: Any) -> State:
        # Flax derives each kernel from the key and its path, so all arms of one seed start from the same kernels.
        batch = layout.take(dataset, rows)
        params, model_state = task.init(_key(member, "init"), batch)
        if config.model.init_spread:
            params = _spread(params, axes, _key(member, "spread"), config.model.init_spread)

        def from_data(nodes: Any) -> Any:
            return wn.init_from_data(task.loss)(nodes, model_state, batch, _key(member, "init from data"))

        by_data = from_data if config.model.init == "data" else None
        params = parametrizations.rewrite(config.model.weights, params, axes, by_data)
        average = jax.tree.map(jnp.copy, params) if train.ema else ()
        zero = jnp.zeros((), jnp.int32)
        return State(params, model_state, optimizer(member).init(params), average, zero, zero + NOT_YET)

    def step(state: State, member: Member, batch: Examples) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(_key(member, "step"), state.step)
        gradient = jax.value_and_grad(wrapped(task.loss), has_aux=True)
        (loss, (model_state, terms)), grads = gradient(state.params, state.model_state, batch, key)
        updates, opt_state = optimizer(member).update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = _averaged(state.average, params, state.step, train.ema) if train.ema else ()
        finite = jnp.all(jnp.stack([jnp.isfinite(array).all() for array in (loss, *jax.tree.leaves(updates))]))
        unseen = (state.nonfinite_step == NOT_YET) & ~finite
        nonfinite_step = jnp.where(unseen, state.step + 1, state.nonfinite_step)
        return State(params, model_state, opt_state, average, state.step + 1, nonfinite_step), {"loss": loss, **terms}

    def advance(state: State, member: Member, dataset: Examples, order: Any) -> tuple[State, dict[str, jax.Array]]:
        def next_step(state: State, rows: Any) -> tuple[State, dict[str, jax.Array]]:
            return step(state, member, layout.take(dataset, rows))

        if len(jax.tree.leaves(order)[0]) == 1:  # XLA would keep a loop of one trip, with what it costs: see `Arm`
            state, figures = next_step(state, jax.tree.map(lambda x: x[0], order))
            return state, jax.tree.map(lambda x: x[None], figures)
        return jax.lax.scan(next_step, state, order)

    def evaluated(state: State) -> Any:
        return state.average if train.ema else state.params

    def evaluate(
        state: State, member: Member, examples: Examples, mask: jax.Array, first: jax.Array
    ) -> dict[str, jax.Array]:
        keys = _key_of_each(_key(member, "evaluate"), examples, first)  # the same each time: what changes is trained
        figures = wrapped(task.evaluate)(evaluated(state), state.model_state, layout.share(examples), keys)
        return {name: jnp.sum(jnp.where(mask, values, 0)) for name, values in figures.items()}

    def log_weight(state: State, member: Member, examples: Examples, first: jax.Array, draw: jax.Array) -> jax.Array:
        assert task.log_weight is not None
        keys = _key_of_each(jax.random.fold_in(_key(member, "draw"), draw), examples, first)
        return wrapped(task.log_weight)(evaluated(state), state.model_state, layout.share(examples), keys)

    def sample(state: State, member: Member) -> jax.Array:
        assert task.sample is not None
        key = jax.random.fold_in(_key(member, "sample"), state.step)
        return wrapped(task.sample)(evaluated(state), state.model_state, key)

    def pictures(state: State, member: Member, examples: Examples) -> dict[str, jax.Array]:
        assert task.pictures is not None
        # The same noise each time: a row of pictures shows how one image becomes sharp.
        return wrapped(task.pictures)(evaluated(state), state.model_state, examples, _key(member, "sample"))

    def statistics(state: State, member: Member) -> dict[str, dict[str, jax.Array]]:
        factor = optimizers.schedule(config.optimizer, train.steps, steps_per_epoch)(state.step - 1)
        vectors = parametrizations.vectors(state.params, axes)
        effective = {path: of_weight / trained**2 for path, (trained, of_weight) in vectors.items()}
        return {
            "norms": {path: jnp.mean(trained) for path, (trained, _) in vectors.items()},
            "effective_step": {path: member.learning_rate * factor * jnp.mean(x) for path, x in effective.items()},
        }

    return Functions(first, init, order, advance, evaluate, log_weight, sample, pictures, statistics, uses, task)


def members(config: ArmConfig) -> list[tuple[float, int]]:
    """Learning rate and seed of each member, seeds of one rate together."""
    seeds = range(config.train.first_seed, config.train.first_seed + config.train.seeds)
    return [(rate, seed) for rate in config.optimizer.learning_rate for seed in seeds]


def as_arrays(chosen: list[tuple[float, int]]) -> Member:
    """Members as one, with a leading axis."""
    rates, seeds = zip(*chosen, strict=True)
    return Member(jnp.asarray(seeds, jnp.int32), jnp.asarray(rates, jnp.float32))


def weight_uses(task: tasks.Task, dataset: data.Dataset, config: ArmConfig) -> Any:
    """How the network uses each of its parameters."""

    def like(size: int) -> Examples:
        return {name: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for name, x in dataset.train.items()}  # type: ignore[misc]

    key = jax.eval_shape(jax.random.key, 0)
    params, model_state = jax.eval_shape(task.init, key, like(1))
    return wn.weight_uses(task.loss)(params, model_state, like(config.data.batch_size), key)


_PURPOSES = ("init", "order", "init from data", "step", "spread", "sample", "evaluate", "draw")


def _key(member: Member, purpose: str) -> jax.Array:
    """A key of the member's own for each purpose, so that arms of one seed see the same batches and the same noise."""
    return jax.random.fold_in(jax.random.key(member.seed), _PURPOSES.index(purpose))


def _key_of_each(key: jax.Array, examples: Examples, first: jax.Array) -> jax.Array:
    """A key for each example by its number, whichever others are with it: so figures are the same on any mesh."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(len(next(iter(examples.values())))))


def _spread(params: Any, axes: dict[str, tuple[int, ...]], key: jax.Array, deviation: float) -> Any:
    """Each weight vector times a random factor."""

    def scaled(path: Any, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name not in axes:
            return leaf
        shape = jnp.sum(leaf, axes[name], keepdims=True).shape
        normal = jax.random.normal(jax.random.fold_in(key, list(axes).index(name)), shape)
        return leaf * jnp.exp(deviation * normal)

    return jax.tree_util.tree_map_with_path(scaled, params)


def _averaged(average: Any, params: Any, step: jax.Array, decay: float) -> Any:
    """The moving average with its decay warmed up, so that the start is soon forgotten."""
    warm = jnp.minimum(decay, (1 + step) / (10 + step))
    return optax.incremental_update(params, average, 1 - warm)
