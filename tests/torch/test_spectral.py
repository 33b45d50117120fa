"""Spectral norms in state dicts, folded on import: the weights that PyTorch computes in evaluation."""

import numpy as np
import pytest

from wn_jax.torch import from_state_dict, linear, to_flax, to_state_dict

torch = pytest.importorskip("torch")

OLD, NEW = torch.nn.utils.spectral_norm, torch.nn.utils.parametrizations.spectral_norm


def trained(make, scheme, **options):
    """A layer after some steps of power iteration, which then rests."""
    torch.manual_seed(0)
    layer = scheme(make(), **options)
    for _ in range(3):
        _ = layer(torch.randn(2, make().weight.shape[1 - ("Transpose" in type(layer).__name__)], 9))
    return layer.eval()


LAYERS = {
    "conv": lambda: torch.nn.Conv1d(3, 5, 4),
    "transposed": lambda: torch.nn.ConvTranspose1d(3, 5, 4),
    "linear": lambda: torch.nn.Linear(9, 4),
    "one output": lambda: torch.nn.Conv1d(3, 1, 4),
    "one of each": lambda: torch.nn.Conv1d(1, 1, 4),
}


def weight_of(layer):
    with torch.no_grad():
        layer(torch.zeros(1, layer.weight.shape[1 - ("Transpose" in type(layer).__name__)], 9))  # the old scheme's hook
        return layer.weight.numpy()


@pytest.mark.parametrize("scheme", [OLD, NEW], ids=["old", "new"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_weight_of_evaluation(name, scheme):
    if name == "linear":
        torch.manual_seed(0)
        layer = scheme(LAYERS[name]()).eval()
        with torch.no_grad():
            layer(torch.zeros(1, 9))
            expected = layer.weight.numpy()
    else:
        layer = trained(LAYERS[name], scheme)
        expected = weight_of(layer)
    tree = from_state_dict(layer.state_dict(), fold_spectral=True)
    assert sorted(tree) == ["bias", "weight"]
    np.testing.assert_allclose(tree["weight"], expected, rtol=2e-6)
    assert tree["weight"].dtype == expected.dtype
    assert sorted(to_state_dict(tree)) == ["bias", "weight"]


@pytest.mark.parametrize("scheme", [OLD, NEW], ids=["old", "new"])
def test_a_square_weight_needs_dim(scheme):
    layer = trained(lambda: torch.nn.ConvTranspose1d(4, 4, 3), scheme)
    with pytest.raises(ValueError, match=r"fit each dim of \[0, 1\], with another weight for each.*dim={'weight': 0}"):
        from_state_dict(layer.state_dict(), fold_spectral=True)
    expected = weight_of(layer)
    for dim in (1, {"weight": 1}):
        tree = from_state_dict(layer.state_dict(), dim=dim, fold_spectral=True)
        np.testing.assert_allclose(tree["weight"], expected, rtol=2e-6)
    with pytest.raises(ValueError, match="fit dim 0 or 1, and not the given 2"):
        from_state_dict(layer.state_dict(), dim=2, fold_spectral=True)


@pytest.mark.parametrize("scheme", [OLD, NEW], ids=["old", "new"])
def test_unasked_the_arrays_stay_and_to_flax_says_how_to_ask(scheme):
    torch.manual_seed(0)
    state = {f"fc.{key}": value for key, value in scheme(torch.nn.Linear(3, 2)).state_dict().items()}
    tree = from_state_dict(state)
    again = to_state_dict(tree)
    assert all(np.array_equal(again[key], value.numpy()) for key, value in state.items())
    target = {"kernel": np.zeros((3, 2), np.float32), "bias": np.zeros(2, np.float32)}
    with pytest.raises(ValueError, match=r"from_state_dict\(state, fold_spectral=True\)"):
        to_flax(tree, target, {"fc": linear("")})
    params = to_flax(from_state_dict(state, fold_spectral=True), target, {"fc": linear("")})
    assert params["kernel"].shape == (3, 2)


def test_weight_norms_beside_it_are_nodes():
    torch.manual_seed(0)
    net = torch.nn.Sequential(OLD(torch.nn.Linear(3, 2)), torch.nn.utils.weight_norm(torch.nn.Linear(2, 4)))
    tree = from_state_dict(net.state_dict(), fold_spectral=True)
    assert tree["1"]["weight"].axes == (-1,)
    assert tree["0"]["weight"].shape == (2, 3)


def arrays(**changes):
    state = {"weight_orig": np.ones((2, 3)), "weight_u": np.ones(2), "weight_v": np.ones(3)} | changes
    return {key: value for key, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            arrays(weight_u=np.ones(4)),
            r"u of shape \(4,\) and v of shape \(3,\), of 'weight_orig' .* fit no dim",
        ),
        (
            arrays(weight_v=None),
            r"'weight_orig' is under a spectral norm whose 'weight_v' is missing; load it into the",
        ),
        (arrays(weight_u=None), "'weight_orig' is under a spectral norm whose 'weight_u' is missing"),
        (
            {"parametrizations.weight.original": np.ones((2, 3)), "parametrizations.weight.0._u": np.ones(2)},
            "'parametrizations.weight.original' is under a spectral norm whose 'parametrizations.weight.0._v' is",
        ),
        (arrays(weight=np.ones((2, 3))), "'weight' is in the state dict, and so is 'weight_orig'; leave out one"),
        (arrays(weight_v=np.zeros(3)), "the spectral norm of 'weight' is 0"),
        (arrays(weight_orig=np.full((2, 3), np.nan)), "'weight_orig', or its u or v, is no array of finite"),
        (arrays(weight_u=np.ones(2, int)), "'weight_orig', or its u or v, is no array of finite"),
    ],
)
def test_what_is_refused(state, message):
    with pytest.raises(ValueError, match=message):
        from_state_dict(state, fold_spectral=True)


def test_a_pruned_weight_is_none():
    state = {"weight_orig": np.ones((2, 3)), "weight_mask": np.ones((2, 3))}
    assert sorted(from_state_dict(state, fold_spectral=True)) == ["weight_mask", "weight_orig"]
