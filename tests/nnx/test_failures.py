"""A failure to run a model by its program: the weights are rebuilt in place, with a warning; never in silence."""

import gc
import warnings
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors, nnx

from tests.nnx.net import AXES, Net, X, arrays, call
from wn_jax.nnx import WeightNormed, _program_call

AXES_OF_LINEAR = {"linear/kernel": -2}


def made(scale="auto", **methods):
    """A plain and a wrapped model of a class that no other test has, as a class is warned of once."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x):
            return self.linear(x)

    for name, method in methods.items():
        setattr(Model, name, method)
    plain = Model(nnx.Rngs(0))
    return plain, WeightNormed(plain, AXES_OF_LINEAR, scale=scale)


def add_attribute(self, x):
    self.cache = nnx.Cache(self.linear(x))
    return self.cache[...]


def return_variable(self, x):
    return self.linear(x), self.linear.bias


def branch(self, x):
    return self.linear(x) if x.sum() > -1e9 else x


def jitted(model, name):
    return nnx.jit(lambda model, x: getattr(model, name)(x))(model, X)


@pytest.mark.parametrize("scale", ["auto", "output"])
def test_more_than_a_program_is_said_once_a_method(scale):
    plain, wrapped = made(scale, add_attribute=add_attribute, return_variable=return_variable)
    with pytest.warns(UserWarning, match=r"(?s)Model\.add_attribute.*changes its structure.*scale=\"weight\"") as told:
        np.testing.assert_allclose(jitted(wrapped, "add_attribute"), jitted(plain, "add_attribute"), rtol=1e-5)
    assert [warning.filename for warning in told] == [__file__]  # the line of whoever calls the model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jitted(wrapped, "add_attribute")
        jitted(WeightNormed(plain, AXES_OF_LINEAR, scale=scale), "add_attribute")
    with pytest.warns(UserWarning, match=r"Model\.return_variable.*returns an NNX object"):
        nnx.jit(lambda model, x: model.return_variable(x)[0])(wrapped, X)


@pytest.mark.parametrize("name", ["__call__", "add_attribute", "branch"])
def test_nothing_is_said_where_nothing_failed(name):
    _, wrapped = made("auto" if name == "__call__" else "weight", add_attribute=add_attribute, branch=branch)
    transform = nnx.grad if name == "branch" else nnx.jit
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transform(lambda model, x: jnp.sum(getattr(model, name)(x)))(wrapped, X)


def test_a_model_that_branches_on_values_is_told_so():
    plain, wrapped = made(branch=branch)

    def gradients(model):
        return nnx.grad(lambda model, x: jnp.sum(model.branch(x)))(model, X)["linear" if model is plain else "model"]

    with pytest.warns(UserWarning, match=r"Model\.branch.*TracerBoolConversionError: Attempted boolean conversion"):
        found = gradients(wrapped)
    np.testing.assert_allclose(found["linear"]["bias"][...], gradients(plain)["bias"][...], rtol=1e-6)


@pytest.mark.parametrize("error", [RuntimeError, AttributeError, AssertionError])
def test_a_failure_of_the_program_path_itself_is_told(error, monkeypatch):
    def broken(*args, **kwargs):
        raise error("a piston is stuck\nand more lines")

    monkeypatch.setattr(_program_call, "wrap", lambda fn, **_: broken)
    plain, wrapped = made()
    with pytest.warns(UserWarning, match=f"Model.*{error.__name__}: a piston is stuck"):
        np.testing.assert_allclose(jitted(wrapped, "__call__"), jitted(plain, "__call__"), rtol=1e-5)


@pytest.mark.parametrize("scale", ["auto", "output", "weight"])
def test_the_model_s_own_error_is_raised_as_it_is(scale):
    def wrong(self, x):
        raise LookupError(f"kernel: {type(self.linear.kernel).__name__}")

    _, wrapped = made(scale, wrong=wrong)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(LookupError, match="kernel: Param") as caught:
            jitted(wrapped, "wrong")
    assert caught.value.__context__ is None
    assert caught.traceback[-1].name == "wrong"


def test_the_error_with_the_weights_in_place_is_the_one_that_counts():
    seen = []

    def differs(self, x):
        seen.append(x)
        raise (LookupError, ValueError)[len(seen) - 1]("the model says so")

    _, wrapped = made(differs=differs)
    with pytest.raises(ValueError, match="the model says so"):
        jitted(wrapped, "differs")


def test_a_write_that_nnx_refuses_leaves_all_variables():
    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.net = Net(rngs)

        def __call__(self, x, rngs):
            return self.net(x + jax.random.normal(rngs.noise(), x.shape))

    wrapped = WeightNormed(Noisy(nnx.Rngs(0)), {f"net/{path}": axes for path, axes in AXES.items()}, scale="auto")
    before, counts = arrays(wrapped), []

    def closure(x):
        rngs = nnx.Rngs(noise=0)
        with pytest.raises(errors.TraceContextError) as caught:
            wrapped(x, rngs)
        counts.append(rngs.noise.count[...])
        return caught.value

    def count(x):
        closure(x)
        return counts[0]

    assert int(jax.jit(count)(X)) == 1  # as the model itself leaves it: it drew a number, and then failed
    assert arrays(wrapped) == before


def test_what_was_said_keeps_no_class_alive():
    _, wrapped = made(add_attribute=add_attribute)
    with pytest.warns(UserWarning, match="changes its structure"):
        jitted(wrapped, "add_attribute")
    assert weakref.ref(type(wrapped.model)) in _told_of()


def _told_of():
    gc.collect()
    return _program_call._told.keyrefs()


def test_parts_warn_by_their_own_class():
    plain, _ = made(add_attribute=add_attribute)
    outer = nnx.Sequential(nnx.clone(plain), jnp.tanh)
    part = WeightNormed(outer, {"layers/0/linear/kernel": -2}, scale="auto")
    with pytest.warns(UserWarning, match=r"Model\.add_attribute"):
        nnx.jit(lambda model, x: model.layers[0].add_attribute(x))(part, X)
    assert nnx.jit(call)(part, X).shape == (8, 4)
