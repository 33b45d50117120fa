"""The rules of a name map: which names of PyTorch go to which paths, read in either direction.

This file owns names and paths, and knows no arrays: what goes to a place is `_flax`'s.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import TypeAlias

from wn_jax.torch._layouts import Array

NameMap: TypeAlias = Mapping[str, "Array | str | NameMap | None"]
"""Names of PyTorch, nested as one likes, to places: an `Array`, a path, or `None` for what is left out."""

_NUMBER = re.compile(r"\{([A-Za-z]\w*)\}")


class Rule:
    """A name, in which `{i}` stands for any number, and its place, whose paths have the same numbers.

    Without a place, it is about all that the name is the beginning of: a whole module that is left out.

    Attributes:
        name: the name, with `{i}` and the like in it.
        place: where it goes, or `None` where it is left out.
        literal: whether the rule is about this one name only, so that it can be looked up.
    """

    def __init__(self, name: str, place: Array | None) -> None:
        self.name = name
        self.place = place
        self.literal = place is not None and not _NUMBER.search(name)
        self._paths = place.paths if place else ()
        self._name_pattern = _pattern(name, "" if place else r"(\..*)?")
        self._path_patterns = [_pattern(path) for path in self._paths]

    def paths_for(self, name: str) -> list[str] | None:
        """Where a name goes: to no path where it is left out, and `None` where the rule is not about it."""
        match = self._name_pattern.fullmatch(name)
        return None if match is None else [_filled(path, match.groupdict()) for path in self._paths]

    def names_among(self, paths: Collection[str]) -> Iterator[tuple[str, list[str]]]:
        """The names that are made of some of these paths, each with all of its paths, there or not."""
        if self.literal:
            if any(path in paths for path in self._paths):
                yield self.name, list(self._paths)
            return
        found = (pattern.fullmatch(path) for pattern in self._path_patterns for path in paths)
        numbers = {tuple(sorted(match.groupdict().items())) for match in found if match}
        for chosen in map(dict, sorted(numbers, key=lambda pairs: [int(number) for _, number in pairs])):
            yield _filled(self.name, chosen), [_filled(path, chosen) for path in self._paths]


def rules_of(names: NameMap) -> list[Rule]:
    """The rules of a map.

    Raises:
        ValueError: a place counts other numbers than its name; two numbers stand side by side.
        TypeError: the map, or a place in it, is something else.
    """
    if not isinstance(names, Mapping):
        raise TypeError(f"a name map is a dict from PyTorch's names to places; got a {type(names).__name__}")
    rules = list(_rules(names, ""))
    for rule in rules:
        for path in rule.place.paths if rule.place else ():
            _check_numbers(rule.name, path)
    return rules


def _check_numbers(name: str, path: str) -> None:
    """Raises where a name and its path could not be read in both directions."""
    ours, theirs = set(_NUMBER.findall(name)), set(_NUMBER.findall(path))
    if ours != theirs:
        raise ValueError(
            f"{name!r} counts {_braces(ours)}, and its place {path!r} counts {_braces(theirs)}, so keys and leaves "
            "would not pair off; use the same numbers on both sides"
        )
    if "}{" in name + " " + path:  # in "123", nothing would say where the first number ends
        raise ValueError(f"{name!r} or its place {path!r} has numbers side by side; put a sign between them")


def _rules(names: NameMap, prefix: str) -> Iterator[Rule]:
    """The rules of a map whose names continue a prefix."""
    for key, place in names.items():
        if not isinstance(key, str):
            raise TypeError(f"the keys of a name map are strings; got {key!r}")
        name = f"{prefix}.{key}" if prefix and key else prefix or key
        if isinstance(place, Mapping):
            yield from _rules(place, name)
        elif place is None or isinstance(place, Array):
            yield Rule(name, place)
        elif isinstance(place, str):
            yield Rule(name, Array(place))
        else:
            raise TypeError(
                f"the place of {name!r} is of type {type(place).__name__}; use a path, an Array, a dict or None"
            )


def _pattern(template: str, rest: str = "") -> re.Pattern[str]:
    """A template as a regular expression, with one for the rest; a number that occurs again must be the same."""
    pattern, seen = "", set[str]()
    for i, part in enumerate(_NUMBER.split(template)):  # in turns what stands between numbers, and the name of one
        if i % 2 == 0:
            pattern += re.escape(part)
        else:
            pattern += rf"(?P={part})" if part in seen else rf"(?P<{part}>\d+)"
            seen.add(part)
    return re.compile(pattern + rest, re.DOTALL)


def _filled(template: str, numbers: Mapping[str, str]) -> str:
    """A template with numbers in the place of their names."""
    return _NUMBER.sub(lambda match: numbers[match[1]], template)


def _braces(numbers: Collection[str]) -> str:
    return ", ".join(f"{{{number}}}" for number in sorted(numbers)) or "nothing"
