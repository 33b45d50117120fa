"""`init_from_data(init_scale=...)` by path: deviations, which key counts, and what is refused.

The deviations are those of pre-activations that plain NumPy computes from the plain weights.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import wn_jax as wn

X = np.asarray(jax.random.normal(jax.random.key(0), (256, 8)) * 3 + 1)
PATHS = ["stem/kernel", "branch/first/kernel", "branch/last/kernel", "head/kernel"]


def network(params, x):
    """A residual branch, as of PixelCNN++ and Glow, between two layers."""

    def layer(params, x):
        return x @ params["kernel"] + params["bias"]

    h = layer(params["stem"], x)
    inner = layer(params["branch"]["first"], jnp.tanh(h))
    h = h + layer(params["branch"]["last"], jnp.tanh(inner))
    return layer(params["head"], jnp.tanh(h))


def nodes_of_network():
    keys = jax.random.split(jax.random.key(1), 4)
    kernels = [jax.random.normal(key, (8, 8)) for key in keys]
    layers = [{"kernel": kernel, "bias": jnp.zeros(8)} for kernel in kernels]
    params = {"stem": layers[0], "branch": {"first": layers[1], "last": layers[2]}, "head": layers[3]}
    return wn.reparameterize(params, dict.fromkeys(PATHS, -2))


def deviations(nodes):
    """The mean and the deviation of each layer's outputs, in float64."""
    plain = jax.tree.map(lambda x: np.asarray(x, np.float64), wn.reconstruct(nodes))
    outputs = {}

    def layer(path, params, x):
        outputs[path] = x @ params["kernel"] + params["bias"]
        return outputs[path]

    h = layer("stem/kernel", plain["stem"], np.asarray(X, np.float64))
    inner = layer("branch/first/kernel", plain["branch"]["first"], np.tanh(h))
    h = h + layer("branch/last/kernel", plain["branch"]["last"], np.tanh(inner))
    layer("head/kernel", plain["head"], np.tanh(h))
    return {path: (y.mean(0), y.std(0)) for path, y in outputs.items()}


@pytest.mark.parametrize(
    ("init_scale", "expected"),
    [
        (0.5, [0.5, 0.5, 0.5, 0.5]),
        ({"head/kernel": 0.1}, [1, 1, 1, 0.1]),
        ({"branch/*": 0.2}, [1, 0.2, 0.2, 1]),
        ({"*/last/kernel": 0.1, "head/kernel": 2}, [1, 1, 0.1, 2]),
        ({"branch/last/kernel": 3.0, "*": 0.5}, [0.5, 0.5, 3.0, 0.5]),  # a path counts more than a glob after it
        ({"*": 0.5, "branch/*": 0.25, "*/first/*": 4.0}, [0.5, 4.0, 0.25, 0.5]),  # of globs, the last counts
        ({"stem/kerne[kl]": 0.3, "h?ad/kernel": 0.7}, [0.3, 1, 1, 0.7]),
        (lambda path: 0.1 if path.startswith("branch") else np.float32(1), [1, 0.1, 0.1, 1]),
        ({}, [1, 1, 1, 1]),
    ],
)
def test_by_path(init_scale, expected):
    nodes = wn.init_from_data(network, init_scale)(nodes_of_network(), X)
    for path, scale in zip(PATHS, expected, strict=True):
        mean, std = deviations(nodes)[path]
        np.testing.assert_allclose(std, scale, rtol=1e-4)
        np.testing.assert_allclose(mean, 0, atol=1e-4 * max(scale, 1))


def test_in_jit():
    nodes = jax.jit(wn.init_from_data(network, {"branch/*": 0.2}))(nodes_of_network(), X)
    np.testing.assert_allclose(deviations(nodes)["branch/last/kernel"][1], 0.2, rtol=1e-4)


def test_a_stack_has_one_path():
    def layer(x, kernel):
        y = x @ kernel
        return y, y

    def stacked(params, x):
        return jax.lax.scan(layer, x, params["layers"])[1]

    params = {"layers": jax.random.normal(jax.random.key(2), (3, 8, 8))}
    nodes = wn.reparameterize(params, {"layers": -2})
    outputs = stacked(wn.reconstruct(wn.init_from_data(stacked, {"layers": 0.1})(nodes, X)), X)
    np.testing.assert_allclose(outputs.std(1), 0.1, rtol=1e-4)


def test_of_nnx_the_paths_are_those_of_its_state():
    model = nnx.Sequential(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 4, rngs=nnx.Rngs(1)))
    wrapped = wn.nnx.WeightNormed(model, {"layers/0/kernel": -2, "layers/1/kernel": -2})
    wrapped = wn.nnx.init_from_data(lambda model, x: model(x), {"layers/1/*": 0.1})(wrapped, X)
    np.testing.assert_allclose(wrapped(X).std(0), 0.1, rtol=1e-3)


@pytest.mark.parametrize(
    ("init_scale", "message"),
    [
        ({"head/kernl": 0.1}, r"init_scale names leaves .*'head/kernl' \(did you mean 'head/kernel'"),
        ({"params/head/kernel": 0.1}, r"did you mean 'head/kernel'"),
        ({("head", "kernel"): 0.1}, r"\('head', 'kernel'\) \(a path is a string"),
        (
            {"head/bias": 0.1},
            r"names 'head/bias', where there is no node. Nodes are at 'branch/first/kernel'",
        ),
        ({"*/bias": 0.1}, r"globs that match no node: '\*/bias'. Nodes are at"),
        ({"layers/*": 0.1}, r"globs that match no node: 'layers/\*'"),
        ({"*": 0}, r"a positive number.*got 0 for '\*'"),
        ({"head/kernel": "0.1"}, r"a positive number.*got '0.1' for 'head/kernel'"),
        ({"head/kernel": None}, r"a positive number.*got None for 'head/kernel'"),
        (lambda path: None, r"a positive number.*got None for 'branch/first/kernel'"),
        (lambda path: -1.0, r"a positive number.*got -1.0 for"),
        ([0.1, 1], r"a positive number.*got \[0.1, 1\]"),
        (np.inf, r"a positive number.*got inf"),
        (np.nan, r"a positive number.*got nan"),
    ],
)
def test_what_is_refused(init_scale, message):
    with pytest.raises(ValueError, match=message):
        wn.init_from_data(network, init_scale)(nodes_of_network(), X)
