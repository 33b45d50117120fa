"""The models whose step times are measured: what they are, how large, and what auto is to stay below."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

Wrap = Callable[[nn.Module], nn.Module]
Apply = Callable[[Any, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and a batch. `target` is the largest ratio to plain that `scale="auto"` is to have, if there is one.

    What is timed is a training step, or if `serving` a forward pass.

    `build` takes what to do to each layer, which is how `flax.linen.WeightNorm` gets in; `layers_wrap` is false where
    that does not reach every weight. `equinox`, where there is one, builds the same model in Equinox.
    """

    name: str
    build: Callable[[Wrap], nn.Module]
    input_shape: tuple[int, ...]
    target: float | None
    layers_wrap: bool = True
    equinox: Callable[[Wrap], tuple[Apply, Any]] | None = None
    serving: bool = False


def mlp(wrap: Wrap, width: int = 1024) -> nn.Module:
    """Three dense layers."""
    first, second, third = (wrap(nn.Dense(width)) for _ in range(3))
    return nn.Sequential([first, nn.relu, second, nn.relu, third])


def equinox_mlp(wrap: Wrap, width: int = 1024) -> tuple[Apply, Any]:
    """The same in Equinox, as a function of its arrays, and these."""
    import equinox as eqx  # not among the requirements

    keys = jax.random.split(jax.random.key(1), 3)
    arrays, rest = eqx.partition([wrap(eqx.nn.Linear(width, width, key=key)) for key in keys], eqx.is_array)

    def apply(arrays: Any, x: jax.Array) -> jax.Array:
        first, second, third = (jax.vmap(layer) for layer in eqx.combine(arrays, rest))
        return third(nn.relu(second(nn.relu(first(x)))))

    return apply, arrays


def lstm(_: Wrap) -> nn.Module:
    """One recurrent layer. Its cell holds eight kernels, which no wrapper of layers reaches."""
    return nn.RNN(nn.OptimizedLSTMCell(512))


def conv(wrap: Wrap) -> nn.Module:
    """Three convolutions."""
    first, second, third = (wrap(nn.Conv(96, (3, 3))) for _ in range(3))
    return nn.Sequential([first, nn.relu, second, nn.relu, third])


class TransformerBlock(nn.Module):
    """Attention and an MLP, each after a layer norm and beside a residual connection."""

    width: int = 512

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        normed = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=8)(normed, normed)
        hidden = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
        return x + nn.Dense(self.width)(hidden)


def transformer(_: Wrap) -> nn.Module:
    """Four blocks. The projections of its attention are layers that no wrapper reaches."""
    return nn.Sequential([TransformerBlock() for _ in range(4)])


CASES = {
    case.name: case
    for case in (
        Case("mlp-8", mlp, (8, 1024), target=1.18, equinox=equinox_mlp),
        Case("mlp-128", mlp, (128, 1024), target=1.10, equinox=equinox_mlp),
        Case("mlp-1024", mlp, (1024, 1024), target=1.05, equinox=equinox_mlp),
        Case("lstm", lstm, (32, 128, 512), target=1.05, layers_wrap=False),
        Case("conv", conv, (16, 32, 32, 96), target=1.02),
        Case("transformer-1x16", transformer, (1, 16, 512), target=1.15, layers_wrap=False),
        Case("transformer-8x128", transformer, (8, 128, 512), target=1.05, layers_wrap=False),
    )
}

SERVING = {
    name: dataclasses.replace(case, name=name, input_shape=(1, *case.input_shape[1:]), target=None, serving=True)
    for name, case in {
        "mlp": CASES["mlp-8"],
        "lstm": CASES["lstm"],
        "conv": CASES["conv"],
        "transformer": CASES["transformer-1x16"],
    }.items()
}
