"""Calls of what reads a program: `infer_axes(fn)(params, x)` and its like, and the words for who calls otherwise.

`infer_axes(fn, params, x)`, `infer_axes(model)` and `infer_axes(params)` are first guesses that many make. This file
owns how they are told, and the call that each error shows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
from flax import nnx

from wn_jax._from_dicts import note_on_dicts
from wn_jax._tree import is_array
from wn_jax._types import Params

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def check_function(name: str, fn: object, *others: object) -> None:
    """Raises where `fn` is no function but a model or its parameters, or where `others`, its options, are parameters.

    A Linen module, an NNX module and an Equinox module can be called, but not with parameters. Equinox' wrappers, such
    as that of `eqx.filter_jit`, can.
    """
    if problem := _problem(name, fn):
        raise TypeError(f"{name} takes a function, such as model.apply; got {problem}")
    if wrong := [option for option in others if _holds_parameters(option)]:
        raise _given_too_early(name, wrong[0])


def check_count(function: Callable[Arguments, Result], most: int) -> Callable[Arguments, Result]:
    """The function, which raises where it gets more arguments than it has, as those are for the function it returns."""

    @functools.wraps(function)
    def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if len(args) > most:
            check_function(function.__name__, args[0])
            raise _given_too_early(function.__name__, args[1])
        return function(*args, **kwargs)

    return checked


def check_position(argnums: Sequence[int], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raises where the parameters are not among the positional arguments."""
    if not all(isinstance(position, int) and position >= 0 for position in argnums):
        raise ValueError(f"argnums must be the position of the parameters, counted from 0; got {argnums[0]!r}")
    if max(argnums) >= len(args):
        raise TypeError(
            f"argument {max(argnums)} must be the parameters, by position, but {len(args)} positional arguments were "
            f"given (and the keywords {sorted(kwargs)}); pass the parameters by position, or say argnums="
        )
    if any(isinstance(args[position], str) for position in argnums):
        raise TypeError(
            "the parameters are a tree of arrays; got a str. (As axes, reparameterize takes what "
            "infer_axes(fn)(params, ...) returns, and not infer_axes(fn).)"
        )


def note_on_parameters(error: Exception, trees: Sequence[Params]) -> None:
    """Add to an error of a program what is odd about the parameters that it was given; or nothing."""
    for tree in trees:
        note_on_dicts(error, tree)
        if is_array(tree) and tree.ndim:
            error.add_note(
                f"wn_jax took the first argument for the parameters, and it is an array of shape {tree.shape}: call "
                "it with the parameters first, as in wn_jax.wrap(model.apply)(params, x), or say argnums="
            )


def _problem(name: str, fn: object) -> str:
    """The reason why `fn` is no function of parameters, with the right call; or nothing."""
    kind = type(fn).__name__
    if isinstance(fn, nnx.Module):
        call = "wn_jax.nnx.WeightNormed(model, axes)" if name == "wrap" else _of_model(name, "model(x)")
        return f"the NNX module {kind} itself: call {call}"
    if _is_a(fn, "flax.linen", "Module"):
        return f"the Linen module {kind} itself: call {name}(model.apply)(params, x)"
    if _is_a(fn, "keras", "Layer"):
        return f"the Keras model {kind} itself: call {name}(model.stateless_call)(params, state, x)"
    if _is_a(fn, "equinox", "Module") and _holds_parameters(fn) and not _is_wrapper_of_equinox(fn):
        call, otherwise = _of_model(name, "jax.vmap(model)(x)"), "(Where it takes parameters, pass its __call__)"
        return f"the Equinox module {kind} itself: call {call}. {otherwise}"
    if callable(fn):
        return ""
    if callable(getattr(fn, "apply", None)):  # Haiku's Transformed, and its like
        return f"a {kind}: call {name}(model.apply)(params, ...)"
    return f"{kind}: call {name}(model.apply)(params, x)"


def _of_model(name: str, output: str) -> str:
    return f"{name}(lambda model, x: {output})(model, x)"


def _is_a(fn: object, package: str, name: str) -> bool:
    """Whether this is of that class, whose package need not be there."""
    return any(cls.__name__ == name and f"{cls.__module__}.".startswith(f"{package}.") for cls in type(fn).__mro__)


def _is_wrapper_of_equinox(fn: object) -> bool:
    """Whether Equinox made it of a function: `eqx.filter_jit`, `eqx.Partial`."""
    module = type(fn).__module__
    return module.startswith("equinox.") and not module.startswith("equinox.nn")


def _holds_parameters(x: object) -> bool:
    return isinstance(x, nnx.Module) or any(is_array(leaf) and leaf.ndim for leaf in jax.tree.leaves(x))


def _given_too_early(name: str, given: object) -> TypeError:
    return TypeError(
        f"{name} takes the function, and returns one that takes the parameters and the data: "
        f"{name}(model.apply)(params, x); got a {type(given).__name__} beside the function"
    )
