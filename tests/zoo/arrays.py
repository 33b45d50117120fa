"""Zoo models as functions of their floating-point arrays, which every transformation of JAX takes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

import wn_jax as wn
from tests.zoo import ZOO


@functools.cache
def zoo(name):
    """A model, and its parameters with nodes of lengths that are far from those of the weights."""
    model = ZOO[name]()
    return model, stretched(wn.reparameterize(model.params, model.axes)) if model.axes else model.params


def stretched(nodes):
    """Nodes whose scale is far from 1: `g` times 0.5 to 2, `v` times 3."""

    def stretch(node):
        if not isinstance(node, wn.WeightNorm):
            return node
        random = np.random.default_rng(node.axes[0] % 7)
        by = jax.tree.map(lambda g: g * random.uniform(0.5, 2, g.shape).astype(g.dtype), node.g)
        return wn.WeightNorm(by, jax.tree.map(lambda v: v * 3, node.v), node.axes)

    return jax.tree.map(stretch, nodes, is_leaf=lambda x: isinstance(x, wn.WeightNorm))


def split(tree):
    """The floating-point arrays of a tree, and a function that puts such arrays back."""
    leaves, treedef = jax.tree.flatten(tree)
    taken = [isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    def merge(arrays):
        arrays = iter(arrays)
        return jax.tree.unflatten(
            treedef, [next(arrays) if take else leaf for leaf, take in zip(leaves, taken, strict=True)]
        )

    return [leaf for leaf, take in zip(leaves, taken, strict=True) if take], merge


def cast(tree, dtype):
    """A tree with its floating-point arrays in `dtype`; `g` of a node stays float32."""

    def one(x):
        if isinstance(x, wn.WeightNorm):
            return wn.WeightNorm(x.g, cast(x.v, dtype), x.axes)
        return x.astype(dtype) if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, wn.WeightNorm))


def equations(jaxpr):
    """Every equation of a jaxpr and of those inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in bodies(eqn):
            yield from equations(inner)


def bodies(eqn):
    """The jaxprs inside an equation."""
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns") or hasattr(item, "jaxpr"):
                yield getattr(item, "jaxpr", item)
