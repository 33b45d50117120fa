"""State dicts with something wrong, which the error says: which key or leaf, why, and what to do."""

import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import wn_jax as wn
from tests.messages import pattern
from tests.torch.import_cost import IMPORTS, SOURCES, in_its_own_process, state_dict
from wn_jax.torch import from_state_dict, to_state_dict

RNG = np.random.default_rng(0)


def numbers(*shape):
    return RNG.standard_normal(shape, np.float32)


OLD = {"conv.weight_g": numbers(6, 1, 1), "conv.weight_v": numbers(6, 4, 3)}
NEW = {f"conv.parametrizations.weight.original{i}": value for i, value in enumerate(OLD.values())}
NAN = numbers(6, 4, 3)
NAN[0, 0, 0] = np.nan


def without(state, key):
    return {name: value for name, value in state.items() if not name.endswith(key)}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (without(OLD, "_g"), "'conv.weight_v' is half of a weight whose g is missing; .*plain=['conv.weight']"),
        (without(OLD, "_v"), "'conv.weight_g' is half of a weight whose v is missing"),
        (without(NEW, "0"), "'conv.parametrizations.weight.original1' is half of a weight whose g is missing"),
        (without(NEW, "1"), "'conv.parametrizations.weight.original0' is half of a weight whose v is missing"),
        (OLD | NEW, "'conv.weight' is there twice: as 'conv.weight_g' and as 'conv.param.*original0'; leave out one"),
        (
            OLD | {"conv.weight": numbers(6, 4, 3)},
            "'conv.weight' is in the state dict, and so are its halves .*plain=['conv.weight']",
        ),
        (
            OLD | {"conv.weight_g": numbers(4, 1, 1)},
            "'conv.weight_g' of shape (4, 1, 1), for 'conv.weight_v' of shape (6, 4, 3), fits no dim: a norm has "
            "(6, 1, 1), (1, 4, 1), (1, 1, 3) or ()",
        ),
        (OLD | {"conv.weight_g": numbers(6)}, "'conv.weight_g' of shape (6,), .* fits no dim"),
        (OLD | {"conv.weight_g": numbers(6, 4, 1)}, "'conv.weight_g' of shape (6, 4, 1), .* fits no dim"),
        ({"weight_g": numbers(3), "weight_v": numbers(3)}, "'weight_g' of shape (3,), .* fits no dim: a norm has ()"),
        (OLD | {"conv.weight_v": np.ones((6, 4, 3), int)}, "'conv.weight_v' is int64, but .* floating-point arrays"),
        (OLD | {"conv.weight_g": np.ones((6, 1, 1), complex)}, "'conv.weight_g' is complex128, but .*real"),
        (
            OLD | {"conv.weight_g": np.ones((6, 1, 1))},
            "'conv.weight_g' is float64 and 'conv.weight_v' float32.*cast one",
        ),
        (OLD | {"conv.weight_v": NAN}, "'conv.weight_v' has NaN or infinity in it"),
        (OLD | {"conv.weight_g": np.full((6, 1, 1), np.inf, np.float32)}, "'conv.weight_g' has NaN or infinity in it"),
        (
            {
                "conv.weight_g": np.full((6, 1), np.nan, ml_dtypes.bfloat16),
                "conv.weight_v": np.ones((6, 4), "bfloat16"),
            },
            "'conv.weight_g' has NaN or infinity",
        ),
        ({"epoch": 3, "model": OLD}, "'epoch' is no array or tensor, but of type int; leave it out"),
        ({"model": OLD}, "'model' is a dict, not an array.* pass that: checkpoint['model']"),
        ({"x": np.array(["a", None], object)}, "'x' is an array of object, not of numbers; leave it out"),
        ({"x": np.array(["a"])}, "'x' is an array of <U1, not of numbers; leave it out"),
        ({"a": numbers(2), "a.b": numbers(2)}, "'a.b' is inside of another leaf"),
        ({"a.b": numbers(2), "a": numbers(2)}, "'a' is a leaf, and other leaves of the state dict are inside of it"),
        ({}, "the state dict is empty"),
    ],
)
def test_a_state_dict_that_is_wrong(state, words):
    with pytest.raises(ValueError, match=pattern(words)):
        from_state_dict(state)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ([1, 2], "got a list; pass a state dict .*torch.load(path, weights_only=True)"),
        ({1: numbers(2)}, "the keys of a state dict are strings; got 1"),
    ],
)
def test_what_is_no_state_dict(state, words):
    with pytest.raises(TypeError, match=pattern(words)):
        from_state_dict(state)


def test_arguments_of_a_wrong_kind():
    with pytest.raises(TypeError, match=pattern("dim is an int, or a dict from names to ints; got '0'")):
        from_state_dict(OLD, dim="0")
    with pytest.raises(TypeError, match=pattern("such as ['conv.weight']; got the string 'conv.weight'")):
        from_state_dict(OLD, plain="conv.weight")
    whole = {"w_g": numbers(), "w_v": numbers(2, 3)}
    with pytest.raises(ValueError, match=pattern("'w_g' is one number, for a norm over all of 'w_v', and for no dim")):
        from_state_dict(whole, dim={"w": 0})
    with pytest.raises(ValueError, match=pattern("'x' is abstract and holds no numbers; call this outside of jit")):
        jax.eval_shape(lambda x: from_state_dict({"x": x})["x"], jnp.ones(2))


def test_what_only_looks_like_a_pair_can_be_kept():
    assert set(from_state_dict(without(OLD, "_g"), plain=["conv.weight"])["conv"]) == {"weight_v"}
    assert set(from_state_dict(OLD, plain=["conv.weight"])["conv"]) == {"weight_g", "weight_v"}
    with pytest.raises(ValueError, match=pattern("'cnov.weight' is no weight with halves")):
        from_state_dict(OLD, plain=["cnov.weight"])


@pytest.mark.parametrize("length", [640, 19280])
def test_a_file_whose_header_begins_as_a_pickle_does(tmp_path, length):
    """Its first bytes are the header's length, which may be those of a pickle or of a zip archive."""
    path = tmp_path / "model.safetensors"
    state = {f"layers.{i}.weight": np.ones(1, np.float32) for i in range(length // 110)}
    for padding in range(0, length, 8):
        path.write_bytes(safetensors.numpy.save(state, {"note": "x" * padding}))
        if path.read_bytes()[:8] == length.to_bytes(8, "little"):
            break
    assert path.read_bytes()[:2] in (b"PK", b"\x80\x02")
    assert to_state_dict(from_state_dict(path)).keys() == state.keys()


@pytest.mark.parametrize("keep", [0, 4, 40, 200])
def test_a_file_that_was_cut_off(tmp_path, keep):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(OLD, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=pattern("model.safetensors: not a complete safetensors file")):
        from_state_dict(path)


def test_files_of_other_kinds(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"PK\x03\x04...")
    with pytest.raises(ValueError, match=pattern("is a pickle of PyTorch; .*torch.load(path, weights_only=True)")):
        from_state_dict(path)
    wn.save(tmp_path / "ours.safetensors", {"a": jnp.ones(2)})
    with pytest.raises(ValueError, match=pattern("was written by wn_jax.save; wn_jax.load reads it")):
        from_state_dict(str(tmp_path / "ours.safetensors"))
    with pytest.raises(FileNotFoundError, match="missing"):
        from_state_dict(tmp_path / "missing.safetensors")


def test_tensors_that_have_no_numbers_here():
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match=pattern("'x' does not become a NumPy array")):
        from_state_dict({"x": torch.ones(2, device="meta")})
    with pytest.raises(ValueError, match=pattern("'x' does not become a NumPy array")):
        from_state_dict({"x": torch.eye(2).to_sparse()})
    with pytest.raises(ValueError, match=pattern("'weight' does not become a NumPy array")):
        from_state_dict(torch.nn.LazyLinear(3).state_dict())
    broken = types.SimpleNamespace(numpy=lambda: None)
    with pytest.raises(ValueError, match=pattern("'x' does not become a NumPy array")):
        from_state_dict({"x": broken})


@pytest.mark.parametrize(
    ("tree", "scheme", "words"),
    [
        (
            {"w": wn.WeightNorm(numbers(6, 4, 1), numbers(6, 4, 3), (-1,))},
            "new",
            "'w' has a norm for each place along the axes [0, 1] of its shape (6, 4, 3).*reconstruct the tree",
        ),
        (from_state_dict(OLD), "newest", "scheme is 'new' or 'old'.*got 'newest'"),
        ({"a": {"b": numbers(2)}, "a.b": numbers(2)}, "new", "two leaves of the tree get the name 'a.b'"),
        (from_state_dict(OLD) | {"conv.weight_g": numbers(2)}, "old", "two leaves .* name 'conv.weight_g'; rename"),
        ({"a": jax.ShapeDtypeStruct((2,), np.float32)}, "new", "'a' is abstract and holds no numbers"),
        ({"a": "text"}, "new", "'a' is of type str, not an array of numbers; leave it out"),
        (wn.labels(from_state_dict(OLD)), "new", "'conv.weight/g' is of type str, not an array"),
        ({"a": jax.random.key(0)}, "new", "'a' is of type key<fry>, not an array of numbers; leave it out"),
        (
            {"w": wn.WeightNorm(np.full((2, 1), 1e5, np.float32), np.ones((2, 3), np.float16), (-1,))},
            "new",
            "'w': g has numbers that float16 cannot hold, such as 100000.0, the dtype of v; PyTorch keeps both in one",
        ),
        ({"w": wn.WeightNorm(numbers(2), numbers(2, 3), (-1,))}, "new", "'w': WeightNorm.g has shape (2,), but v"),
    ],
)
def test_a_tree_that_is_no_state_dict(tree, scheme, words):
    with pytest.raises(ValueError, match=pattern(words)):
        to_state_dict(tree, scheme)


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("what", IMPORTS)
def test_memory_of_an_import_of_100_million_parameters(tmp_path, what, source):
    path = tmp_path / "model.safetensors"
    if source == "file":
        safetensors.numpy.save_file(state_dict(), path)
    assert in_its_own_process(what, source, path)["memory"] <= 2.2
