"""An entry of the model zoo, and the helpers that the files of the zoo share."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KEY = jax.random.key(0)

Axes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Model:
    """`fn(params, x)`, and hand-written statements about its parameters by leaf path.

    Every array leaf of `params` is in exactly one of `axes` and `left`.

    Attributes:
        axes: the reduction axes of each weight that every use contracts with data.
        left: why each other array stays alone. "unused": the program does not use it. "elementwise": added to or
            multiplied with other values (biases, gains, running statistics). "indexed": its rows are looked up.
            "penalty": summed or squared on its own. "product": contracted with a parameter. "frozen": not trained.
            "disagree": its uses reduce over different axes. "carried": it changes as a loop's carry. "reshaped": a
            reshape splits or mixes its axes. "sliced": a use contracts a part of a reduction axis, or it is
            concatenated along one. "opaque": an operation that is not understood takes it. "dtype": not real
            floating-point numbers. Where several hold, the first in program order.
        output: the paths in `axes` whose scale can move to the contraction's output; `None` is all of them.
        initialized: how many of `axes` data-dependent initialization sets; `None` is all of them.
        preactivations: of `(params, x)`, for each path in `axes` what the weight's layer computes with it, bias
            included, as (samples, features), the features in the order of the weight's other axes.
        biased: the paths in `axes` to whose output the layer adds a bias; given along with `preactivations`.
        forward_mode: whether `jax.jvp` can go through `fn`.
        module: of an NNX model, makes the module, with `params`.
    """

    fn: Callable[[Any, jax.Array], jax.Array]
    params: Any
    x: jax.Array
    axes: Axes
    left: dict[str, str] = dataclasses.field(default_factory=dict)
    output: frozenset[str] | None = None
    initialized: int | None = None
    preactivations: Callable[[Any, jax.Array], dict[str, jax.Array]] | None = None
    biased: frozenset[str] = frozenset()
    forward_mode: bool = True
    module: Callable[[], Any] | None = None

    def __post_init__(self) -> None:
        if self.output is None:
            object.__setattr__(self, "output", frozenset(self.axes))
        if self.initialized is None:
            object.__setattr__(self, "initialized", len(self.axes))


def normal(*shape: int, seed: int = 1, dtype: Any = jnp.float32) -> jax.Array:
    """Normal numbers, from NumPy: `jax.random` compiles for each shape, which took most of the time of the zoo."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def tokens(*shape: int) -> jax.Array:
    """Integers from 0 to 6."""
    return jnp.asarray(np.random.default_rng(1).integers(0, 7, shape, dtype=np.int32))


def filled(shapes: Any) -> Any:
    """Numbers for each `ShapeDtypeStruct`: vectors near 1 (a variance must be positive), others of about unit gain."""
    seeds = itertools.count()

    def fill(leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        z = np.random.default_rng(next(seeds)).standard_normal(leaf.shape)
        return jnp.asarray((1 + z / 8 if z.ndim < 2 else z / math.sqrt(math.prod(z.shape[:-1]))).astype(leaf.dtype))

    return jax.tree.map(fill, shapes)


def elementwise(*paths: str) -> dict[str, str]:
    return dict.fromkeys(paths, "elementwise")


def biases(*layers: str) -> dict[str, str]:
    return elementwise(*(f"{layer}/bias" for layer in layers))


def kernels(layers: Iterable[str], axes: tuple[int, ...] = (-2,)) -> Axes:
    return {f"{layer}/kernel": axes for layer in layers}


def rows(z: jax.Array, features: int = 1) -> jax.Array:
    """`z` as (samples, features), where its last `features` axes are the features."""
    return z.reshape(-1, math.prod(z.shape[z.ndim - features :]))
