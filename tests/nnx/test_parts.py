"""The parts of a `WeightNormed` besides its call: methods, parts, attributes; and odd modules."""

import threading

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import wn_jax as wn
from tests.nnx.net import X, arrays, call, is_whole
from wn_jax.nnx import WeightNormed


def test_methods_and_parts_are_called_on_the_object(plain, wrapped):
    plain.eval()
    wrapped.eval()
    np.testing.assert_allclose(wrapped.features(X), plain.features(X), atol=1e-6)
    np.testing.assert_allclose(wrapped.first(X), plain.first(X), atol=1e-6)
    np.testing.assert_allclose(wrapped.layers[0](plain.first(X)), plain.layers[0](plain.first(X)), atol=1e-6)
    assert wrapped.dropout is wrapped.model.dropout  # nothing to rebuild in it
    sequential = WeightNormed(nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.relu), {"layers/0/kernel": -2})
    assert sequential.layers[0](X).shape == (8, 3)
    assert [layer(plain.first(X)).shape for layer in wrapped.layers] == [(8, 6), (8, 2)]
    assert (len(wrapped.layers), bool(wrapped), plain.layers[0] in wrapped.layers) == (2, True, False)
    assert isinstance(wrapped.first, nnx.Module)  # a view, of the same parameters
    optimizer = nnx.Optimizer(wrapped.first, optax.sgd(0.1), wrt=nnx.Param)
    before = arrays(wrapped)
    optimizer.update(wrapped.first, nnx.grad(lambda first: jnp.sum(first(X) ** 2))(wrapped.first))
    assert {path[1] for path, value in arrays(wrapped).items() if value != before[path]} == {"first"}
    for name in ("missing", "__name__"):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
            getattr(wrapped, name)


def test_attributes_are_those_of_the_model():
    class Gained(nnx.Module):
        act = staticmethod(jnp.tanh)

        def __init__(self, rngs):
            self.linear, self.gain, self.scale = nnx.Linear(4, 3, rngs=rngs), 1.0, nnx.LayerNorm(3, rngs=rngs)

        @property
        def length(self):
            return jnp.linalg.norm(self.linear.kernel[...])

        def __call__(self, x):
            return self.gain * self.act(self.linear(x))

    plain = Gained(nnx.Rngs(0))
    wrapped = WeightNormed(plain, {"linear/kernel": -2})
    for model in (plain, wrapped):
        model.gain = 5.0
        model.linear.bias = nnx.Param(jnp.ones(3))
        model.set_attributes(gain=3.0)
    assert wrapped.gain == wrapped.model.gain == 3
    np.testing.assert_array_equal(wrapped(X), plain(X))
    np.testing.assert_array_equal(wrapped.scale(wrapped(X)), plain.scale(plain(X)))
    np.testing.assert_array_equal(wrapped.length, plain.length)
    np.testing.assert_array_equal(wrapped.act(X), plain.act(X))


def test_cycles_containers_and_weights_that_move():
    class Odd(nnx.Module):
        def __init__(self, rngs):
            self.me = self
            self.weights = nnx.List([nnx.Param(jnp.eye(4) * i) for i in (1.0, 2.0)])
            self.named = nnx.Dict(a=nnx.Linear(4, 4, rngs=rngs), b=nnx.Linear(4, 4, rngs=rngs))

        def __call__(self, x):
            self.weights.append(self.weights.pop(0))
            self.named.a, self.named.b = self.named.b, self.named.a
            return self.me.named.a(x) @ self.weights[0][...]

    plain = Odd(nnx.Rngs(0))
    axes = {"weights/0": -2, "weights/1": -2, "named/a/kernel": -2, "named/b/kernel": -2}
    for scale in ("weight", "auto"):
        wrapped, model = WeightNormed(plain, axes, scale=scale), nnx.clone(plain)
        call_ = nnx.jit(call)
        for _ in range(3):
            np.testing.assert_allclose(call_(wrapped, X), call_(model, X), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(wrapped(X), model(X), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(wrapped.plain().weights[0][...], model.weights[0][...])
        assert all(isinstance(weight, wn.WeightNorm) for weight in wrapped.model.weights)


def test_params_with_a_getter_of_their_own():
    class Exponential(nnx.Param):
        def get_value(self, **kwargs):
            return jnp.exp(super().get_value(**kwargs))

    plain = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    plain.kernel = Exponential(plain.kernel[...])
    for scale in ("weight", "auto"):
        wrapped = WeightNormed(plain, {"kernel": -2}, scale=scale)
        for model in (wrapped, wrapped.plain()):
            np.testing.assert_allclose(nnx.jit(call)(model, X), plain(X), rtol=1e-5)


def test_views_capture_and_new_attributes_reach_the_model(wrapped):
    class Sowing(nnx.Module):
        def __init__(self, rngs):
            self.linear, self.dropout = nnx.Linear(4, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            self.sow(nnx.Intermediate, "seen", self.linear(x))
            self.calls = getattr(self, "calls", 0) + 1
            return self.dropout(self.linear(x))

    model = WeightNormed(Sowing(nnx.Rngs(0)), {"linear/kernel": -2})
    view = nnx.view(model, deterministic=True)
    assert view.model.dropout.deterministic
    assert not model.model.dropout.deterministic
    outputs, seen = nnx.capture(view, nnx.Intermediate)(X)
    np.testing.assert_allclose(seen["model"]["seen"].get_value()[0], outputs, atol=1e-6)
    assert view.model.calls == 1


def test_an_error_in_the_model_leaves_the_nodes(wrapped):
    with pytest.raises(TypeError, match="dot_general"):
        wrapped(jnp.ones((2, 5)))
    assert is_whole(wrapped)


def test_threads_take_turns(wrapped):
    wrapped.eval()
    expected, found = wrapped(X), []

    def work():
        for _ in range(10):
            found.append(wrapped(X))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 40
    assert all((y == expected).all() for y in found)
    assert is_whole(wrapped)
