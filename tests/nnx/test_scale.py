"""Where a `WeightNormed` puts the scale, and that a model that is more than a program of arrays keeps working."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.nnx.net import AXES, Net, X, arrays
from tests.zoo import ZOO
from tests.zoo.arrays import equations
from wn_jax.nnx import WeightNormed

SCALES = ("auto", "output", "weight")
each_scale = pytest.mark.parametrize("scale", ["auto", pytest.param("output", marks=pytest.mark.slow), "weight"])


def products(model, x):
    """The shapes of what is multiplied elementwise when the model runs under `jit`."""
    graph, state = nnx.split(model)
    jaxpr = jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(x))(state, x).jaxpr
    return {eqn.outvars[0].aval.shape for eqn in equations(jaxpr) if str(eqn.primitive) == "mul"}


def test_the_scale_goes_where_there_are_fewer_numbers():
    layer = nnx.Linear(16, 16, use_bias=False, rngs=nnx.Rngs(0))
    layer.raw = jnp.ones(3)  # an array that is no Variable is in nobody's way
    found = {scale: WeightNormed(layer, {"kernel": -2}, scale=scale) for scale in SCALES}
    small, large = jnp.ones((4, 16)), jnp.ones((64, 16))
    assert {scale: products(model, small) for scale, model in found.items()} == {
        "auto": {(4, 16)},
        "output": {(4, 16)},
        "weight": {(16, 16)},
    }
    assert {scale: products(model, large) for scale, model in found.items()} == {
        "auto": {(16, 16)},
        "output": {(64, 16)},
        "weight": {(16, 16)},
    }
    with pytest.raises(ValueError, match="scale must be"):
        WeightNormed(layer, {"kernel": -2}, scale="both")


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("nnx_mlp", "nnx_scan") else pytest.param(name, marks=pytest.mark.slow)
        for name in ZOO
        if name.startswith("nnx") and name != "nnx_mixed_bfloat16"
    ],
)
def test_all_sides_agree_in_values_gradients_and_what_the_model_changed(name):
    zoo = ZOO[name]()
    models = {scale: WeightNormed(zoo.module(), zoo.axes, scale=scale) for scale in SCALES}
    step = nnx.jit(nnx.value_and_grad(lambda model: jnp.sum(model(zoo.x) ** 2)))
    found = {scale: jax.tree.leaves((step(model), nnx.state(model))) for scale, model in models.items()}
    for scale in ("auto", "output"):
        for a, b in zip(found[scale], found["weight"], strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4)


@each_scale
def test_statistics_and_random_keys_move_inside_jit(scale):
    plain = Net(nnx.Rngs(0))
    wrapped = WeightNormed(plain, AXES, scale=scale)
    call = nnx.jit(lambda model, x: model(x))
    before = arrays(wrapped)
    for _ in range(3):
        np.testing.assert_allclose(call(wrapped, X), call(plain, X), atol=1e-5)
    np.testing.assert_allclose(wrapped.model.norm.mean[...], plain.norm.mean[...], atol=1e-6)
    assert int(wrapped.model.dropout.rngs.count[...]) == 3
    changed = {path[1:] for path, value in arrays(wrapped).items() if value != before[path]}
    assert changed == {("norm", "mean"), ("norm", "var"), ("dropout", "rngs", "count")}


class Particular(nnx.Module):
    """A model that holds and does things that a program of arrays does not tell."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.kept = nnx.Variable(jnp.zeros(()))
        self.raw = jnp.ones(4)

    def add_attribute(self, x):
        x = self.linear(x)
        self.cache = nnx.Cache(x)
        return x

    def count(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return self.linear(x)

    def return_variable(self, x):
        self.kept[...] += 1
        return self.linear(x) + self.kept[...], self.kept

    def return_text(self, x):
        return {"y": self.linear(x), "kind": "text"}

    def take_rngs(self, x, rngs, scale=1.0, name="a"):
        return scale * self.linear(x) + jax.random.normal(rngs.noise(), x.shape) + len(name)

    def write_into(self, x, seen, cache):
        seen.append(self.linear(x))
        cache["x"] = x
        return seen[-1]

    def same(self, query, key):
        return self.linear(query) * (2.0 if query is key else 1.0)

    def sow_it(self, x):
        x = self.linear(x)
        self.sow(nnx.Intermediate, "seen", x)
        return x


def written(model, x):
    seen, cache = [], {}
    y = model.write_into(x, seen, cache=cache)
    return y + sum(jnp.sum(z**2) for z in seen) + cache["x"]


CALLS = {
    "write_into": written,
    "same": lambda model, x: model.same(x, x) + model.same(x, x + 1),
    "add_attribute": lambda model, x: (model.add_attribute(x), 0)[0] + getattr(model, "model", model).cache[...],
    "count": lambda model, x: model.count(x) * getattr(model, "model", model).calls,
    "return_variable": lambda model, x: model.return_variable(x)[0] + model.return_variable(x)[1][...],
    "return_text": lambda model, x: model.return_text(x)["y"] * len(model.return_text(x)["kind"]),
    "sow_it": lambda model, x: nnx.capture(lambda model, x: model.sow_it(x), nnx.Intermediate)(model, x)[0],
    "branch": lambda model, x: model.linear(x) if isinstance(x, jax.core.Tracer) or x.sum() > 0 else x,
}


@pytest.mark.parametrize("name", CALLS)
@each_scale
def test_a_model_may_do_what_a_program_does_not_tell(name, scale):
    models = Particular(nnx.Rngs(0)), WeightNormed(Particular(nnx.Rngs(0)), {"linear/kernel": -2}, scale=scale)
    for transform in (nnx.jit, lambda fn: fn):
        plain, wrapped = (transform(CALLS[name])(model, X) for model in models)
        np.testing.assert_allclose(wrapped, plain, rtol=1e-5, atol=1e-5)
    assert getattr(models[1].model, "calls", None) == getattr(models[0], "calls", None)
    np.testing.assert_array_equal(models[1].model.kept[...], models[0].kept[...])


@each_scale
def test_random_keys_and_other_arguments_of_a_call(scale):
    plain = Particular(nnx.Rngs(0))
    wrapped = WeightNormed(plain, {"linear/kernel": -2}, scale=scale)

    @nnx.jit
    def call(model, x, rngs):
        return model.take_rngs(x, rngs, scale=2.0, name="bc") + model.take_rngs(x, rngs=rngs)

    ours, theirs = nnx.Rngs(noise=1), nnx.Rngs(noise=1)
    for _ in range(2):
        np.testing.assert_allclose(call(wrapped, X, ours), call(plain, X, theirs), rtol=1e-5, atol=1e-5)
    assert int(ours.noise.count[...]) == int(theirs.noise.count[...]) == 4


@each_scale
def test_what_is_sown_is_captured(scale):
    model = WeightNormed(Particular(nnx.Rngs(0)), {"linear/kernel": -2}, scale=scale)

    @nnx.jit
    def run(model, x):
        return nnx.capture(lambda model, x: model.sow_it(x), nnx.Intermediate)(model, x)

    y, seen = run(model, X)
    np.testing.assert_array_equal(seen["model"]["seen"].get_value()[0], y)


@each_scale
def test_errors_are_those_of_the_model(scale):
    model = WeightNormed(Net(nnx.Rngs(0)), AXES, scale=scale)
    before = arrays(model)
    with pytest.raises(TypeError, match="dot_general requires contracting dimensions"):
        nnx.jit(lambda model, x: model(x))(model, jnp.ones((2, 5)))
    assert arrays(model) == before
