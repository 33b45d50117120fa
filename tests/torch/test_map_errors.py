"""Maps of names and targets with something wrong, which the error says: which key or leaf, why, and what to do."""

import jax.numpy as jnp
import numpy as np
import pytest

import wn_jax as wn
from tests.messages import pattern
from tests.torch.ported import NAMES, STATE, TARGET, changed, numbers
from wn_jax.torch import Array, conv, from_state_dict, linear, to_flax, to_state_dict


def without(state, key):
    return {name: value for name, value in state.items() if not name.endswith(key)}


NODE = {
    axes: changed(TARGET, "conv_0", "kernel", to=wn.WeightNorm.from_weight(jnp.ones((3, 4, 6)), axes))
    for axes in ((-3, -2), (-2,), (-3, -2, -1))
}


def test_a_target_with_the_checkpoints_axes():
    assert to_flax(from_state_dict(STATE), NODE[-3, -2], NAMES)["conv_0"]["kernel"].axes == (-3, -2)


@pytest.mark.parametrize(
    ("state", "target", "names", "words"),
    [
        (
            STATE,
            TARGET,
            {"encoder.{i}": conv("conv_{i}")},
            "keys without a place in the map (None leaves them out): 'head.bias', 'head.weight', 'steps'; leaves of "
            "the target that get nothing: 'head/bias', 'head/kernel'",
        ),
        (
            STATE,
            TARGET,
            changed(NAMES, "encoder.{i}", to=conv("cnov_{i}")),
            "'encoder.0.weight' goes to 'cnov_0/kernel', which the target does not have (did you mean 'conv_0/kernel'",
        ),
        (
            STATE,
            TARGET,
            {"encodr.{i}": conv("conv_{i}"), "head": linear("head"), "steps": None, "tail": None},
            "keys without a place .*'encoder.0.bias', .*entries of the map that no key is like: 'encodr.{i}', 'tail'",
        ),
        (without(STATE, "head.bias"), TARGET, NAMES, "leaves of the target that get nothing: 'head/bias'"),
        (
            STATE,
            TARGET,
            changed(NAMES, "head", "bias", to=Array("conv_0/bias")),
            "two keys go to 'conv_0/bias': 'encoder.0.bias' and 'head.bias'; mend the map",
        ),
        (
            STATE,
            TARGET,
            changed(NAMES, "encoder.{i}", to=conv("conv_0")),
            "'encoder.{i}.weight' counts {i}, and its place 'conv_0/kernel' counts nothing",
        ),
        (
            STATE,
            TARGET,
            NAMES | {"encoder.0.bias": "conv_0/bias"},
            "'encoder.0.bias' has two places in the map: as 'encoder.0.bias' and 'encoder.{i}.bias'",
        ),
        (
            STATE,
            TARGET,
            changed(NAMES, "head", to={"weight": "head/kernel", "bias": "head/bias"}),
            "'head.weight', for 'head/kernel', has the shape (2, 6) in Flax's layout, where the target has (6, 2): it "
            "fits only transposed, its axes in the order (1, 0)",
        ),
        (
            STATE,
            changed(TARGET, "conv_0", "kernel", to=jnp.zeros((3, 6, 4))),
            NAMES,
            "'encoder.0.weight', for 'conv_0/kernel', has the shape (3, 4, 6) .* fits only transposed",
        ),
        (
            STATE,
            changed(TARGET, "conv_0", "kernel", to=jnp.zeros((5, 4, 6))),
            NAMES,
            "'encoder.0.weight', for 'conv_0/kernel', has the shape (3, 4, 6) in Flax's layout, where .* has (5, 4, 6)",
        ),
        (
            STATE,
            NODE[-2,],
            NAMES,
            "'encoder.0.weight', for 'conv_0/kernel', has a norm over the axes (-3, -2) .* (-2,)",
        ),
        (STATE, NODE[-3, -2, -1], NAMES, "has a norm over the axes (-3, -2) .* over (-3, -2, -1) in the target"),
        (
            to_state_dict(wn.reconstruct(from_state_dict(STATE))),
            NODE[-3, -2],
            NAMES,
            "'encoder.0.weight', for 'conv_0/kernel', is a plain weight in the checkpoint and a node in the target",
        ),
        (
            STATE,
            TARGET,
            changed(NAMES, "head", "weight", to=Array("head/kernel", "o i k -> i o k")),
            "'head.weight' has the shape (2, 6), which the layout 'o i k -> i o k' does not fit",
        ),
        (
            STATE | {"head.bias": np.ones(2, int)},
            TARGET,
            NAMES,
            "'head.bias', for 'head/bias', is int64, and cannot become float32; cast it yourself, the target's dtype",
        ),
        (
            STATE | {"head.bias": np.full(2, 1e6, np.float32)},
            changed(TARGET, "head", "bias", to=jnp.zeros(2, jnp.float16)),
            NAMES,
            "'head.bias', for 'head/bias', has numbers that float16 cannot hold, such as 1000000.0, the target's dtype",
        ),
        (
            STATE | {"steps": np.array(2**40)},
            TARGET | {"steps": np.array(0)},  # of 64 bits, where JAX has 32
            changed(NAMES, "steps", to="steps"),
            "'steps', for 'steps', has numbers that int32 cannot hold",
        ),
        (
            STATE | {"head.bias": np.array([np.nan, 1e6], np.float32)},
            changed(TARGET, "head", "bias", to=jnp.zeros(2, jnp.float16)),
            NAMES,
            "'head.bias', for 'head/bias', has NaN in it: the model diverged before it was saved",
        ),
        (
            {
                **STATE,
                "encoder.0.weight_g": np.full((6, 1, 1), 1e300),
                "encoder.0.weight_v": np.ones((6, 4, 3)),
            },
            TARGET,
            NAMES,
            "'encoder.0.weight', for 'conv_0/kernel', has numbers that float32 cannot hold, such as 1e+300",
        ),
        (
            STATE | {"encoder.0.weight_v": np.full((6, 4, 3), 1e-9, np.float32)},
            changed(TARGET, "conv_0", "kernel", to=jnp.zeros((3, 4, 6), jnp.float16)),
            NAMES,
            "'encoder.0.weight', for 'conv_0/kernel', has a direction that is zero in float16, the target's dtype",
        ),
        (
            {key: value for key, value in STATE.items() if not key.startswith("encoder")}
            | {
                "encoder.0.weight_g": numbers(1, 1, 1),
                "encoder.0.weight_v": numbers(1, 4, 3),
                "encoder.0.bias": numbers(1),
            },
            {"conv_0": {"kernel": wn.WeightNorm(numbers(1, 1, 1), numbers(3, 4, 1), (-3, -2, -1)), "bias": numbers(1)}}
            | {"head": TARGET["head"]},
            NAMES,
            "has a norm over the axes (-3, -2) in the checkpoint, and over (-3, -2, -1) in the target",
        ),
        (
            STATE,
            changed(TARGET, "head", "bias", to=0.5),
            NAMES,
            "'head.bias', for 'head/bias', is an array in the checkpoint and a float in the target",
        ),
        (
            STATE,
            TARGET,
            changed(NAMES, "head", "bias", to=Array("conv_0/bias", add=True)),
            "two keys go to 'conv_0/bias'",
        ),
        (
            STATE,
            changed(TARGET, "head", "bias", to=None),
            {
                "encoder.{i}.weight": conv("conv_{i}")["weight"],
                "encoder.{i}.bias": Array("conv_{i}/bias", add=True),
                "head": {"weight": linear("head")["weight"], "bias": Array("conv_0/bias", add=True)},
                "steps": None,
            },
            "'encoder.0.bias' and 'head.bias' are added for 'conv_0/bias', but are no arrays of one shape",
        ),
        (
            STATE,
            TARGET,
            changed(NAMES, "head", "weight", to=Array(("a", "b", "c"), "o i -> o i")),
            "'head.weight' is in Flax's layout of shape (2, 6), and not 3 arrays, one a leaf",
        ),
        (
            STATE,
            TARGET,
            changed(
                NAMES, "encoder.{i}", "weight", to=Array(("a{i}", "b{i}"), "(half o) i k -> k o half i", {"half": 2})
            ),
            "'encoder.0.weight' is in Flax's layout of shape (3, 3, 2, 4), and not 2 arrays",
        ),
        (
            STATE,
            TARGET,
            changed(NAMES, "encoder.{i}", "weight", to=Array(tuple(f"{c}{{i}}" for c in "abcd"), "o i k -> i o k")),
            "'encoder.0.weight' has one norm for the 4 arrays that it is taken apart into; .*reconstruct",
        ),
        (
            STATE | {"squeezed.weight_g": numbers(6, 1, 1), "squeezed.weight_v": numbers(6, 1, 1)},
            TARGET,
            NAMES | {"squeezed.weight": Array("a", "o 1 1 -> o")},
            "'squeezed.weight' has a norm over the axes (-2, -1) of (6, 1, 1), which is no norm over axes in",
        ),
        (
            STATE,
            TARGET | {"a": {"b": 1.0 * jnp.ones(1)}, "a/b": jnp.ones(1)},
            NAMES,
            "two leaves of the target .*'a/b'",
        ),
    ],
)
def test_a_map_or_a_target_that_does_not_fit(state, target, names, words):
    with pytest.raises(ValueError, match=pattern(words)):
        to_flax(from_state_dict(state), target, names)


def test_a_layout_without_an_arrow():
    with pytest.raises(ValueError, match=pattern("the layout 'o i, i o' has no '->' in it, once")):
        Array("head/kernel", "o i, i o")


def test_places_that_cannot_be():
    with pytest.raises(ValueError, match=pattern("has '...' in parentheses; name the axes that it merges")):
        Array("a", "o i ... -> (i ...) o")
    for paths in ((), ("a", "a")):
        with pytest.raises(ValueError, match=pattern("must be one or several, and each another")):
            Array(paths, "o i -> o i")
    with pytest.raises(ValueError, match=pattern("'x.{i}.{j}' or its place 'x{i}{j}' has numbers side by side")):
        to_flax({}, {}, {"x.{i}.{j}": "x{i}{j}"})


def test_halves_that_were_not_made_nodes():
    with pytest.raises(ValueError, match=pattern("'encoder.0.weight_g'.*to_flax(from_state_dict(state), ...)")):
        to_flax(STATE, TARGET, NAMES)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([("a", "b")], "a name map is a dict from PyTorch's names to places; got a list"),
        ({"a": 3}, "the place of 'a' is of type int; use a path, an Array, a dict or None"),
        ({3: "a"}, "the keys of a name map are strings; got 3"),
    ],
)
def test_what_is_no_map(names, words):
    with pytest.raises(TypeError, match=pattern(words)):
        to_flax(from_state_dict(STATE), TARGET, names)
