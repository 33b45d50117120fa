"""`wn_jax.equinox.from_weight_norm`: the same functions and gradients as Equinox' and paramax' own weight norms."""

import subprocess
import sys

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import paramax
import pytest
from flax import nnx

import wn_jax as wn
from wn_jax.equinox import from_weight_norm

KEY = jax.random.key(0)
WeightNorm = eqx.nn.WeightNorm


def call(model, x):
    return jax.vmap(model)(x)


def trained(model):
    """The model with other numbers than at the start, where g is the norm of v."""
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    leaves, treedef = jax.tree.flatten(arrays)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [x + 0.3 * jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)]
    return eqx.combine(jax.tree.unflatten(treedef, leaves), rest)


def linear(**options):
    return WeightNorm(eqx.nn.Linear(4, 6, key=KEY), **options)


LAYERS = {
    # The model, the shape of its input, and the axes of each node, as Equinox documents them.
    "linear": (linear(), (4,), {"weight": (-1,)}),
    "linear, last axis": (linear(axis=-1), (4,), {"weight": (-2,)}),
    "linear, whole": (linear(axis=None), (4,), {"weight": (-2, -1)}),
    "conv": (WeightNorm(eqx.nn.Conv2d(3, 5, 3, key=KEY)), (3, 8, 8), {"weight": (-3, -2, -1)}),
    "conv, whole": (WeightNorm(eqx.nn.Conv1d(3, 5, 3, key=KEY), axis=None), (3, 8), {"weight": (-3, -2, -1)}),
    "transposed": (WeightNorm(eqx.nn.ConvTranspose1d(3, 5, 3, key=KEY), axis=1), (3, 8), {"weight": (-3, -1)}),
    "one input": (WeightNorm(eqx.nn.Linear(1, 6, key=KEY)), (1,), {"weight": (-1,)}),
    "one output": (WeightNorm(eqx.nn.Linear(4, 1, key=KEY)), (4,), {"weight": (-1,)}),
    "a network": (
        eqx.nn.Sequential([linear(), eqx.nn.Lambda(jax.nn.relu), WeightNorm(eqx.nn.Linear(6, 2, key=KEY))]),
        (4,),
        {"layers/0/weight": (-1,), "layers/2/weight": (-1,)},
    ),
}


def axes_of(model):
    pairs = jax.tree.leaves_with_path(model, is_leaf=lambda x: isinstance(x, wn.WeightNorm))
    found = {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in pairs}
    return {path: leaf.axes for path, leaf in found.items() if isinstance(leaf, wn.WeightNorm)}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("scale", ["auto", "weight", "output"])
def test_the_same_function(name, scale):
    model, shape, axes = LAYERS[name]
    theirs, x = trained(model), jax.random.normal(KEY, (5, *shape))
    ours = from_weight_norm(theirs)
    assert axes_of(ours) == axes
    expected = call(theirs, x)
    np.testing.assert_allclose(eqx.filter_jit(wn.wrap(call, scale=scale))(ours, x), expected, atol=2e-6)
    np.testing.assert_allclose(call(wn.reconstruct(ours), x), expected, atol=2e-6)  # without the wrappers


def test_the_halves_keep_their_values_and_gradients():
    theirs, x = trained(linear()), jax.random.normal(KEY, (5, 4))
    ours = from_weight_norm(theirs)
    np.testing.assert_array_equal(ours.weight.v, theirs.layer.weight)
    np.testing.assert_array_equal(ours.weight.g, theirs.g)
    of_theirs = eqx.filter_grad(lambda model: jnp.sum(call(model, x) ** 2))(theirs)
    of_ours = eqx.filter_grad(lambda model: jnp.sum(wn.wrap(call)(model, x) ** 2))(ours)
    np.testing.assert_allclose(of_ours.weight.v, of_theirs.layer.weight, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(of_ours.weight.g, of_theirs.g, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(of_ours.bias, of_theirs.layer.bias, rtol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, -1, None])
def test_a_stack_that_filter_vmap_made_keeps_a_norm_for_each_copy(axis):
    keys = jax.random.split(KEY, 3)
    theirs = trained(eqx.filter_vmap(lambda key: WeightNorm(eqx.nn.Linear(4, 4, key=key), axis=axis))(keys))
    ours = from_weight_norm(theirs)
    assert axes_of(ours) == {"weight": {0: (-1,), 1: (-2,), -1: (-2,), None: (-2, -1)}[axis]}

    def ensemble(model, x):
        return eqx.filter_vmap(call, in_axes=(eqx.if_array(0), None))(model, x)

    x = jax.random.normal(KEY, (5, 4))
    np.testing.assert_allclose(wn.wrap(ensemble)(ours, x), ensemble(theirs, x), atol=2e-6)


def test_a_weight_of_another_name_and_a_bias():
    class Scaled(eqx.Module):
        matrix: jax.Array
        bias: jax.Array

        def __call__(self, x):
            return self.matrix @ x + self.bias

    layer, x = Scaled(jax.random.normal(KEY, (3, 4)), jnp.array([1.0, -2.0, 3.0])), jnp.ones((2, 4))
    ours = from_weight_norm(WeightNorm(layer, weight_name="matrix"))
    assert axes_of(ours) == {"matrix": (-1,)}
    theirs = trained(WeightNorm(layer, weight_name="bias"))
    plain = from_weight_norm(theirs)  # of a single number there is no norm
    assert axes_of(plain) == {}
    np.testing.assert_allclose(call(plain, x), call(theirs, x), rtol=1e-6)


def test_bfloat16():
    theirs = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if eqx.is_array(x) else x, trained(linear()))
    ours, x = from_weight_norm(theirs), jnp.ones((2, 4), jnp.bfloat16)
    assert (ours.weight.v.dtype, ours.weight.g.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(wn.wrap(call)(ours, x).astype(float), call(theirs, x).astype(float), rtol=2e-2)


def test_a_vector_of_zeros_is_zero_and_trains():
    theirs = eqx.tree_at(lambda model: model.layer.weight, linear(), replace_fn=lambda v: v.at[2].set(0))
    x = jax.random.normal(KEY, (5, 4))
    assert bool(jnp.isnan(call(theirs, x)[:, 2]).all())
    ours = from_weight_norm(theirs)
    weight = wn.reconstruct(ours).weight
    np.testing.assert_array_equal(weight[2], 0)
    grads = eqx.filter_grad(lambda model: jnp.sum(wn.wrap(call)(model, x) ** 3))(ours)
    assert bool(jnp.isfinite(grads.weight.g).all())
    assert float(jnp.abs(grads.weight.g[2, 0])) > 0


# paramax


def normalized(model, where=lambda model: model.weight):
    return eqx.tree_at(where, model, replace_fn=paramax.WeightNormalization)


def unwrapped(model, x):
    return call(paramax.unwrap(model), x)


def test_paramax():
    theirs = trained(normalized(eqx.nn.Linear(4, 6, key=KEY)))
    ours, x = from_weight_norm(theirs), jax.random.normal(KEY, (5, 4))
    assert axes_of(ours) == {"weight": (-1,)}
    np.testing.assert_array_equal(ours.weight.v, theirs.weight.weight)
    np.testing.assert_allclose(wn.wrap(call)(ours, x), unwrapped(theirs, x), atol=2e-6)
    np.testing.assert_allclose(wn.wrap(unwrapped)(ours, x), unwrapped(theirs, x), atol=2e-6)


def test_paramax_of_a_convolution_normalizes_the_last_axis():
    theirs = trained(normalized(eqx.nn.Conv1d(3, 5, 3, key=KEY)))
    ours, x = from_weight_norm(theirs), jax.random.normal(KEY, (5, 3, 8))
    assert axes_of(ours) == {"weight": (-1,)}
    np.testing.assert_allclose(wn.wrap(call)(ours, x), unwrapped(theirs, x), atol=2e-6)


def test_paramax_beside_and_inside_other_wrappers():
    model = normalized(eqx.nn.Linear(4, 6, key=KEY))
    model = eqx.tree_at(lambda model: model.bias, model, replace_fn=lambda x: paramax.Parameterize(jnp.exp, x))
    frozen = paramax.NonTrainable(model)
    x = jax.random.normal(KEY, (5, 4))
    for theirs in (model, frozen):
        ours = from_weight_norm(theirs)
        np.testing.assert_allclose(wn.wrap(unwrapped)(ours, x), unwrapped(theirs, x), atol=2e-6)
    grads = eqx.filter_grad(lambda model: jnp.sum(wn.wrap(unwrapped)(model, x)))(from_weight_norm(frozen))
    assert all(bool((grad == 0).all()) for grad in jax.tree.leaves(grads))


def with_scale(change):
    return eqx.tree_at(lambda model: model.weight.scale, normalized(eqx.nn.Linear(4, 6, key=KEY)), replace_fn=change)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (eqx.nn.Linear(4, 6, key=KEY), "found no equinox.nn.WeightNorm and no paramax.*reparameterize"),
        ({}, "found no equinox.nn.WeightNorm"),
        (with_scale(paramax.NonTrainable), "at 'weight' has a scale in a NonTrainable that no node can stand for"),
        (with_scale(lambda x: jnp.ones((6, 4))), r"has a scale of shape \(6, 4\), which is not one"),
        (
            eqx.tree_at(lambda model: model.weight.weight, normalized(linear().layer), replace_fn=paramax.NonTrainable),
            "at 'weight' has a NonTrainable as its weight, and not an array; where that is a wrapper of paramax",
        ),
        (
            eqx.tree_at(lambda m: m.weight.weight, normalized(linear().layer), replace_fn=paramax.WeightNormalization),
            "wraps a weight that is wrapped already",
        ),
        (eqx.tree_at(lambda model: model.g, linear(), jnp.ones((3, 1))), r"has a g of shape \(3, 1\), which is not"),
        (jax.eval_shape(lambda: eqx.filter(linear(), eqx.is_array)), "has a ShapeDtypeStruct as its weight"),
        (
            [eqx.tree_at(lambda model: model.layer, linear(), linear())],
            "at '0' wraps a WeightNorm that has no array",
        ),
    ],
)
def test_what_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        from_weight_norm(model)


def test_equinox_is_imported_by_nobody():
    program = """
import sys
import wn_jax as wn
wn.equinox
assert not {"equinox", "paramax"} & set(sys.modules)
try:
    wn.equinox.from_weight_norm({"w": 1.0})
except ValueError:
    pass
assert not {"equinox", "paramax"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


# The hint


def hint(model, fn=call):
    x = jnp.ones((2, 4))
    lines = str(wn.weight_uses(fn)(model, x)).splitlines()
    return [line for line in lines if "already holds" in line]


def test_weight_uses_leads_to_the_conversion():
    end = "wn_jax.equinox.from_weight_norm(model) makes nodes of it."
    assert hint(linear()) == [f"The model already holds equinox.nn.WeightNorm, at '': {end}"]
    model = eqx.nn.Sequential([linear(), eqx.nn.Lambda(jax.nn.relu)])
    assert hint(model) == [f"The model already holds equinox.nn.WeightNorm, at 'layers/0': {end}"]
    model = normalized(eqx.nn.Linear(4, 6, key=KEY))
    assert hint(model, unwrapped) == [f"The model already holds paramax.WeightNormalization, at 'weight': {end}"]
    assert hint(from_weight_norm(linear())) == hint(eqx.nn.Linear(4, 3, key=KEY)) == []


def test_so_it_does_for_flax():
    theirs = nn.Sequential([nn.WeightNorm(nn.Dense(3))])
    params = theirs.init(KEY, jnp.ones((2, 4)))
    (found,) = hint(params, theirs.apply)
    assert found.startswith("The model already holds flax.linen.WeightNorm, at 'params/layers_0/layer_instance/kernel'")
    assert "wn_jax.linen.from_weight_norm(params)" in found
    model = nnx.WeightNorm(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    (found,) = hint(nnx.state(model), lambda state, x: nnx.merge(nnx.graphdef(model), state)(x))
    assert "flax.nnx.WeightNorm, at '': wn_jax.nnx.from_weight_norm(model)" in found


def test_an_empty_dict_of_axes_leads_there_too():
    with pytest.raises(ValueError, match=r"axes match no leaf.*wn_jax.equinox.from_weight_norm\(model\)"):
        wn.reparameterize(linear(), wn.infer_axes(call)(linear(), jnp.ones((2, 4))))
