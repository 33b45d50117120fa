"""Layers whose weights are sharded, for the tests of `shard_map`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import wn_jax as wn


@functools.cache
def mesh():
    """Four devices by two; made when it is first asked for, as collecting tests must not start JAX."""
    return jax.make_mesh((4, 2), ("fsdp", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def dense(w, x):
    return x @ w


def conv(w, x):
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer `psum(apply(w, x), over) + b`; `over` are the mesh axes that its sum runs over."""

    spec: P
    x: P
    y: P
    over: tuple[str, ...] = ()
    shape: tuple[int, ...] = (16, 8)
    apply: Callable[[jax.Array, jax.Array], jax.Array] = dense
    dtype: Any = jnp.float32

    @property
    def specs(self):
        return {"w": self.spec, "b": P(*self.y[-1:])}

    def nodes(self):
        random = np.random.default_rng(0)
        axes = tuple(range(-len(self.shape), -1))
        v = jnp.asarray(random.normal(size=self.shape), self.dtype)
        g = jnp.asarray(random.uniform(0.5, 2, (*(1,) * len(axes), self.shape[-1])), jnp.float32)
        return {"w": wn.WeightNorm(g, v, axes), "b": jnp.asarray(random.normal(size=self.shape[-1]), self.dtype)}

    def data(self):
        """Inputs, and what the outputs are weighted with in a loss."""
        random = np.random.default_rng(1)
        shape = (8, *(5,) * (len(self.shape) - 2))
        x, cotangent = random.normal(size=(*shape, self.shape[-2])), random.normal(size=(*shape, self.shape[-1]))
        return jnp.asarray(x, self.dtype), jnp.asarray(cotangent, self.dtype)

    def local(self, params, x):
        """The layer inside `shard_map`."""
        y = self.apply(params["w"], x)
        return (jax.lax.psum(y, self.over) if self.over else y) + params["b"]

    def whole(self, nodes, x):
        """On one device, with the formula of weight normalization."""
        node = nodes["w"]
        v = node.v.astype(jnp.float32)
        w = node.g * v / jnp.sqrt(jnp.sum(v**2, node.axes, keepdims=True))
        return self.apply(w.astype(self.dtype), x) + nodes["b"]


CASES = {
    "fan_in": Case(P("fsdp"), P(None, "fsdp"), P(), over=("fsdp",)),
    "fan_in_over_two_axes": Case(P(("fsdp", "model")), P(None, ("fsdp", "model")), P(), over=("fsdp", "model")),
    "features": Case(P(None, "fsdp"), P(), P(None, "fsdp")),
    "replicated": Case(P(), P("fsdp"), P("fsdp", None)),
    "fan_in_and_features": Case(P("fsdp", "model"), P(None, "fsdp"), P(None, "model"), over=("fsdp",)),
    "conv": Case(
        P(None, None, "fsdp", "model"),
        P(None, None, None, "fsdp"),
        P(None, None, None, "model"),
        over=("fsdp",),
        shape=(3, 3, 8, 4),
        apply=conv,
    ),
    "bfloat16": Case(P("fsdp"), P(None, "fsdp"), P(), over=("fsdp",), dtype=jnp.bfloat16),
}


def sharded(case, fn, nodes, **options):
    """`shard_map` of a function of nodes and inputs."""
    specs = wn.shardings(nodes, case.specs)
    options = {"in_specs": (specs, case.x), "out_specs": case.y, **options}
    return jax.shard_map(fn, mesh=mesh(), **options)
