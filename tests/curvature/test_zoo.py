"""Products with Hessians over the model zoo: any framework's trees, with whatever they hold beside arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wn_jax as wn
from tests.zoo import ZOO
from wn_jax import curvature

NO_REAL_NUMBERS = {"plain_leftovers": "int32", "linen_bfloat16": "bfloat16", "linen_float16": "float16"}
NO_FORWARD_MODE = [name for name, make in ZOO.items() if not make().forward_mode]
OFTEN = ["linen_boxed", "nnx_mlp", "equinox_mlp"]
WITH_PRODUCTS = [name for name in ZOO if name not in [*NO_REAL_NUMBERS, *NO_FORWARD_MODE]]
MODELS = [*OFTEN, *(name for name in WITH_PRODUCTS[::2] if name not in OFTEN)]


@functools.cache
def zoo(name):
    """A model's parameters with nodes, and a loss of plain ones."""
    model = ZOO[name]()
    nodes = wn.reparameterize(model.params, model.axes)
    return nodes, model.x, lambda params, x: jnp.mean(jnp.square(model.fn(params, x).astype(jnp.float32)))


def arrays(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]


def random_like(tree, seed):
    """A tree with random numbers in place of the arrays, and all else as it is."""
    random = np.random.default_rng(seed)

    def fill(leaf):
        return jnp.asarray(random.standard_normal(leaf.shape), leaf.dtype) if isinstance(leaf, jax.Array) else leaf

    return jax.tree.map(fill, tree)


def vdot(first, second):
    return sum(np.vdot(np.asarray(a, np.float64), b) for a, b in zip(arrays(first), arrays(second), strict=True))


def by_hand(loss, nodes, x, vector):
    """The derivative of the gradient along a vector, of weights that are rebuilt before the model runs."""
    leaves, treedef = jax.tree.flatten(nodes)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

    def flat_loss(values):
        filled = dict(zip(places, values, strict=True))
        return loss(wn.reconstruct(treedef.unflatten([filled.get(i, leaf) for i, leaf in enumerate(leaves)])), x)

    along = jax.jit(lambda point, vector: jax.jvp(jax.grad(flat_loss), (point,), (vector,))[1])
    return along(arrays(nodes), arrays(vector))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_products_are_those_by_hand_and_the_hessian_is_symmetric(name):
    nodes, x, loss = zoo(name)
    own = curvature.hessian(wn.wrap(loss))(nodes, x)
    u, v = random_like(nodes, 1), random_like(nodes, 2)
    along_u, along_v = own(u), own(v)
    expected = by_hand(loss, nodes, x, v)
    assert own.size == sum(leaf.size for leaf in arrays(nodes))
    largest = max(float(abs(leaf).max()) for leaf in expected)
    assert np.isfinite(largest)
    limit = 0.05 if "bfloat16" in name else 2e-4
    for found, leaf in zip(arrays(along_v), expected, strict=True):
        np.testing.assert_allclose(found, leaf, atol=limit * largest, rtol=0)
    if name == "plain_custom_jvp":
        return  # its rule says twice the derivative, and what that is the gradient of has no Hessian
    size = np.sqrt(vdot(u, u) * vdot(along_v, along_v))
    np.testing.assert_allclose(vdot(u, along_v), vdot(v, along_u), atol=limit * size, rtol=0)


@pytest.mark.parametrize(("name", "dtype"), NO_REAL_NUMBERS.items())
def test_arrays_without_useful_derivatives_are_named(name, dtype):
    nodes, x, loss = zoo(name)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, leaf in of_dtype(nodes, dtype)]
    with pytest.raises(ValueError, match=rf"dtype {dtype}") as caught:
        curvature.hessian(wn.wrap(loss))(nodes, x)
    assert f"'{paths[0]}'" in str(caught.value)


def of_dtype(tree, dtype):
    return [pair for pair in jax.tree_util.tree_leaves_with_path(tree) if getattr(pair[1], "dtype", None) == dtype]


@pytest.mark.parametrize("name", NO_FORWARD_MODE)
def test_a_model_without_forward_mode_is_said(name):
    nodes, x, loss = zoo(name)
    with pytest.raises(ValueError, match="custom_vjp"):
        curvature.gauss_newton(wn.wrap(ZOO[name]().fn), lambda outputs, x: jnp.mean(outputs**2))(nodes, x)
    assert isinstance(loss(wn.reconstruct(nodes), x), jax.Array)


def test_functions_among_the_leaves_stay_out_of_products():
    nodes, x, loss = zoo("equinox_mlp")
    own = curvature.hessian(wn.wrap(loss))(nodes, x)
    product = own(random_like(nodes, 1))
    assert callable(nodes.activation)
    assert product.activation is None
    again = own(product)  # what it returns is a vector, too
    assert jax.tree.structure(again) == jax.tree.structure(product)


@pytest.mark.slow
def test_all_that_is_made_of_products_takes_functions_among_the_leaves():
    nodes, x, _ = zoo("equinox_mlp")
    fisher = curvature.fisher(wn.wrap(ZOO["equinox_mlp"]().fn), "normal")(nodes, x)
    key = jax.random.key(0)
    dense = np.asarray(fisher.dense())
    exact = np.linalg.eigvalsh(dense)
    found = curvature.eigenvalues(fisher, key, steps=60)
    np.testing.assert_allclose(found.values[-1], exact[-1], rtol=1e-3)
    assert np.isfinite(curvature.spectral_density(fisher, key, steps=5).values).all()
    trace = curvature.trace(fisher, key, probes=100)
    assert abs(trace.value - np.trace(dense)) < 5 * trace.standard_error
    assert curvature.diagonal(fisher, key, probes=3).value.activation is None
    assert curvature.natural_gradient(fisher, random_like(nodes, 1), damping=1.0).converged
