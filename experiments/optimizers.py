"""Optimizers: any of optax's, by name, with a schedule, clipping and weight decay by label."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax
import pydantic
from pydantic import Field, NonNegativeFloat, PositiveFloat

import wn_jax as wn
from experiments.parametrizations import is_frozen
from experiments.schema import CountOrZero, Table, distinct, nearest, several, unknown
from wn_jax.optim import project_directions

Option = bool | int | float | str
Label = Literal["g", "v", "weight", "other"]
Schedule = Callable[[jax.Array], jax.Array]


def _rates(value: Any) -> Any:
    if isinstance(value, list | tuple) and not value:
        raise ValueError("is an empty list; give one number, or several for a sweep")
    return several(value)


class OptimizerConfig(Table):
    """An optimizer of optax, and the schedule, clipping and decay around it."""

    name: str
    """The name of a function of `optax` or `optax.contrib` that takes a learning rate."""

    learning_rate: Annotated[tuple[PositiveFloat, ...], pydantic.BeforeValidator(_rates)]
    """The learning rate, or several for a sweep."""

    options: dict[str, Option] = Field(default_factory=dict)
    """Further arguments of the function."""

    second_half: dict[str, float] = Field(default_factory=dict)
    """Other values of options, from the middle of training on: the paper's code changes Adam's first moment so."""

    schedule: Literal["constant", "linear_second_half", "cosine"] = "constant"
    """The factor on the learning rate: see the function `schedule`."""

    warmup_steps: CountOrZero = 0
    """The steps in which the learning rate rises linearly to its value."""

    clip_norm: PositiveFloat | None = None
    """The norm to which longer gradients are shortened, all parameters together."""

    weight_decay: dict[Label, NonNegativeFloat] = Field(default_factory=dict)
    """Decoupled decay (as AdamW's), a rate for each label.

    The labels are `g` and `v` of weight-normalized weights, other `weight`s (two axes or more), and `other` for all
    that is left.
    """

    keep_norms: bool = False
    """Whether each `v` of a weight-normalized network keeps its first norm (`wn_jax.optim.project_directions`)."""

    @pydantic.field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in _functions():
            raise ValueError(unknown("optimizer", name, sorted(_functions())))
        return name

    @pydantic.field_validator("learning_rate")
    @classmethod
    def _rates_differ(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        return distinct(rates, "a rate")

    @pydantic.model_validator(mode="after")
    def _can_be_built(self) -> OptimizerConfig:
        defaults = _defaults(self.name)
        for table, options in (("options", self.options), ("second_half", self.second_half)):
            for key, value in options.items():
                if key not in defaults:
                    known = f"{nearest(key, defaults)}; it has {', '.join(defaults)}"
                    raise ValueError(f"{table}.{key}: {self.name} has no such option{known}")
                _check_kind(f"{table}.{key}", value, defaults[key])
        for key in self.second_half:
            if not _is_number(self.options.get(key, defaults[key])):
                raise ValueError(f"second_half.{key}: needs a number to begin with; set options.{key}")
        _try_out(self)
        return self


def build(
    config: OptimizerConfig, learning_rate: float | jax.Array, steps: int, steps_per_epoch: int
) -> optax.GradientTransformation:
    """The optimizer for one learning rate.

    Arguments:
        config: the optimizer.
        learning_rate: one rate. It may be traced, so that the rates of a sweep train side by side.
        steps: the length of training.
        steps_per_epoch: the steps after which `linear_second_half` changes the rate.
    """
    factor = schedule(config, steps, steps_per_epoch)

    def rate(count: jax.Array) -> jax.Array:
        return learning_rate * factor(count)

    parts = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    parts.append(_named(config, rate, steps))
    if any(config.weight_decay.values()):
        parts.append(_decay(config.weight_decay, rate))
    parts.append(optax.masked(optax.set_to_zero(), is_frozen))
    if config.keep_norms:
        parts.append(project_directions())  # last, as it must see the whole update
    return optax.chain(*parts)


def schedule(config: OptimizerConfig, steps: int, steps_per_epoch: int) -> Schedule:
    """The factor on the learning rate, as a function of the step.

    `linear_second_half` is the paper's: 1 in the first half of training, then linearly to 0, a step an epoch.
    """

    def factor(count: jax.Array) -> jax.Array:
        warmup = jnp.minimum((count + 1) / (config.warmup_steps + 1), 1)
        if config.schedule == "linear_second_half":
            epoch = (count // steps_per_epoch).astype(jnp.float32)
            progress = epoch * steps_per_epoch / steps
            return warmup * jnp.clip(2 - 2 * progress, 0, 1)
        if config.schedule == "cosine":
            return warmup * (1 + jnp.cos(jnp.pi * count / steps)) / 2
        return warmup

    return factor


def _named(config: OptimizerConfig, rate: Schedule, steps: int) -> optax.GradientTransformation:
    """The function of optax, called with its options."""
    make = _functions()[config.name]
    if not config.second_half:
        return make(rate, **config.options)
    switched = {name: _switched(config, name, steps) for name in config.second_half}
    # Truth values and names choose code in optax, and cannot be arrays.
    static = [name for name, value in config.options.items() if isinstance(value, bool | str)]
    return optax.inject_hyperparams(make, static_args=static)(rate, **{**config.options, **switched})


def _switched(config: OptimizerConfig, name: str, steps: int) -> Schedule:
    """An option that takes its second value in the middle of training."""
    first = config.options.get(name, _defaults(config.name)[name])
    second = config.second_half[name]
    return lambda count: jnp.where(2 * count < steps, jnp.asarray(first), second)


def _decay(decay: Mapping[Label, float], rate: Schedule) -> optax.GradientTransformation:
    """A transformation that adds `-rate * decay * parameter` to the updates."""

    def init(_: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        step = rate(state.count)

        def decayed(label: Label, update: jax.Array, param: jax.Array) -> jax.Array:
            return update - step * decay.get(label, 0.0) * param

        updates = jax.tree.map(decayed, labels(params), updates, params)
        return updates, optax.ScaleByScheduleState(state.count + 1)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType] (its names differ)


def labels(params: Any) -> Any:
    """The label of each leaf for weight decay. Leaves that are not trained are "frozen", which has no rate."""

    def refine(label: str, leaf: jax.Array, frozen: bool) -> str:
        if frozen:
            return "frozen"
        return "weight" if label == "other" and leaf.ndim > 1 else label

    return jax.tree.map(refine, wn.labels(params), params, is_frozen(params))


def _functions() -> dict[str, Callable[..., Any]]:
    """The optimizers of optax by name: the functions that take a learning rate first.

    Those that are free of schedules are left out, as they are evaluated at other parameters than the trained ones.
    """
    functions = {**vars(optax.contrib), **vars(optax)}
    return {
        name: value
        for name, value in functions.items()
        if inspect.isfunction(value)
        and not name.startswith(("_", "scale_by_", "schedule_free_"))
        and next(iter(inspect.signature(value).parameters), None) == "learning_rate"
    }


def _defaults(name: str) -> dict[str, Any]:
    """The options of an optimizer, with their defaults."""
    parameters = list(inspect.signature(_functions()[name]).parameters.values())[1:]
    return {parameter.name: parameter.default for parameter in parameters}


def _check_kind(key: str, value: Option, default: Any) -> None:
    """Raise where a number, or a truth value, is given as something else."""
    if isinstance(default, bool) and not isinstance(value, bool):
        raise ValueError(f"{key}: must be true or false; got {value!r}")
    if _is_number(default) and not _is_number(value):
        raise ValueError(f"{key}: must be a number; got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _try_out(config: OptimizerConfig) -> None:
    """Build the optimizer and trace a step of it, so that what cannot work is an error before anything runs."""

    def step(params: Any) -> Any:
        plain = config.model_copy(update={"keep_norms": False})  # there are no nodes here
        optimizer = build(plain, config.learning_rate[0], steps=2, steps_per_epoch=1)
        updates, state = optimizer.update(params, optimizer.init(params), params)
        if any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(state)):
            raise TypeError("it keeps a random key, which would be the same for all seeds")
        return updates, state

    like = {"weight": jax.ShapeDtypeStruct((3, 2), jnp.float32), "other": jax.ShapeDtypeStruct((2,), jnp.float32)}
    try:
        jax.eval_shape(step, like)
    except Exception as error:  # noqa: BLE001  # optax checks little, so an option can raise whatever Python raises
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"optax's {config.name} cannot be used here with these options, a schedule and gradients alone: {cause}"
        ) from None
