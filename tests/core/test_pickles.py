"""Pickles of version 0.1, made before its modules moved, still load: by the names that modules had then.

The files in `pickles/` are never made anew. What they hold is written down here, and not read from them.
"""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import wn_jax as wn
from wn_jax import curvature, nnx, optim, torch

FOLDER = Path(__file__).parent / "pickles"
G, V = [[5.0, 13.0]], [[3.0, 5.0], [4.0, 12.0]]


def load(name):
    return pickle.loads((FOLDER / f"{name}.pickle").read_bytes())


def test_a_node():
    node = load("WeightNorm")
    assert type(node) is wn.WeightNorm
    assert (node.g.tolist(), node.v.tolist(), node.axes) == (G, V, (-2,))


def test_the_shard_of_a_node():
    node = load("LocalWeightNorm")
    assert isinstance(node, wn.WeightNorm)
    assert (node.g.tolist(), node.v.tolist(), node.axes, node.axis_names) == (G, V, (-2,), ("fsdp",))


def test_the_state_of_an_optimizer():
    state = load("ProjectDirectionsState")
    assert type(state) is optim.ProjectDirectionsState
    assert state.norms["kernel"].tolist() == G


def test_a_wrapped_model():
    model = load("WeightNormed")
    assert type(model) is nnx.WeightNormed
    np.testing.assert_allclose(model(np.eye(2, dtype=np.float32)), V, rtol=1e-6)


def test_a_layer():
    layer = load("MeanOnlyBatchNorm")
    assert type(layer) is nnx.MeanOnlyBatchNorm
    np.testing.assert_allclose(layer(np.array([[1.0, 10.0], [3.0, 30.0]])), [[-1, -10], [1, 10]])


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("Estimate", ["value", "standard_error"]),
        ("ConditionNumbers", ["damped", "numerical_range", "to", "to_mean"]),
        ("NaturalGradient", ["value", "residual", "steps", "converged"]),
        ("Eigenvalues", ["values", "errors", "exact"]),
        ("SpectralDensity", ["values", "weights", "exact"]),
    ],
)
def test_what_was_measured(name, fields):
    measured = load(name)
    assert type(measured) is getattr(curvature, name)
    assert [float(getattr(measured, field)) for field in fields] == list(range(1, len(fields) + 1))


def test_a_table_of_uses():
    bias, kernel = load("WeightUses")
    assert (bias.path, bias.reduction, bias.reason) == ("bias", None, "elementwise")
    assert bias.reason.explanation.startswith("it is added to")
    assert (kernel.path, kernel.reduction, kernel.feature, kernel.scale) == ("kernel", (-2,), (-1,), "output")


def test_a_rule_of_a_map_of_names():
    array = load("Array")
    assert type(array) is torch.Array
    assert (array.path, array.layout) == ("dense/kernel", "o i -> i o")


def test_the_modules_of_before_hold_their_classes_and_nothing_else():
    """Whoever looks through `sys.modules` must not import the family by it."""
    program = """
import sys
import wn_jax
assert not any(hasattr(module, "some_hook") for module in sys.modules.values())
assert "wn_jax.curvature" not in sys.modules
from wn_jax._natural import NaturalGradient
assert NaturalGradient is wn_jax.curvature.NaturalGradient
"""
    subprocess.run([sys.executable, "-c", program], check=True)
