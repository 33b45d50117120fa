"""A generator's PyTorch checkpoint: read into Flax variables with nodes, written back, and made of random numbers."""

from __future__ import annotations

import textwrap
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
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    frames = jax.ShapeDtypeStruct((1, 4, config.model_in_dim), np.float32)
    target = jax.eval_shape(Generator(config).init, jax.random.key(0), frames)
    try:
        tree = from_state_dict(path, dim=0)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    _check_kind(config, tree, path)
    try:
        variables = to_flax(tree, target, names(config))
    except ValueError as error:
        raise ConfigError(
            f"{path} is no checkpoint of the generator that [generator] describes (look at resblock, "
            "resblock_kernel_sizes, resblock_dilation_sizes, upsample_rates, upsample_kernel_sizes, model_in_dim and "
            f"normalize_before): {textwrap.shorten(str(error), 1200)}"
        ) from None
    if not any(map(_is_node, jax.tree.leaves(variables, is_leaf=_is_node))):
        raise ConfigError(
            f"{path} has no weight norms in it, as after remove_weight_norm(); save the checkpoint before that"
        )
    return variables


def state_dict(config: GeneratorConfig, variables: Any) -> dict[str, np.ndarray]:
    """A generator's variables as a PyTorch state dict, in the old scheme, which modules of both styles load."""
    return _normalization(config) | to_state_dict(from_flax(variables, names(config)), "old")


def random_state_dict(config: GeneratorConfig, seed: int) -> dict[str, np.ndarray]:
    """A checkpoint as PyTorch would write one of a new generator: its names, shapes, scheme and initialization."""
    rng = np.random.default_rng(seed)
    state: dict[str, np.ndarray] = {}

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
        layer(f"{upsampler}.{i}", (channels, channels // 2, kernel), channels // 2)
        channels //= 2
        for j, (size, dilations) in enumerate(zip(kinds, config.resblock_dilation_sizes, strict=True)):
            for convs in ("convs1", "convs2") if config.resblock == 1 else ("convs",):
                for k in range(len(dilations)):
                    layer(f"resblocks.{i * len(kinds) + j}.{convs}.{k}", (channels, channels, size), channels)
    layer("conv_post", (1, channels, 7), 1)
    return state | _normalization(config)


def _normalization(config: GeneratorConfig) -> dict[str, np.ndarray]:
    """The mean and the scale of spectrograms, which `SpeechT5HifiGan` has also where it does not use them."""
    if config.names == "published":
        return {}
    return {"mean": np.zeros(config.model_in_dim, np.float32), "scale": np.ones(config.model_in_dim, np.float32)}


def _check_kind(config: GeneratorConfig, tree: dict[str, Any], path: Path) -> None:
    """Raise where a checkpoint has other names, or numbers that this generator would not use."""
    if "generator" in tree:
        raise ConfigError(f"{path} is of a larger model; save the state dict of its generator alone")
    found = "published" if "ups" in tree else "transformers" if "upsampler" in tree else config.names
    if found != config.names:
        raise ConfigError(f"{path} has the names of generator.names = {found!r}, and not {config.names!r}; set that")
    if not config.normalize_before and (np.any(tree.get("mean", 0) != 0) or np.any(tree.get("scale", 1) != 1)):
        raise ConfigError(
            f"{path} has a mean and a scale of spectrograms that generator.normalize_before = false would leave out; "
            "set it to true, as in the config.json of the checkpoint"
        )


def _is_node(leaf: Any) -> bool:
    """Whether a leaf is a weight norm."""
    return isinstance(leaf, wn.WeightNorm)
