"""Exported artifacts, loaded in a process in which wn_jax cannot be imported, give the training function's output."""

import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import wn_jax as wn
from tests.docs.documents import run
from tests.zoo import ZOO
from wn_jax.nnx import WeightNormed

SERVER = """
import sys
sys.modules["wn_jax"] = None  # importing it is an error
from pathlib import Path
import jax.export
import numpy as np

for artifact in Path(sys.argv[1]).glob("*.stablehlo"):
    served = jax.export.deserialize(artifact.read_bytes())
    x = np.load(artifact.with_name(artifact.stem.split("-")[0] + ".npy"))
    np.save(artifact.with_suffix(".served.npy"), served.call(x))
"""

MODELS = ("linen_attention", "nnx_scan", "equinox_mlp", "haiku_lstm")


def served(model):
    """A name and a function of the input alone, for each way to serve a model; and its function in training."""
    nodes = wn.reparameterize(model.params, model.axes)
    plain, training = wn.reconstruct(nodes), wn.wrap(model.fn)

    def bound(fn, params):  # in new boxes: NNX scans no layers of a module that a `jax.jit` closes over
        return jax.jit(lambda x: fn(jax.tree.map(lambda leaf: leaf, params), x))

    ways = {"folded": bound(model.fn, plain), "live": bound(training, nodes)}
    if model.module is not None:
        wrapped = WeightNormed(model.module(), model.axes)
        for name, module in (("object", wrapped.plain()), ("living", wrapped)):
            graph, state = nnx.split(module)
            ways[name] = bound(lambda state, x, graph=graph: nnx.merge(graph, state)(x), state)
    return ways, eqx.filter_jit(training)(nodes, model.x)


def test_artifacts_in_a_process_without_wn_jax(tmp_path):
    expected = {}
    for name in MODELS:
        model = ZOO[name]()
        np.save(tmp_path / f"{name}.npy", model.x)
        ways, y = served(model)
        for way, fn in ways.items():
            (tmp_path / f"{name}-{way}.stablehlo").write_bytes(jax.export.export(fn)(model.x).serialize())
            expected[f"{name}-{way}"] = y
    subprocess.run([sys.executable, "-c", SERVER, str(tmp_path)], check=True)
    for name, y in expected.items():
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.served.npy"), y, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("scale", ["auto", "output", "weight"])
def test_live_nodes_with_a_batch_size_left_open(scale):
    model = ZOO["linen_mlp"]()
    nodes = wn.reparameterize(model.params, model.axes)
    (batch,) = jax.export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, *model.x.shape[1:]), model.x.dtype)
    exported = jax.export.export(jax.jit(wn.wrap(model.fn, scale=scale)))(nodes, shape)
    live = jax.export.deserialize(exported.serialize())
    for rows in (1, 2, 100):
        x = jnp.resize(model.x, (rows, *model.x.shape[1:]))
        np.testing.assert_allclose(live.call(nodes, x), model.fn(model.params, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", ["auto", "output"])
def test_loops_reshapes_and_convolutions_with_a_size_left_open(scale):
    nodes = wn.reparameterize({"w": jnp.eye(3) + 0.1, "k": jnp.ones((3, 3, 3, 2))}, {"w": -2, "k": (-4, -3, -2)})

    def loop(params, x):
        return jax.lax.scan(lambda state, row: (jnp.tanh(row @ params["w"] + state), None), jnp.zeros(3), x)[0]

    def reshaped(params, x):
        y = jax.lax.conv_general_dilated(x, params["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return (x @ params["w"]).reshape(x.shape[0], -1)[:, :4] + y.reshape(x.shape[0], -1)[:, :4]

    for fn, shape in ((loop, "n, 3"), (reshaped, "n, 4, 4, 3")):
        spec = jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape), jnp.float32)
        live = jax.export.export(jax.jit(wn.wrap(fn, scale=scale)))(nodes, spec)
        x = jax.random.normal(jax.random.key(0), (5, *spec.shape[1:]))
        np.testing.assert_allclose(live.call(nodes, x), fn(wn.reconstruct(nodes), x), rtol=1e-5, atol=1e-5)


def test_the_guide_runs():
    run("docs/serving.md")


@pytest.mark.slow
def test_the_guide_to_saving_runs():
    run("docs/saving.md")
