"""The documentation of each framework runs, and its recipes train the zoo's models as the functional reference does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wn_jax as wn
from tests.docs.documents import run
from tests.zoo import ZOO

STEPS = 20
RATE = 0.01
QUICK = ("nnx_mlp", "haiku_mlp")
OBJECTS = [name for name in ZOO if name.startswith(("nnx", "equinox", "haiku"))]
guide = functools.cache(run)


@pytest.mark.parametrize("name", ["linen", "nnx", "equinox", "haiku", "scaling"])
def test_the_guide_runs(name):
    guide(f"docs/{name}.md")


def params_of(tree):
    """Its trainable arrays, as a list, and what puts a list back: all real ones but running statistics."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree)

    def trained(path, leaf):
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating) and not {"mean", "var"} & {*names}

    places = [i for i, pair in enumerate(pairs) if trained(*pair)]

    def put(values):
        leaves = [leaf for _, leaf in pairs]
        for i, value in zip(places, values, strict=True):
            leaves[i] = value
        return jax.tree_util.tree_unflatten(treedef, leaves)

    return [pairs[i][1] for i in places], put


def loss_by_reference(model, y):
    """The loss after the steps of SGD on (g, v) with nothing but JAX and `reconstruct`."""
    values, put = params_of(wn.reparameterize(model.params, model.axes))

    def loss(values):
        return jnp.mean((model.fn(wn.reconstruct(put(values)), model.x) - y) ** 2)

    step = jax.jit(lambda values: [v - RATE * g for v, g in zip(values, jax.grad(loss)(values), strict=True)])
    for _ in range(STEPS):
        values = step(values)
    return float(jax.jit(loss)(values))


def loss_by_recipe(name, model, y):
    tx = optax.sgd(RATE)
    if name.startswith("nnx"):
        trained = guide("docs/nnx.md")["train"](model.module(), tx, model.x, y, STEPS)
        outputs = trained(model.x)
    elif name.startswith("equinox"):
        trained = guide("docs/equinox.md")["train"](model.params, model.fn, tx, model.x, y, STEPS)
        outputs = model.fn(wn.reconstruct(trained), model.x)
    else:
        trained = guide("docs/haiku.md")["train"](model.fn, model.params, tx, model.x, y, STEPS)
        outputs = wn.wrap(model.fn)(trained, model.x)
    return float(jnp.mean((outputs - y) ** 2))


@pytest.mark.parametrize(
    "name",
    [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OBJECTS[::2] if name not in QUICK)],
)
def test_the_recipe_ends_at_the_loss_of_the_functional_reference(name):
    model = ZOO[name]()
    before = model.fn(model.params, model.x)
    y = np.random.default_rng(0).standard_normal(before.shape).astype(np.float32)
    expected = loss_by_reference(model, y)
    assert expected < 0.999 * float(jnp.mean((before - y) ** 2))
    half = name == "nnx_mixed_bfloat16"
    np.testing.assert_allclose(loss_by_recipe(name, model, y), expected, rtol=1e-2 if half else 1e-5)
