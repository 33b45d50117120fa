"""PyTorch checkpoints in and out, without PyTorch.

`from_state_dict` reads any state dict as a tree with nodes, in PyTorch's layout, and `to_state_dict` writes it back.
`to_flax` puts such a tree into the parameters of a Flax model, by a map of names, and `from_flax` leads back.

>>> import jax, flax.linen as nn, numpy as np, wn_jax as wn
>>> state = {"up.0.weight_g": np.ones((4, 1)), "up.0.weight_v": np.eye(4, 3), "up.0.bias": np.zeros(4)}
>>> model = nn.Sequential([nn.Dense(4)])
>>> target = jax.eval_shape(model.init, jax.random.key(0), np.ones((1, 3)))
>>> names = {"up.{i}": linear("params/layers_{i}")}
>>> params = to_flax(from_state_dict(state), target, names)
>>> wn.wrap(model.apply)(params, np.ones((1, 3))).tolist()
[[1.0, 1.0, 1.0, 0.0]]
>>> sorted(to_state_dict(from_flax(params, names), "old"))
['up.0.bias', 'up.0.weight_g', 'up.0.weight_v']
"""

from wn_jax.torch._flax import from_flax, to_flax
from wn_jax.torch._layouts import (
    Array,
    batch_norm,
    conv,
    conv_transpose,
    embedding,
    gru,
    gru_cell,
    linear,
    lstm,
    lstm_cell,
    norm,
)
from wn_jax.torch._state_dict import from_state_dict, to_state_dict

__all__ = [
    "Array",
    "batch_norm",
    "conv",
    "conv_transpose",
    "embedding",
    "from_flax",
    "from_state_dict",
    "gru",
    "gru_cell",
    "linear",
    "lstm",
    "lstm_cell",
    "norm",
    "to_flax",
    "to_state_dict",
]


def __dir__() -> list[str]:
    return __all__
