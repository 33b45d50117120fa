"""Reading an experiment from a TOML file, checked as a whole before anything runs.

A file holds one base configuration and `[arms.NAME]` tables, each of them a few overrides of the base. Every error
is a `ConfigError` that says file, key, what is allowed and what was probably meant. Which keys there are, the tables
themselves say.
"""

from __future__ import annotations

import functools
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import pydantic

from experiments import files
from experiments.config.experiment import ArmConfig, Experiment
from experiments.errors import ConfigError
from experiments.schema import Table, nearest, shortened, unknown
from experiments.tasks import ModelConfig


def load(path: Path | str, settings: Iterable[str] = ()) -> Experiment:
    """Read and check a config file.

    Arguments:
        path: the TOML file.
        settings: changes to it, each `"a.b=value"` with a TOML value (or bare text, which is taken as a string).

    Raises:
        ConfigError: the file is missing or no TOML, or a key or value is not allowed.
    """
    source, raw = str(path), _with_settings(Path(path), settings)

    header: dict[str, Any] = {key: raw.pop(key) for key in ("name", "conditioning") if key in raw}
    overrides = raw.pop("arms", {})
    if not isinstance(overrides, dict) or not all(isinstance(override, dict) for override in overrides.values()):
        raise ConfigError(f"{source}: arms must be tables of overrides, such as [arms.plain]")

    base = _checked(ArmConfig, raw, source, {}) if not overrides else None
    merged = {arm: _merged(raw, override) for arm, override in overrides.items()}
    arms = {arm: _checked(ArmConfig, merged[arm], source, {f"arms.{arm}": overrides[arm]}) for arm in merged}

    if len({arm.train for arm in arms.values()}) > 1:
        raise ConfigError(f"{source}: an arm overrides a key of [train]; arms are compared at the same steps and seeds")
    return _checked(Experiment, {**header, "arms": arms or {"base": base}}, source, {})


AnyTable = TypeVar("AnyTable", bound=Table)


def load_table(table: type[AnyTable], path: Path | str, settings: Iterable[str] = ()) -> AnyTable:
    """Read and check a config file that is one table, without arms. Arguments and errors are those of `load`."""
    return _checked(table, _with_settings(Path(path), settings), str(path), {})


def select(experiment: Experiment, arms: Iterable[str]) -> Experiment:
    """The experiment with only these arms, and without its `[conditioning]` if that needs another one.

    Raises:
        ConfigError: there is no such arm.
    """
    names = list(arms)
    for arm in names:
        _check_arm(arm, experiment.arms)
    table = experiment.conditioning if experiment.conditioning and experiment.conditioning.path in names else None
    return experiment.model_copy(update={"arms": {arm: experiment.arms[arm] for arm in names}, "conditioning": table})


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """A config file's content that loads as this experiment: the base is what all arms share."""
    arms = {name: arm.model_dump(mode="json", exclude_none=True) for name, arm in experiment.arms.items()}
    base = functools.reduce(_common, arms.values())
    header = experiment.model_dump(mode="json", exclude={"arms"}, exclude_none=True)
    return {**header, **base, "arms": {name: _rest(arm, base) for name, arm in arms.items()}}


def _with_settings(path: Path, settings: Iterable[str]) -> dict[str, Any]:
    """A file's content with the changes made to it."""
    raw = _read(path)
    for setting in settings:
        try:
            _apply(raw, setting)
            files.check_size(raw)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        except ValueError as error:
            raise ConfigError(f"{path}: --set {shortened(setting)}: {error}") from None
    return raw


def _read(path: Path) -> dict[str, Any]:
    """The content of a TOML file."""
    if not os.path.lexists(path):
        siblings = sorted(other.name for other in path.parent.glob("*.toml")) if os.path.isdir(path.parent) else []
        hint = f"{nearest(path.name, siblings)}; found there: {', '.join(siblings)}" if siblings else ""
        raise ConfigError(f"{shortened(str(path))}: no such config file{hint}")
    return files.load(path, files.toml)


def _apply(raw: dict[str, Any], setting: str) -> None:
    """Write one `--set` into the file's content."""
    key, equals, text = setting.partition("=")
    try:
        # As a key of TOML, so that what stands in quotes may hold dots.
        parts, table = [], tomllib.loads(f"{key} = 0") if equals else {}
        while isinstance(table, dict):
            ((part, table),) = table.items()
            parts.append(part)
    except (RecursionError, ValueError):  # TOML's own error is one, too
        raise ConfigError(
            f"--set {shortened(setting)}: expected a.b=value, such as optimizer.learning_rate=0.1"
        ) from None

    try:
        value = files.toml(f"value = {text}")["value"]
    except files.NoTOMLError:
        value = text.strip()  # bare text, which is easier to type in a shell

    # Written first and checked later, a misspelt arm would be a new one.
    if parts[0] == "arms" and len(parts) > 1 and isinstance(raw.get("arms", {}), dict):
        _check_arm(parts[1], raw.get("arms", {}))

    table = raw
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {shortened(setting)}: {part!r} is a value, not a table")
    table[parts[-1]] = value


def _check_arm(arm: str, arms: Iterable[str]) -> None:
    """Check that there is such an arm.

    Raises:
        ConfigError: there is none.
    """
    if arm not in arms:
        raise ConfigError(unknown("arm", arm, arms))


def _merged(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """The base with what the override changes. A model of another name has those keys of the base's that all have."""

    def value(key: str, new: Any) -> Any:
        old = base.get(key)
        if not (isinstance(old, dict) and isinstance(new, dict)):
            return new
        if key == "model" and {"name"} <= old.keys() & new.keys() and old["name"] != new["name"]:
            old = {name: item for name, item in old.items() if name in ModelConfig.model_fields}
        return _merged(old, new)

    return {**base, **{key: value(key, new) for key, new in override.items()}}


_ORDERED = ("init_scale",)
"""Tables in which the order of keys counts, so that they are written whole: in the base, or in each arm."""


def _common(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The keys whose values are the same in both tables, and of tables in them, what is the same there."""
    common = {}
    for key in first.keys() & second.keys():
        tables = isinstance(first[key], dict) and isinstance(second[key], dict)
        if tables and key not in _ORDERED:
            common[key] = _common(first[key], second[key])
        elif first[key] == second[key] and (not tables or list(first[key]) == list(second[key])):
            common[key] = first[key]
    return {key: common[key] for key in first if key in common}


def _rest(table: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """The override that `_merged` turns `base` into `table` with."""
    nested = {
        key: _rest(value, base[key]) if isinstance(value, dict) and key in base else value
        for key, value in table.items()
    }
    return {key: value for key, value in nested.items() if key not in base or value not in ({}, base[key])}


def _checked(model: type[Table], raw: Mapping[str, Any], source: str, overrides: Mapping[str, Any]) -> Any:
    """The content as a table of this type.

    Arguments:
        model: the type.
        raw: the content.
        source: the file, named in errors.
        overrides: the tables that changed the content, by their dotted names, so that errors name the one at fault.

    Raises:
        ConfigError: a key or value is not allowed. Of several, the first is told.
    """
    try:
        return model.model_validate(raw)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        keys, owner = _locate(model, first["loc"])
        where = _location(keys, overrides)
        raise ConfigError(
            f"{source}: {shortened(where)}: {_explain(owner, first, keys, in_arm=where.startswith('arms.'))}"
        ) from None


def _locate(model: type[Table], loc: tuple[Any, ...]) -> tuple[list[str], type[Table]]:
    """The keys of an error's location, without the tags that pydantic puts in, and the table of the last one."""
    keys, owner, tables = [], model, {"": model}
    for part in loc:
        if part in tables:  # the tag of one of several tables that may stand here
            owner, tables = tables[part], {}
            continue
        if part == "[key]":  # that a key itself is wrong, pydantic says with one more part
            continue
        keys.append(str(part))
        if len(tables) == 1:
            (owner,) = tables.values()
        field = owner.model_fields.get(part) if isinstance(part, str) else None
        tables = _tables(field.annotation) if field else {}
    return keys, owner


def _tables(annotation: Any) -> dict[str, type[Table]]:
    """The tables that may stand in a field, by the name that tells them apart."""
    kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type) and issubclass(kind, Table)]
    if len(kinds) == 1:
        return {"": kinds[0]}
    return {get_args(kind.model_fields["name"].annotation)[0]: kind for kind in kinds}


def _location(keys: list[str], overrides: Mapping[str, Any]) -> str:
    """The dotted key, under `arms.NAME` when it was the arm that set it."""
    for prefix, override in overrides.items():
        table: Any = override
        for key in keys:
            table = table.get(key) if isinstance(table, dict) else table
        if table is not None:
            return ".".join([prefix, *keys])
    return ".".join(keys) or "config"


def _explain(owner: type[Table], error: Any, keys: list[str], in_arm: bool) -> str:
    """The error that pydantic found, in the words of a config file."""
    key, given = keys[-1] if keys else "", error["input"]
    if error["type"] == "extra_forbidden":
        allowed = list(owner.model_fields)
        if owner is ArmConfig and not in_arm:  # at the file's top, where more may stand
            allowed += ["name", "arms", "conditioning"]
        return f"unknown key{nearest(key, allowed)}; allowed: {', '.join(allowed)}"
    if error["type"] in ("literal_error", "union_tag_invalid"):
        choices = error["ctx"].get("expected") or error["ctx"]["expected_tags"]
        allowed = re.findall("'([^']*)'", choices)
        given = error["ctx"].get("tag", given)
        return f"{shortened(repr(given))} is not allowed{nearest(str(given), allowed)}; allowed: {', '.join(allowed)}"
    if error["type"] in ("model_type", "model_attributes_type"):
        return f"must be a table; got {shortened(repr(given))}"
    if error["type"] == "missing":
        return "missing"
    if error["type"] == "union_tag_not_found":
        return "name: missing" if isinstance(given, dict) else f"must be a table; got {shortened(repr(given))}"
    message = error["msg"].removeprefix("Value error, ")
    return message if error["type"] == "value_error" else f"{message}; got {shortened(repr(given))}"
