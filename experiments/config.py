"""What an experiment is: a TOML file, checked as a whole before anything runs.

A file holds one base configuration and `[arms.NAME]` tables, each of them a few overrides of the base. Every error
is a `ConfigError` that says file, key, what is allowed and what was probably meant.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic
from pydantic import Field, PositiveFloat


class ConfigError(ValueError):
    """A configuration that cannot run; the message is meant for the person who wrote it."""


# JAX counts steps and seeds in 32 bits.
Count = Annotated[int, Field(gt=0, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class _Table(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataConfig(_Table):
    """The data set, and how many examples a step sees."""

    name: Literal["digits"]
    batch_size: Count


class ModelConfig(_Table):
    """A multilayer perceptron. `norm` acts on each hidden layer's pre-activation, `weight_norm` on every kernel.

    `init` is the framework's own, or goes on from there and sets the magnitudes and biases of the weight-normalized
    layers from the first batch of training data.
    """

    hidden: Annotated[tuple[Count, ...], Field(strict=False)]
    norm: Literal["none", "batch", "mean_only"] = "none"
    weight_norm: bool = False
    init: Literal["framework", "data"] = "framework"

    @pydantic.model_validator(mode="after")
    def _data_has_magnitudes_to_set(self) -> ModelConfig:
        if self.init == "data" and not self.weight_norm:
            raise ValueError(
                "init = 'data' sets the magnitudes of weight-normalized layers, and weight_norm is false; "
                "set weight_norm = true or init = 'framework'"
            )
        return self


class OptimizerConfig(_Table):
    """An optimizer of optax; `momentum` is read by `sgd` only."""

    name: Literal["sgd", "adam"]
    learning_rate: PositiveFloat
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0


class TrainConfig(_Table):
    """Length of training. Metrics are recorded every `steps_per_record` steps, which are one jitted call."""

    steps: Count
    steps_per_record: Count
    seeds: Count
    first_seed: Seed = 0
    target_loss: PositiveFloat

    @pydantic.model_validator(mode="after")
    def _whole_records(self) -> TrainConfig:
        if self.steps % self.steps_per_record:
            raise ValueError(f"steps ({self.steps}) must be a multiple of steps_per_record ({self.steps_per_record})")
        return self


class ArmConfig(_Table):
    """Everything that one training run depends on."""

    data: DataConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    train: TrainConfig

    @pydantic.model_validator(mode="after")
    def _batch_has_a_deviation(self) -> ArmConfig:
        if self.model.init == "data" and self.data.batch_size < 2:
            raise ValueError(
                "data.batch_size = 1 has no standard deviation for model.init = 'data'; "
                "set data.batch_size to 2 or more, or model.init = 'framework'"
            )
        return self


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]


class Experiment(_Table):
    """A name and the resolved arms, in the order of the file. Without `[arms]` the base is the one arm, `base`."""

    name: Name
    arms: dict[Name, ArmConfig]


def load(path: Path | str, settings: Iterable[str] = ()) -> Experiment:
    """Read and check a config file.

    Arguments:
        path: the TOML file.
        settings: changes to it, each `"a.b=value"` with a TOML value (or bare text, which is taken as a string).

    Raises:
        ConfigError: the file is missing or no TOML, or a key or value is not allowed.
    """
    source = str(path)
    raw = _read(Path(path))
    for setting in settings:
        try:
            _apply(raw, setting)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None
    header = {"name": raw.pop("name")} if "name" in raw else {}
    overrides = raw.pop("arms", {})
    if not isinstance(overrides, dict) or not all(isinstance(override, dict) for override in overrides.values()):
        raise ConfigError(f"{source}: arms must be tables of overrides, such as [arms.plain]")
    base = _checked(ArmConfig, raw, source, {})
    merged = {arm: _merged(raw, override) for arm, override in overrides.items()}
    arms = {arm: _checked(ArmConfig, merged[arm], source, {f"arms.{arm}": overrides[arm]}) for arm in merged}
    if any(arm.train != base.train for arm in arms.values()):
        raise ConfigError(f"{source}: an arm overrides a key of [train]; arms are compared at the same steps and seeds")
    return _checked(Experiment, {**header, "arms": arms or {"base": base}}, source, {})


def select(experiment: Experiment, arms: Iterable[str]) -> Experiment:
    """The experiment with only these arms.

    Raises:
        ConfigError: there is no such arm.
    """
    names = list(arms)
    for arm in names:
        _check_arm(arm, experiment.arms)
    return experiment.model_copy(update={"arms": {arm: experiment.arms[arm] for arm in names}})


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """A config file's content that loads as this experiment: the first arm as base, and each arm's differences."""
    dumped = {name: arm.model_dump(mode="json") for name, arm in experiment.arms.items()}
    base = next(iter(dumped.values()))
    return {"name": experiment.name, **base, "arms": {name: _difference(arm, base) for name, arm in dumped.items()}}


def unknown(kind: str, name: str, names: Iterable[str]) -> str:
    """What to say of a name that is none of `names`."""
    return f"unknown {kind} {name!r}{_nearest(name, names)}; {kind}s: {', '.join(names)}"


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        siblings = sorted(other.name for other in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        hint = f"{_nearest(path.name, siblings)}; found there: {', '.join(siblings)}" if siblings else ""
        raise ConfigError(f"{path}: no such config file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _apply(raw: dict[str, Any], setting: str) -> None:
    """Write one `--set` into the file's content."""
    key, equals, text = setting.partition("=")
    try:
        parts, table = [], tomllib.loads(f"{key} = 0") if equals else {}
        while isinstance(table, dict):
            ((part, table),) = table.items()
            parts.append(part)
    except (tomllib.TOMLDecodeError, ValueError):
        raise ConfigError(f"--set {setting}: expected a.b=value, such as optimizer.learning_rate=0.1") from None
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    if parts[0] == "arms" and len(parts) > 1:
        _check_arm(parts[1], raw.get("arms", {}))
    table = raw
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {setting}: {part!r} is a value, not a table")
    table[parts[-1]] = value


def _check_arm(arm: str, arms: Iterable[str]) -> None:
    if arm not in arms:
        raise ConfigError(unknown("arm", arm, arms))


def _merged(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    nested = {
        key: _merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in override.items()
    }
    return {**base, **nested}


def _difference(table: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """The override that `_merged` turns `base` into `table` with."""
    nested = {key: _difference(value, base[key]) if isinstance(value, dict) else value for key, value in table.items()}
    return {key: value for key, value in nested.items() if value not in ({}, base[key])}


def _checked(model: type[_Table], raw: Mapping[str, Any], source: str, overrides: Mapping[str, Any]) -> Any:
    try:
        return model.model_validate(raw)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = _location(first["loc"], overrides)
        raise ConfigError(f"{source}: {where}: {_explain(model, first, in_arm=bool(overrides))}") from None


def _location(loc: tuple[Any, ...], overrides: Mapping[str, Any]) -> str:
    """The dotted key, under `arms.NAME` when it was the arm that set it."""
    for prefix, override in overrides.items():
        table: Any = override
        for part in loc:
            table = table.get(part) if isinstance(table, dict) else table
        if table is not None:
            return ".".join([prefix, *map(str, loc)])
    return ".".join(map(str, loc)) or "config"


def _explain(model: type[_Table], error: Any, in_arm: bool) -> str:
    *parents, key = error["loc"] or ("",)
    if error["type"] == "extra_forbidden":
        allowed = list(_table_at(model, parents).model_fields)
        if model is ArmConfig and not parents and not in_arm:
            allowed += ["name", "arms"]
        return f"unknown key{_nearest(str(key), allowed)}; allowed: {', '.join(allowed)}"
    if error["type"] == "literal_error":
        allowed = list(get_args(_table_at(model, parents).model_fields[key].annotation))
        return (
            f"{error['input']!r} is not allowed{_nearest(str(error['input']), allowed)}; allowed: {', '.join(allowed)}"
        )
    if error["type"] == "model_type":
        return f"must be a table; got {error['input']!r}"
    if error["type"] == "missing":
        return "missing"
    message = error["msg"].removeprefix("Value error, ")
    return message if error["type"] == "value_error" else f"{message}; got {error['input']!r}"


def _table_at(model: type[_Table], parents: Iterable[Any]) -> type[_Table]:
    for part in parents:
        annotation = model.model_fields[part].annotation
        assert isinstance(annotation, type)
        model = annotation
    return model


def _nearest(word: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
