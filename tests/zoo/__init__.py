"""The model zoo: small models of every framework, with reduction axes written by hand.

The axes say, for each weight, which of its axes its layer sums over, and were written down from the layers'
definitions, not from what wn_jax answers. Tests of invariances run over the whole zoo.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from tests.zoo import equinox, haiku, linen, linen_layers, linen_loops, nnx, nnx_loops, plain, plain_calls
from tests.zoo.model import Model

__all__ = ["ZOO", "Model"]

_MODELS: dict[str, Callable[[], Model]] = {
    **plain.MODELS,
    **plain_calls.MODELS,
    **linen.MODELS,
    **linen_layers.MODELS,
    **linen_loops.MODELS,
    **nnx.MODELS,
    **nnx_loops.MODELS,
    **equinox.MODELS,
    **haiku.MODELS,
}

# Each is made once a process, as many tests share it.
ZOO: dict[str, Callable[[], Model]] = {name: functools.cache(make) for name, make in _MODELS.items()}
