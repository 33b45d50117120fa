"""Arrays that a function closes over: data beside random keys, and else told of where a weight is left out for them."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import wn_jax as wn
import wn_jax.nnx
from wn_jax._program.notes import Reason

X = jax.random.normal(jax.random.key(0), (5, 4))
PARAMS = {"first": jnp.ones((4, 6)), "second": jnp.ones((6, 2))}
BOTH = {"first": (-2,), "second": (-2,)}
KEYS = {
    "typed": jax.random.key(0),
    "raw": jax.random.PRNGKey(0),
    "several": jax.random.split(jax.random.key(0), 3),
    "several raw": jax.random.split(jax.random.PRNGKey(0), 3),
    "another implementation": jax.random.key(0, impl="rbg"),
}


@pytest.fixture(autouse=True)
def silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def one(key):
    """One key, of one or of several."""
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key.reshape(-1)[0] if typed else key.reshape(-1, 2)[0]


def dropped(p, key):
    h = X @ p["first"]
    return (h * jax.random.bernoulli(one(key), 0.5, h.shape)) @ p["second"]


@pytest.mark.parametrize("name", KEYS)
def test_beside_random_keys_it_is_data(name):
    assert wn.infer_axes(dropped)(PARAMS, KEYS[name]) == BOTH
    rngs = {"dropout": KEYS[name], "noise": KEYS["raw"]}
    assert wn.infer_axes(lambda p, rngs=None: dropped(p, rngs["dropout"]))(PARAMS, rngs=rngs) == BOTH
    abstract = jax.eval_shape(lambda key: key, KEYS[name])
    assert wn.infer_axes(dropped)(PARAMS, abstract) == BOTH


def test_a_loss_over_a_batch_that_it_closes_over_with_a_key():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.Dropout(0.5, deterministic=False)(nn.Dense(6)(x)))

    net = Net()
    variables = net.init({"params": KEYS["typed"], "dropout": KEYS["typed"]}, X)
    axes = wn.infer_axes(lambda variables, rngs: net.apply(variables, X, rngs=rngs))(
        variables, {"dropout": KEYS["raw"]}
    )
    assert axes == {"params/Dense_0/kernel": (-2,), "params/Dense_1/kernel": (-2,)}


def test_words_that_are_no_keys_are_data():
    """Of three words, so no key: what is closed over is no data then."""

    def model(p, words):
        return (X @ p["first"]).sum() + words.astype(jnp.float32) @ jnp.ones((3, 6)) @ p["second"]

    uses = {use.path: use.reason for use in wn.weight_uses(model)(PARAMS, jnp.ones((5, 3), jnp.uint32))}
    assert uses["first"] in (Reason.NO_DATA, Reason.CLOSED_OVER)
    assert uses["second"] is None


def closed_over(p, x):
    """`first` meets what may be data; `second` meets data."""
    return (X @ p["first"]).sum() + x @ p["second"]


def test_a_leaf_that_is_left_out_for_an_array_that_is_closed_over_is_told():
    x = jnp.ones((3, 6))
    with pytest.warns(UserWarning, match=r"left out 'first': closed_over contracts .* pass them as an argument"):
        assert wn.infer_axes(closed_over)(PARAMS, x) == {"second": (-2,)}
    uses = {use.path: use.reason for use in wn.weight_uses(closed_over)(PARAMS, x)}
    assert uses == {"first": Reason.CLOSED_OVER, "second": None}


def test_it_is_told_through_what_is_done_to_the_array():
    def model(p, x):
        inner = jax.jit(lambda rows: jnp.tanh(rows[1:] * 2).reshape(2, 2, 4))(X)
        return jax.lax.scan(lambda h, rows: (h + (rows @ p["first"]).sum(), None), 0.0, inner)[0] + x @ p["second"]

    with pytest.warns(UserWarning, match="'first'"):
        assert wn.infer_axes(model)(PARAMS, jnp.ones((3, 6))) == {"second": (-2,)}


def test_it_is_told_for_models_of_nnx():
    def call(model, x):
        return model["first"](X).sum() + model["second"](x)

    model = nnx.Dict(first=nnx.Linear(4, 6, rngs=nnx.Rngs(0)), second=nnx.Linear(6, 2, rngs=nnx.Rngs(1)))
    with pytest.warns(UserWarning, match="'first/kernel'"):
        assert wn_jax.nnx.infer_axes(call)(model, jnp.ones((3, 6))) == {"second/kernel": (-2,)}


def test_nothing_is_told_where_other_uses_prove_the_weight():
    def model(p, x):
        return (X @ p["first"]).sum() + x @ p["first"] @ p["second"]

    assert wn.infer_axes(model)(PARAMS, jnp.ones((3, 4))) == BOTH


def test_nothing_is_told_of_constants_that_the_program_computes():
    def model(p, x):
        return (jnp.linspace(0, 1, 4)[None] @ p["first"]).sum() + x @ p["second"]

    wn.infer_axes(model)(PARAMS, jnp.ones((3, 6)))  # and no warning
