"""Spreading a dataclass of options into the options of a command. Which options there are, `options` says."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, get_type_hints


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer needs it: in place of a dataclass, it takes each of its fields as an option.

    The options stand where the dataclass stood, in the order of its fields.
    """
    parameters = inspect.signature(command, eval_str=True).parameters
    taken = [part for parameter in parameters.values() for part in _parts(parameter)]

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        def value(parameter: inspect.Parameter) -> Any:
            if not _is_options(parameter):
                return given[parameter.name]
            return parameter.annotation(**{part.name: given[part.name] for part in _parts(parameter)})

        command(**{name: value(parameter) for name, parameter in parameters.items()})

    # Typer reads the one for names and defaults, and the other for types.
    with_options.__signature__ = inspect.Signature(taken)  # pyright: ignore[reportAttributeAccessIssue] (not in types)
    with_options.__annotations__ = {part.name: part.annotation for part in taken}
    return with_options


def _parts(parameter: inspect.Parameter) -> Iterator[inspect.Parameter]:
    """The parameters in the place of one, all of them given by name."""
    by_name = inspect.Parameter.KEYWORD_ONLY
    if not _is_options(parameter):
        yield parameter.replace(kind=by_name)
        return
    types = get_type_hints(parameter.annotation, include_extras=True)
    for field in dataclasses.fields(parameter.annotation):
        yield inspect.Parameter(field.name, by_name, default=field.default, annotation=types[field.name])


def _is_options(parameter: inspect.Parameter) -> bool:
    """Whether the parameter stands for several options."""
    return dataclasses.is_dataclass(parameter.annotation)
