"""A generator's PyTorch checkpoint: read into Flax variables with nodes, written back, and made of random numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

import wn_jax as wn
from experiments.errors import ConfigError
from experiments.vocoder.config import GeneratorConfig
from experiments.vocoder.hifigan import Generator, names
from wn_jax.torch import from_flax, from_state_dict, to_flax, to_state_dict


def load(config: GeneratorConfig, path: Path) -> Any:
    """The variables of a `Generator`, the weights as nodes, from a `.safetensors` file of a PyTorch state dict.

    Raises:
        ConfigError: the file cannot be read, or is not one of this generator with its weight norms.
    """
    frames = jax.ShapeDtypeStruct((1, 4, config.model_in_dim), np.float32)
    target = jax.eval_shape(Generator(config).init, jax.random.key(0), frames)
    try:
        variables = to_flax(from_state_dict(path, dim=0), target, names(config))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is no checkpoint of this generator: {error}") from None
    if not any(map(_is_node, jax.tree.leaves(variables, is_leaf=_is_node))):
        raise ConfigError(
            f"{path} has no weight norms in it, as after remove_weight_norm(); save the checkpoint before that"
        )
    return variables


def state_dict(config: GeneratorConfig, variables: Any) -> dict[str, np.ndarray]:
    """A generator's variables as a PyTorch state dict, in the old scheme, which modules of both styles load."""
    return to_state_dict(from_flax(variables, names(config)), "old")


def random_state_dict(config: GeneratorConfig, seed: int) -> dict[str, np.ndarray]:
    """A checkpoint as PyTorch would write one of a new generator: its names, shapes, scheme and initialization."""
    rng, state = np.random.default_rng(seed), dict[str, np.ndarray]()

    def layer(name: str, shape: tuple[int, ...], outputs: int) -> None:
        bound = np.prod(shape[1:]) ** -0.5
        v = rng.uniform(-bound, bound, shape).astype(np.float32)
        state[f"{name}.weight_g"] = np.sqrt(np.sum(v**2, axis=(1, 2), keepdims=True))
        state[f"{name}.weight_v"] = v
        state[f"{name}.bias"] = rng.uniform(-bound, bound, outputs).astype(np.float32)

    channels, kinds = config.upsample_initial_channel, config.resblock_kernel_sizes
    upsampler = "upsampler" if config.names == "transformers" else "ups"
    layer("conv_pre", (channels, config.model_in_dim, 7), channels)
    for i, kernel in enumerate(config.upsample_kernel_sizes):
        layer(
            f"{upsampler}.{i}",
            (channels, channels // 2, kernel),
            channels // 2,
        )
        channels //= 2
        for j, (size, dilations) in enumerate(zip(kinds, config.resblock_dilation_sizes, strict=True)):
            for convs in ("convs1", "convs2") if config.resblock == 1 else ("convs",):
                for k in range(len(dilations)):
                    layer(f"resblocks.{i * len(kinds) + j}.{convs}.{k}", (channels, channels, size), channels)
    layer("conv_post", (1, channels, 7), 1)
    if config.names == "transformers":
        state |= {"mean": np.zeros(config.model_in_dim, np.float32), "scale": np.ones(config.model_in_dim, np.float32)}
    return state


def _is_node(leaf: Any) -> bool:
    return isinstance(leaf, wn.WeightNorm)
