"""Registrations, so that nodes pass through other libraries: `flax.serialization` and `jax.export`.

Without them the first returns a node unsaved and the second refuses the tree. Both formats carry the axes, as `g`
and `v` alone do not say which weight they stand for.

This file owns what other libraries ask of a node's type. What goes into a file of our own is `_saving`'s.
"""

from __future__ import annotations

import json
from typing import Any

import jax.export
import numpy as np
from flax import serialization

from wn_jax._node import WeightNorm
from wn_jax._types import PyTree


def _to_state_dict(node: WeightNorm) -> dict[str, PyTree]:
    """The node as Flax's state dicts have it: nested dicts of arrays, by field."""
    return {
        "g": serialization.to_state_dict(node.g),
        "v": serialization.to_state_dict(node.v),
        "axes": np.asarray(node.axes, np.int32),  # msgpack has arrays, and no tuples
    }


def _from_state_dict(target: WeightNorm, state: PyTree) -> WeightNorm:
    """A node like the target, from a state dict, which anything may have been saved in.

    Raises:
        ValueError: it is not that of a node, or of one with other axes.
    """
    path = serialization.current_path()
    if not isinstance(state, dict) or set(state) != {"g", "v", "axes"}:
        found = sorted(state) if isinstance(state, dict) else f"a {type(state).__name__}"
        raise ValueError(
            f"{path}: the target is a WeightNorm node, but the saved state holds {found} and not 'axes', 'g' and 'v'. "
            "A plain weight is loaded into a plain tree, and that is reparameterized."
        )
    axes = tuple(int(axis) for axis in np.atleast_1d(state["axes"]))
    if axes != target.axes:
        raise ValueError(
            f"{path}: the saved node reduces over axes {axes}, the target over {target.axes}; the same g and v would "
            "stand for another weight. Reparameterize the target with the saved axes."
        )
    g = serialization.from_state_dict(target.g, state["g"], name="g")
    v = serialization.from_state_dict(target.v, state["v"], name="v")
    return WeightNorm(g, v, axes)


serialization.register_serialization_state(WeightNorm, _to_state_dict, _from_state_dict, override=True)
jax.export.register_pytree_node_serialization(
    WeightNorm,
    serialized_name="wn_jax.WeightNorm",
    serialize_auxdata=lambda axes: json.dumps(axes).encode(),
    deserialize_auxdata=lambda data: _tuples(json.loads(data)),
)


def _tuples(data: list[Any] | int) -> tuple[Any, ...] | int:
    """Tuples, which the treedef compares, from the lists that JSON makes of them."""
    return tuple(map(_tuples, data)) if isinstance(data, list) else data
