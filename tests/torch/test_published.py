"""A published checkpoint with weight normalization, which the wheel of torchfcpe (a pitch estimator) holds."""

import importlib.metadata

import jax
import numpy as np
import pytest

import wn_jax as wn
from wn_jax.torch import from_state_dict, linear, to_flax, to_state_dict

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def state():
    """Its state dict, read as data. The package itself, and what it needs, are not imported."""
    try:
        wheel = importlib.metadata.distribution("torchfcpe")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pip install --no-deps torchfcpe")
    path = wheel.locate_file("torchfcpe/assets/fcpe_c_v001.pt")
    return torch.load(path, weights_only=True, map_location="cpu")["model"]


@pytest.mark.slow
def test_it_comes_back_bit_for_bit(state):
    tree = from_state_dict(state)
    node = tree["output_proj"]["weight"]
    assert (node.v.shape, node.axes) == ((360, 512), (-1,))
    again = to_state_dict(tree, "old")
    assert again.keys() == state.keys()
    for name, value in state.items():
        assert again[name].dtype == value.numpy().dtype
        np.testing.assert_array_equal(again[name], value.numpy())


@pytest.mark.slow
def test_its_output_layer_in_flax(state):
    layer = torch.nn.utils.weight_norm(torch.nn.Linear(512, 360))
    own = {name.removeprefix("output_proj."): value for name, value in state.items() if name.startswith("output_proj.")}
    layer.load_state_dict(own)
    x = np.random.default_rng(0).standard_normal((3, 512), np.float32)
    target = {"kernel": jax.ShapeDtypeStruct((512, 360), np.float32), "bias": jax.ShapeDtypeStruct((360,), np.float32)}
    params = to_flax(from_state_dict(own), target, linear(""))
    with torch.no_grad():
        expected = layer(torch.from_numpy(x)).numpy()
    apply = wn.wrap(lambda params, x: x @ params["kernel"] + params["bias"])
    np.testing.assert_allclose(apply(params, x), expected, rtol=1e-4, atol=1e-5)
