"""The base of all tables of a config, kinds of values that they share, and words for what is not right about them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Any

import pydantic
from pydantic import Field

from experiments.errors import ConfigError

# JAX counts steps and seeds in 32 bits.
Count = Annotated[int, Field(gt=0, lt=2**31)]
"""How many of something, at least one."""

CountOrZero = Annotated[int, Field(ge=0, lt=2**31)]
"""How many of something, or none."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
"""A name that may stand in a file's name and in a dotted key."""

Fraction = Annotated[float, Field(ge=0, lt=1)]
"""A part of a whole, from 0 to less than 1."""


class Table(pydantic.BaseModel):
    """A table of a config file: typed strictly, unknown keys refused."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def sequence(value: Any) -> Any:
    """TOML's arrays as tuples, for fields that hold one."""
    return tuple(value) if isinstance(value, list) else value


def several(value: Any) -> Any:
    """One value, or TOML's array of them, as a tuple."""
    return sequence(value if isinstance(value, list | tuple) else [value])


def distinct(values: tuple[float, ...], what: str) -> tuple[float, ...]:
    """The values, none of which may stand there twice.

    Raises:
        ValueError: one does; the message says of `what`.
    """
    if len(set(values)) < len(values):
        raise ValueError(f"{shortened(str(list(values)))} names {what} twice")
    return values


def unknown(kind: str, name: str, names: Iterable[str]) -> str:
    """The message about a name that is none of `names`."""
    names = list(names)
    kinds = f"{kind[:-1]}ies" if kind.endswith("y") else f"{kind}s"
    return f"unknown {kind} {shortened(repr(name))}{nearest(name, names)}; {kinds}: {', '.join(names)}"


def nearest(word: str, words: Iterable[str]) -> str:
    """A guess at what was meant, to be put behind the word; or nothing."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.55)
    return f" (did you mean {close[0]!r}?)" if close else ""


def shortened(text: str) -> str:
    """A text of any length, for a message."""
    return text if len(text) <= 120 else f"{text[:120]}..."


def checked(kind: pydantic.TypeAdapter[Any], value: Any, where: str) -> Any:
    """A value of a file that a program wrote, as this type.

    Raises:
        ConfigError: it is something else; the message names the first key at fault.
    """
    try:
        return kind.validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ", ".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"{where}: {shortened(key)}: {first['msg']}; got {shortened(repr(first['input']))}; "
            "is it from another program?"
        ) from None
