"""`wrap` around functions that do more than multiply: what has to survive being traced, and what is refused."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import wn_jax as wn
from tests.zoo.arrays import equations

X = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6)), jnp.float32)
both = pytest.mark.parametrize("scale", ["auto", "output"])


def node(*shape, axes=-2):
    v = np.random.default_rng(1).standard_normal(shape)
    made = wn.WeightNorm.from_weight(jnp.asarray(v, jnp.float32), axes)
    return wn.WeightNorm(made.g * 2, made.v * 3, made.axes)


def assert_same(fn, nodes, *args, scale="output", **kwargs):
    got = jax.jit(lambda nodes: wn.wrap(fn, scale=scale)(nodes, *args, **kwargs))(nodes)
    chex.assert_trees_all_close(got, fn(wn.reconstruct(nodes), *args, **kwargs), rtol=1e-5, atol=1e-5)


@both
def test_rows_that_are_looked_up_come_from_the_weight(scale):
    assert_same(lambda p, ids: p["table"][ids] @ p["w"], {"table": node(9, 6), "w": node(6, 3)}, jnp.array([1, 8]))


@both
def test_a_custom_rule_is_kept(scale):
    @jax.custom_vjp
    def double(w, x):
        return x @ w

    double.defvjp(lambda w, x: (x @ w, (w, x)), lambda res, ct: (2 * res[1].T @ ct, ct @ res[0].T))

    def slope(scale):
        fn = wn.wrap(lambda p, x: double(p, x), scale=scale)
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(fn(p, X)))))(node(6, 3))

    chex.assert_trees_all_close(slope(scale), slope("weight"), rtol=1e-5)


def test_a_remat_keeps_its_policy_and_a_scan_stays_a_scan():
    policy = jax.checkpoint_policies.everything_saveable

    def fn(p, x):
        layer = jax.checkpoint(lambda w, x: jnp.tanh(x @ w), policy=policy, prevent_cse=False)
        return jax.lax.scan(lambda x, w: (layer(w, x), None), x, p)[0]

    found = list(equations(jax.make_jaxpr(wn.wrap(fn, scale="output"))(node(5, 6, 6), X).jaxpr))
    (remat,) = [eqn for eqn in found if "policy" in eqn.params]
    assert remat.params["policy"] is policy
    assert remat.params["prevent_cse"] is False
    (scan,) = [eqn for eqn in found if "length" in eqn.params]
    assert scan.params["length"] == 5
    inside = [str(eqn.primitive) for eqn in equations(getattr(scan.params["jaxpr"], "jaxpr", scan.params["jaxpr"]))]
    assert "sqrt" not in inside  # norms are taken once, outside
    assert_same(fn, node(5, 6, 6), X)


@both
def test_what_is_no_array_reaches_the_function_and_comes_back(scale):
    def fn(p, x, *, train, names):
        assert train is True
        y = x @ p["w"]
        return {"y": y, "names": names, "none": None, "mode": "train", "n": 3}

    out = wn.wrap(fn, scale=scale)({"w": node(6, 3)}, X, train=True, names=("a", "b"))
    assert {key: value for key, value in out.items() if key != "y"} == {
        "names": ("a", "b"),
        "none": None,
        "mode": "train",
        "n": 3,
    }
    np.testing.assert_allclose(out["y"], X @ node(6, 3).weight(), rtol=1e-5)


def test_flax_arguments_through_wrap():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x))
            return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(x))

    model = Net()
    variables = model.init(jax.random.key(0), X, train=False)
    axes = wn.infer_axes(model.apply)(variables, X, train=False)
    assert axes == {f"params/Dense_{i}/kernel": (-2,) for i in (0, 1)}
    nodes = wn.reparameterize(variables, axes)
    options = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(2)}}
    y, state = jax.jit(lambda nodes: wn.wrap(model.apply, scale="output")(nodes, X, **options))(nodes)
    expected, expected_state = model.apply(variables, X, **options)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    chex.assert_trees_all_close(state, expected_state, atol=1e-5)


def test_a_module_that_changes_between_calls_is_never_stale():
    layer = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    wrapped = wn.wrap(lambda p, x: layer(x @ p))
    first = wrapped(node(6, 3), X)
    layer.bias.set_value(layer.bias.get_value() + 1.0)
    np.testing.assert_allclose(wrapped(node(6, 3), X), first + 1, rtol=1e-5)


def test_a_function_that_branches_on_values_is_told_of_the_way_out():
    def fn(p, x):
        y = x @ p
        return y if y.sum() > 0 else -y

    with pytest.raises(jax.errors.TracerBoolConversionError, match=r"scale='weight'") as caught:
        wn.wrap(fn)(node(6, 3), X)
    assert any("place the scale" in note for note in caught.value.__notes__)
    assert wn.wrap(fn, scale="weight")(node(6, 3), X).shape == (4, 3)


def test_it_is_traced_once_under_jit():
    wrapped = jax.jit(chex.assert_max_traces(lambda p, x: wn.wrap(lambda p, x: x @ p)(p, x), n=1))
    for _ in range(3):
        wrapped(node(6, 3), X)


def test_two_trees_of_parameters():
    def fn(a, x, b):
        return x @ a["w"] @ b["w"]

    first, second = {"w": node(6, 5)}, {"w": node(5, 3)}
    got = jax.jit(wn.wrap(fn, argnums=(0, 2), scale="output"))(first, X, second)
    np.testing.assert_allclose(got, X @ first["w"].weight() @ second["w"].weight(), rtol=1e-4)


def test_a_node_of_another_kind_and_a_node_inside_it():
    """`wrap` knows the protocol only. Here, a low-rank update inside a weight norm, as DoRA is."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class LowRank:
        base: jax.Array
        a: jax.Array
        b: jax.Array

        def weight(self):
            return self.base + self.a @ self.b

        def factors(self):
            return self.weight(), jnp.ones((1, self.base.shape[1]))

    inner = LowRank(node(6, 3).v, node(6, 2).v, node(2, 3).v)
    outer = wn.WeightNorm(jnp.array([[1.0, 2.0, 3.0]]), inner, (-2,))
    assert_same(lambda p, x: x @ p, outer, X)
    assert_same(lambda p, x: x @ p, inner, X)


def test_float16_takes_the_weight_where_the_output_would_overflow():
    big = wn.WeightNorm(jnp.ones((1, 3)), jnp.full((600, 3), 300, jnp.float16), (-2,))
    x = jnp.full((2, 600), 2, jnp.float16)
    y = jax.jit(wn.wrap(lambda p, x: x @ p, scale="output"))(big, x)
    np.testing.assert_allclose(y, np.full((2, 3), 2 * 600**0.5), rtol=2e-3)


@both
def test_a_number_that_is_returned_is_an_array(scale):
    _, auxiliary = wn.wrap(lambda p, x: (x @ p, jnp.zeros(())), scale=scale)(node(6, 3), X)
    assert auxiliary.astype(jnp.bfloat16).dtype == jnp.bfloat16
    assert isinstance(auxiliary, jax.Array)
