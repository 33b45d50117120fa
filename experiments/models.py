"""The networks. They know nothing of weight normalization: that is a transform of their parameters."""

from __future__ import annotations

import flax.linen as nn
import jax

from experiments.config import ModelConfig
from wn_jax.linen import MeanOnlyBatchNorm


class MLP(nn.Module):
    """Dense layers with ReLU between. A normalized layer has its bias in the normalization."""

    hidden: tuple[int, ...]
    classes: int
    norm: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for width in self.hidden:
            x = nn.Dense(width, use_bias=self.norm == "none")(x)
            if self.norm == "batch":
                x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            elif self.norm == "mean_only":
                x = MeanOnlyBatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = nn.relu(x)
        return nn.Dense(self.classes)(x)


def build(config: ModelConfig, classes: int) -> nn.Module:
    """The network that `config` describes."""
    return MLP(hidden=config.hidden, classes=classes, norm=config.norm)
