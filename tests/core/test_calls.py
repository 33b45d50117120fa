"""First guesses at the calls: each of them gets one error, which shows the call that works."""

import functools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import wn_jax as wn

X = jnp.ones((2, 4))
LINEN = nn.Dense(3)
PARAMS = LINEN.init(jax.random.key(0), X)
NODES = wn.reparameterize(PARAMS, {"params/kernel": -2})
EQUINOX = eqx.nn.Linear(4, 3, key=jax.random.key(0))
NNX = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
HAIKU = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(3)(x)))

READERS = [wn.infer_axes, wn.weight_uses, wn.init_from_data]


def message(call):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert len(str(caught.value)) < 400
    return str(caught.value)


@pytest.mark.parametrize("function", [*READERS, wn.wrap])
@pytest.mark.parametrize(
    ("model", "got", "call"),
    [
        (LINEN, "the Linen module Dense itself", "{name}(model.apply)(params, x)"),
        (
            EQUINOX,
            "the Equinox module Linear itself",
            "{name}(lambda model, x: jax.vmap(model)(x))(model, x). (Where it takes parameters, pass its __call__)",
        ),
        (HAIKU, "a Transformed", "{name}(model.apply)(params, ...)"),
        (PARAMS, "dict", "{name}(model.apply)(params, x)"),
        (NNX, "the NNX module Linear itself", "{name}(lambda model, x: model(x))(model, x)"),
    ],
)
def test_a_model_in_the_place_of_a_function(function, model, got, call):
    name = function.__name__
    if model is NNX and function is wn.wrap:
        call = "wn_jax.nnx.WeightNormed(model, axes)"
    expected = f"{name} takes a function, such as model.apply; got {got}: call {call.format(name=name)}"
    assert message(lambda: function(model)) == expected


@pytest.mark.parametrize("function", [*READERS, wn.wrap])
@pytest.mark.parametrize("rest", [(PARAMS,), (NODES, X), (NNX, X), (EQUINOX, X, X)])
def test_the_parameters_beside_the_function(function, rest):
    text = message(lambda: function(LINEN.apply, *rest))
    assert f"{function.__name__}(model.apply)(params, x); got a {type(rest[0]).__name__} beside the function" in text


@pytest.mark.parametrize("function", [wn.nnx.infer_axes, wn.nnx.init_from_data])
def test_of_nnx(function):
    def call(model, x):
        return model(x)

    name = function.__name__
    assert f"call {name}(lambda model, x: model(x))(model, x)" in message(lambda: function(NNX))
    assert f"{name}(model.apply)(params, x); got a Linear beside" in message(lambda: function(call, NNX, X))


def test_the_calls_that_are_shown_work():
    assert wn.infer_axes(LINEN.apply)(PARAMS, X) == {"params/kernel": (-2,)}
    assert wn.infer_axes(lambda model, x: jax.vmap(model)(x))(EQUINOX, X) == {"weight": (-1,)}
    assert wn.infer_axes(HAIKU.apply)(HAIKU.init(jax.random.key(0), X), X) == {"linear/w": (-2,)}
    assert wn.infer_axes(lambda model, x: model(x))(NNX, X) == {"kernel": (-2,)}
    assert wn.nnx.WeightNormed(NNX, {"kernel": -2})(X).shape == (2, 3)


class Loss(eqx.Module):
    """An Equinox module that is a function of parameters, and holds no arrays."""

    power: int

    def __call__(self, params, x):
        return (x @ params["kernel"]) ** self.power


class Shifted(eqx.Module):
    """One that holds arrays beside."""

    shift: jax.Array

    def __call__(self, params, x):
        return x @ params["kernel"] + self.shift


@pytest.mark.parametrize(
    "function",
    [
        Shifted(jnp.ones(3)).__call__,
        Loss(2),
        eqx.filter_jit(Loss(2)),
        eqx.Partial(lambda y, params, x: x @ params["kernel"] + y, jnp.ones(3)),
        functools.partial(lambda params, x: x @ params["kernel"]),
        jax.jit(lambda params, x: x @ params["kernel"]),
        jax.tree_util.Partial(lambda y, params, x: x @ params["kernel"] + y, jnp.ones(3)),
    ],
)
def test_callable_objects_that_are_functions_of_parameters_are_none_of_these(function):
    params = {"kernel": jnp.ones((4, 3))}
    assert wn.infer_axes(function)(params, X) == {"kernel": (-2,)}
    nodes = wn.reparameterize(params, {"kernel": -2})
    np.testing.assert_allclose(wn.wrap(function)(nodes, X), function(params, X), rtol=1e-6)


def test_the_data_in_the_place_of_the_parameters():
    for call in (wn.infer_axes(LINEN.apply), wn.wrap(LINEN.apply)):
        with pytest.raises(TypeError) as caught:
            call(X, PARAMS)
        (note,) = [note for note in caught.value.__notes__ if "first argument" in note]
        assert "it is an array of shape (2, 4): call it with the parameters first" in note


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (
            lambda: wn.reparameterize(LINEN, {"params/kernel": -2}),
            "params is a Dense, and no tree of arrays.*model.init",
        ),
        (lambda: wn.reparameterize(LINEN.apply, {"params/kernel": -2}), "params is a method, and no tree of arrays"),
        (lambda: wn.reparameterize(PARAMS, wn.infer_axes(LINEN.apply)), r"got a str.*infer_axes\(fn\)\(params, ...\)"),
        (
            lambda: wn.reparameterize(PARAMS, wn.kernel_axes),
            r"reparameterize\(params, kernel_axes\(params\)\)",
        ),
        (lambda: wn.wrap(LINEN.apply, strict="no"), "strict must be True or False; got 'no'"),
        (lambda: wn.infer_axes(LINEN.apply)(), "argument 0 must be the parameters, by position"),
        (lambda: wn.infer_axes(3), "infer_axes takes a function, such as model.apply; got int"),
    ],
)
def test_other_slips(call, expected):
    with pytest.raises((TypeError, ValueError), match=expected):
        call()


class Variable:
    """Something that stands for an array, as a variable of Keras does, and is no leaf that JAX traces."""

    shape, dtype, ndim = (4, 3), jnp.float32, 2

    def __jax_array__(self):
        return jnp.ones((4, 3))


def test_variables_of_keras_are_no_arrays():
    def call(params, x):
        return x @ jnp.asarray(params["kernel"])

    params = {"kernel": Variable()}
    for function in (wn.infer_axes(call), wn.weight_uses(call)):
        with pytest.raises(TypeError, match=r"'kernel' is a Variable, and not the array in it; .*variable.value"):
            function(params, X)
    with pytest.raises(TypeError, match="'kernel' is a Variable, and not the array in it"):
        wn.reparameterize(params, {"kernel": -2})


def test_a_node_says_that_it_is_no_array():
    node = NODES["params"]["kernel"]
    assert not hasattr(node, "shape")
    for name in ("shape", "ndim", "value"):
        with pytest.raises(AttributeError, match=rf"'WeightNorm' object has no attribute '{name}'.*node.weight\(\)"):
            getattr(node, name)
    with pytest.raises(AttributeError, match=r"no attribute '__array__'$"):
        node.__array__()
