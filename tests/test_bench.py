"""The benchmark: what its figures are, that all libraries compute the same networks, and what it writes."""

import dataclasses
import importlib.util
import json

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import bound, libraries, measure, memory, networks, rows
from experiments.bench.arms import Arm
from experiments.bench.libraries import carried, equinox, linen, nnx, ours
from experiments.bench.libraries.jax_steps import accumulated, inputs, loss, sgd
from experiments.bench.rows import Row
from tests.experiments import invoke

TINY = {
    "mlp": lambda: networks.mlp(6),
    "lstm": lambda: networks.recurrent("lstm", 3, 4),
    "gru": lambda: networks.recurrent("gru", 3, 4),
    "conv": lambda: networks.conv_pool(4),
    "hifi-gan": lambda: networks.hifi_gan(2, 32, 5),
    "gpt": lambda: networks.gpt(5, 1, 16, 2),
}
PEERS = {"linen": linen.arms, "nnx": nnx.arms, "equinox": equinox.arms, "paramax": equinox.paramax_arms}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Networks of a few numbers, under names of their own."""
    monkeypatch.setattr(networks, "NETWORKS", TINY)
    monkeypatch.setattr(rows, "NETWORKS", TINY)


def randomized(tree, seed=2):
    """The same structure with other numbers in it, biases too."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return treedef.unflatten(0.3 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True))


def to_equinox(row, params, layers):
    """Equinox's layers with Linen's numbers: features first, and a transposed kernel's time turned round."""
    network = row.build()
    for name, kind in network.layers.items():
        own = params["params"][name]
        if isinstance(kind, networks.Dense):
            weight = own["kernel"].T
        else:
            weight = jnp.moveaxis(own["kernel"], (-1, -2), (0, 1))
        layers = eqx.tree_at(lambda tree, name=name: tree[name].weight, layers, weight)
        if "bias" in own:
            shape = layers[name].bias.shape
            layers = eqx.tree_at(lambda tree, name=name: tree[name].bias, layers, own["bias"].reshape(shape))
    return layers


@pytest.mark.parametrize("name", TINY)
def test_the_libraries_compute_the_same_network(name):
    row = Row(name, name, 2)
    apply, params = linen.build(row)
    params, x = randomized(params), inputs(row)
    expected = np.asarray(apply(params, x))
    assert expected.std() > 1e-3

    nnx_apply, state = nnx.build(row)
    if name not in ("lstm", "gru"):  # whose gates Linen keeps apart, and NNX in one array
        kernels = {"layers": params["params"]}
        flat = {path: leaf for path, leaf in state.flat_state()}
        for path, leaf in flat.items():
            own = kernels
            for key in path:
                own = own[key]
            state = jax.tree.map(lambda old: old, state)
            flat[path] = leaf.replace(own)
        np.testing.assert_allclose(nnx_apply(state.from_flat_path(flat), x), expected, rtol=1e-4, atol=1e-5)
        eqx_apply, layers = equinox.build(row)
        own = eqx_apply(to_equinox(row, params, layers), inputs(row, channels_first=True))
        own = np.moveaxis(own, 1, -1) if expected.ndim == 3 and row.build().spatial else own
        np.testing.assert_allclose(own.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)
