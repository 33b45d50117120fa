"""The model zoo: small models of every framework, with reduction axes written by hand.

The axes say, for each weight, which of its axes its layer sums over, and were written down from the layers'
definitions, not from what wn_jax answers. Tests of invariances run over the whole zoo.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from tests import (
    zoo_equinox,
    zoo_haiku,
    zoo_linen,
    zoo_linen_layers,
    zoo_linen_loops,
    zoo_nnx,
    zoo_nnx_loops,
    zoo_plain,
    zoo_plain_calls,
)
from tests.zoo_model import Model

__all__ = ["ZOO", "Model"]

_MODELS: dict[str, Callable[[], Model]] = {
    **zoo_plain.MODELS,
    **zoo_plain_calls.MODELS,
    **zoo_linen.MODELS,
    **zoo_linen_layers.MODELS,
    **zoo_linen_loops.MODELS,
    **zoo_nnx.MODELS,
    **zoo_nnx_loops.MODELS,
    **zoo_equinox.MODELS,
    **zoo_haiku.MODELS,
}

# Each is made once a process, as many tests share it.
ZOO: dict[str, Callable[[], Model]] = {name: functools.cache(make) for name, make in _MODELS.items()}
