"""Running a function of plain weights on a tree that holds nodes."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

from wn_jax._transform import reconstruct


def wrap(fn: Callable[..., Any], argnums: int | Sequence[int] = 0, scale: str = "weight") -> Callable[..., Any]:
    """`fn`, on trees that hold nodes in the arguments that `argnums` names. Plain trees pass through unchanged.

    Arguments:
        fn: any function of a parameter tree, such as Flax's `model.apply` or a loss.
        argnums: the positions of the parameter trees among `fn`'s positional arguments.
        scale: where the scale `g / ||v||` is applied. `"weight"`: to the weight, before `fn` sees it.

    Returns:
        A function of `fn`'s own arguments. Every transformation holds: `jit`, `grad`, `vmap`, `scan`, `remat`.

    Raises:
        ValueError: `scale` is unknown, or `argnums` are negative.
        TypeError: `fn` is not callable, or (when called) an argument that `argnums` names is not given by position.

    >>> import jax, jax.numpy as jnp, wn_jax as wn
    >>> def model(params, x):
    ...     return x @ params["kernel"]
    >>> params = {"kernel": jnp.array([[3.0], [4.0]])}
    >>> nodes = wn.reparameterize(params, wn.kernel_axes(params))
    >>> jax.jit(wn.wrap(model))(nodes, jnp.ones((1, 2)))
    Array([[7.]], dtype=float32)
    """
    if not callable(fn):
        raise TypeError(f"wrap takes a function, such as model.apply; got {type(fn).__name__}")
    if scale != "weight":
        raise ValueError(f"scale must be 'weight'; got {scale!r}")
    positions = _positions(argnums)

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if max(positions) >= len(args):
            raise TypeError(
                f"wrap(..., argnums={argnums}) needs argument {max(positions)} by position, but {len(args)} positional "
                f"arguments were given (and the keywords {sorted(kwargs)}); pass the parameters by position"
            )
        return fn(*(reconstruct(arg) if i in positions else arg for i, arg in enumerate(args)), **kwargs)

    return wrapped


def _positions(argnums: int | Sequence[int]) -> frozenset[int]:
    try:
        positions = frozenset(map(operator.index, argnums if isinstance(argnums, Sequence) else (argnums,)))
    except TypeError:
        positions = frozenset()
    if not positions or min(positions) < 0:
        raise ValueError(f"argnums must be one position or a tuple of them, counted from 0; got {argnums!r}")
    return positions
