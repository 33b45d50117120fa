"""State dicts of PyTorch: pairs found, the same weights, and back without loss. The oracle is PyTorch itself."""

import jax
import numpy as np
import pytest
import safetensors.numpy

import wn_jax as wn
from wn_jax.torch import from_state_dict, to_state_dict

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch.nn.utils import parametrizations  # noqa: E402

from tests.torch.models import MODELS, build  # noqa: E402


def nodes_of(tree):
    """The nodes of a nested dict by their names."""
    pairs = jax.tree.leaves_with_path(tree, is_leaf=lambda x: isinstance(x, wn.WeightNorm))
    return {".".join(key.key for key in path): leaf for path, leaf in pairs if isinstance(leaf, wn.WeightNorm)}


def weight(model, name):
    path, _, weight = name.rpartition(".")
    module = model.get_submodule(path)
    for hook in module._forward_pre_hooks.values():  # of the old style, which computes weights only where they are used
        hook(module, None)
    return getattr(module, weight).detach().numpy()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PyTorch, about the old scheme
@pytest.mark.parametrize("scheme", ["new", "old"])
@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name, scheme):
    model, case = build(name, scheme), MODELS[name]
    state = model.state_dict()
    halves = [key for key in state if key.endswith("weight_g" if scheme == "old" else "original0")]
    assert len(halves) == case.pairs  # the model is what this test takes it for

    tree = from_state_dict(state)
    nodes = nodes_of(tree)
    assert len(nodes) == case.pairs
    for key, node in nodes.items():
        np.testing.assert_allclose(node.weight(), weight(model, key), rtol=1e-6)
    with torch.no_grad():
        before = case.call(model)

    exported = {key: torch.from_numpy(value) for key, value in to_state_dict(tree, scheme).items()}
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[key], value) for key, value in state.items())
    with torch.no_grad():
        for value in model.state_dict().values():
            value.zero_()
    assert not model.load_state_dict(exported, strict=True).unexpected_keys
    with torch.no_grad():
        assert torch.equal(case.call(model), before)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "name", [name if name in ("encodec", "hubert") else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_a_checkpoint_in_the_old_scheme_loads_into_modules_of_the_new(name):
    old, new = build(name, "old"), build(name, "new")
    with torch.no_grad():
        for value in new.state_dict().values():
            value.zero_()
    exported = to_state_dict(from_state_dict(old.state_dict()), "new")
    new.load_state_dict({key: torch.from_numpy(value) for key, value in exported.items()}, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(MODELS[name].call(new), MODELS[name].call(old), rtol=1e-5, atol=1e-6)


def pair(g=(4, 1, 1), v=(4, 3, 5), scheme="old", name="conv.weight", dtype=np.float32):
    rng = np.random.default_rng(0)
    module, _, weight = name.rpartition(".")
    keys = {"old": [f"{name}_g", f"{name}_v"], "new": [f"{module}.parametrizations.{weight}.original{i}" for i in "01"]}
    return {key: rng.standard_normal(shape).astype(dtype) for key, shape in zip(keys[scheme], (g, v), strict=True)}


@pytest.mark.parametrize(
    ("g", "axes"),
    [((4, 1, 1), (-2, -1)), ((1, 3, 1), (-3, -1)), ((1, 1, 5), (-3, -2)), ((), (-3, -2, -1))],
    ids=["0", "1", "2", "None"],
)
@pytest.mark.parametrize("scheme", ["new", "old"])
def test_dim_is_read_from_the_shape_of_g(g, axes, scheme):
    state = pair(g, scheme=scheme)
    tree = from_state_dict(state)
    assert tree["conv"]["weight"].axes == axes
    again = to_state_dict(tree, scheme)
    assert {key: value.shape for key, value in again.items()} == {key: value.shape for key, value in state.items()}
    assert all(np.array_equal(again[key], value) for key, value in state.items())
    halves = [torch.from_numpy(value) for value in state.values()]
    dim = [axis for axis in range(3) if axis - 3 not in axes]
    expected = parametrizations.weight_norm(torch.nn.Conv1d(3, 4, 5), dim=dim[0] if dim else None)
    expected.load_state_dict(dict(zip(expected.state_dict(), [torch.zeros(4), *halves], strict=True)))
    np.testing.assert_allclose(tree["conv"]["weight"].weight(), expected.weight.detach().numpy(), rtol=1e-6)


def test_a_shape_that_fits_several_dims_gives_the_same_weight_for_each():
    state = pair((1, 1, 1), (1, 1, 1)) | pair((1, 1, 5), (1, 1, 5), name="post.weight")
    unasked, tree = from_state_dict(state), from_state_dict(state, dim=0)
    assert unasked["conv"]["weight"].axes == (-2, -1)
    assert all(np.array_equal(to_state_dict(unasked, "old")[key], value) for key, value in state.items())
    assert (tree["conv"]["weight"].axes, tree["post"]["weight"].axes) == ((-2, -1), (-3, -2))
    other = from_state_dict(state, dim={"conv.weight": 2})
    assert other["conv"]["weight"].axes == (-3, -2)
    np.testing.assert_array_equal(other["conv"]["weight"].weight(), tree["conv"]["weight"].weight())
    with pytest.raises(ValueError, match=r"'conv.weight_g'.* fits dim 0 or 1 or 2, and not the given 3"):
        from_state_dict(state, dim=3)
    with pytest.raises(ValueError, match=r"'post.weight_g'.* fits dim 2, and not the given 0"):
        from_state_dict(state, dim={"post.weight": 0, "conv.weight": 0})
    with pytest.raises(
        ValueError, match=r"'cnov.weight' is no weight with halves.*those are 'conv.weight', 'post.weight'"
    ):
        from_state_dict(state, dim={"cnov.weight": 0})


def test_both_schemes_may_be_mixed_and_lone_halves_that_are_none_stay():
    state = pair() | pair(scheme="new", name="up.weight") | {"attention.emb_rel_v": np.ones((1, 9, 4), np.float32)}
    spectral = {f"sn.weight_{end}": np.ones((3, 2), np.float32) for end in ("orig", "u", "v")}
    tree = from_state_dict(state | spectral)
    assert set(nodes_of(tree)) == {"conv.weight", "up.weight"}
    again = to_state_dict(tree, lambda name: "old" if name.startswith("conv") else "new")
    assert set(again) == {*state, *spectral}


def test_a_file_is_read_as_a_mapping_is(tmp_path):
    path = tmp_path / "model.safetensors"
    state = pair(dtype=np.float16) | {"steps": np.array(3)}
    safetensors.numpy.save_file(state, path)
    tree = from_state_dict(path)
    assert set(nodes_of(tree)) == {"conv.weight"}
    assert all(np.array_equal(value, state[key]) for key, value in to_state_dict(tree, "old").items())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_tensors_of_other_dtypes_keep_their_bits(dtype):
    state = {key: torch.from_numpy(value).to(getattr(torch, dtype)) for key, value in pair().items()}
    tree = from_state_dict(state)
    assert tree["conv"]["weight"].v.dtype.name == dtype
    for key, value in to_state_dict(tree, "old").items():
        assert value.dtype.name == dtype
        np.testing.assert_array_equal(value.astype(np.float64), state[key].double().numpy())


def test_what_was_trained_goes_back_and_folded_weights_too():
    tree = jax.tree.map(lambda x: jax.numpy.asarray(x) * 2, from_state_dict(pair()))
    state = to_state_dict(tree, "old")
    np.testing.assert_array_equal(state["conv.weight_g"], 2 * pair()["conv.weight_g"])
    assert state["conv.weight_g"].flags.writeable
    assert list(to_state_dict(wn.reconstruct(tree))) == ["conv.weight"]
