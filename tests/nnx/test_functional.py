"""NNX objects and trees with nodes: `infer_axes`, `init_from_data`, `split`, `update`, `on_nodes`; and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import wn_jax as wn
from tests.nnx.net import AXES, Net, X, arrays, call
from tests.zoo import ZOO
from wn_jax import nnx as wnx
from wn_jax import optim


def test_axes_of_a_module_with_shared_layers(plain, wrapped):
    before = arrays(plain)
    assert wnx.infer_axes(call)(plain, X) == AXES
    assert arrays(plain) == before
    assert wnx.infer_axes(call)(wrapped, X) == AXES
    assert wnx.infer_axes(lambda model, x: model.features(x))(plain, X) == {"first/kernel": (-2,)}


@pytest.mark.parametrize(
    "name", ["nnx_mlp", "nnx_cnn", pytest.param("nnx_attention", marks=pytest.mark.slow), "nnx_scan"]
)
def test_the_object_and_the_functional_way_have_one_function_and_one_gradient(name):
    model = ZOO[name]()
    wrapped = wnx.WeightNormed(model.module(), model.axes)
    nodes = wn.reparameterize(model.params, model.axes)
    graph, params = wnx.split(wrapped)
    assert jax.tree.structure(params) == jax.tree.structure(nodes)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(nodes), strict=True):
        np.testing.assert_array_equal(a, b)

    def loss(apply):
        return jax.jit(lambda params: jnp.sum(apply(params, model.x) ** 2))

    merged = wn.wrap(lambda params, x: nnx.merge(graph, params)(x))
    np.testing.assert_allclose(loss(merged)(params), loss(wn.wrap(model.fn))(nodes), rtol=1e-6)
    np.testing.assert_allclose(loss(call)(wrapped), loss(wn.wrap(model.fn))(nodes), rtol=1e-5)


def test_update_takes_values_back(wrapped):
    graph, params = wnx.split(wrapped)
    before = arrays(wrapped)
    doubled = jax.tree.map(lambda x: 2 * x if jnp.issubdtype(x.dtype, jnp.floating) else x, params)
    assert arrays(wrapped) == before  # the state is a copy
    wnx.update(wrapped, doubled)
    np.testing.assert_array_equal(wrapped.model.first.kernel.g[...], doubled["first"]["kernel"].g[...])
    np.testing.assert_array_equal(wrapped.model.norm.scale[...], 2 * jnp.ones(6))
    assert wrapped.model.again is wrapped.model.layers[0]
    rebuilt = nnx.merge(graph, wn.reconstruct(doubled))
    np.testing.assert_array_equal(rebuilt.first.kernel[...], wrapped.plain().first.kernel[...])
    with pytest.raises(ValueError, match=r"'other' has shape \(3,\) in params, and the model has nothing there"):
        wnx.update(wrapped, nnx.State({"other": nnx.Param(jnp.ones(3))}))
    with pytest.raises(ValueError, match=r"'again/kernel/g' has shape \(6,\) in params, and the model has \(1, 6\)"):
        wnx.update(wrapped, jax.tree.map(lambda x: x.reshape(-1) if x.shape == (1, 6) else x, params))


def test_initialization_from_data():
    model = ZOO["nnx_mlp"]()
    wrapped = wnx.WeightNormed(model.module(), model.axes)
    before = arrays(wrapped)
    made = wnx.init_from_data(call, init_scale=0.5)(wrapped, model.x)
    assert arrays(wrapped) == before
    hidden = made.hidden(model.x)
    np.testing.assert_allclose(hidden.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(hidden.std(0), 0.5, rtol=1e-5)
    expected = wn.init_from_data(model.fn, init_scale=0.5)(wn.reparameterize(model.params, model.axes), model.x)
    for a, b in zip(jax.tree.leaves(wnx.split(made)[1]), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_optax_sees_nodes(wrapped):
    frozen = {"g": optax.set_to_zero(), "v": optax.sgd(0.1), "other": optax.adam(0.1)}
    for tx in (
        optax.partition(frozen, wn.labels),
        optax.chain(optax.partition(frozen, wn.labels), optim.project_directions()),
    ):
        optimizer = nnx.Optimizer(wrapped, wnx.on_nodes(tx, wrapped), wrt=nnx.Param)
        before = {path: leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(wrapped, nnx.Param))}

        @nnx.jit
        def step(wrapped, optimizer):
            optimizer.update(wrapped, nnx.grad(lambda wrapped: jnp.sum(wrapped(X) ** 2))(wrapped))

        for _ in range(3):
            step(wrapped, optimizer)
        after = {path: leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(wrapped, nnx.Param))}
        for path, value in after.items():
            assert bool((value == before[path]).all()) == (path[-1] == "g")
    length = np.linalg.norm(before["model", "first", "kernel", "v"], axis=0)
    np.testing.assert_allclose(np.linalg.norm(after["model", "first", "kernel", "v"], axis=0), length, rtol=1e-5)


def test_weight_decay_through_an_optimizer():
    model = wnx.WeightNormed(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), {"kernel": -2})
    g, v = model.model.kernel.g[...], model.model.kernel.v[...]
    tx = optax.chain(optax.add_decayed_weights(0.5, mask=optim.weight_decay_mask), optax.scale(-1.0))
    optimizer = nnx.Optimizer(model, wnx.on_nodes(tx, model), wrt=nnx.Param)
    zero = jax.tree.map(jnp.zeros_like, nnx.grad(lambda model: jnp.sum(model(X)))(model))
    optimizer.update(model, zero)
    np.testing.assert_allclose(model.model.kernel.g[...], 0.5 * g, rtol=1e-6)
    np.testing.assert_array_equal(model.model.kernel.v[...], v)


@pytest.mark.slow
def test_on_nodes_where_only_some_parameters_are_optimized(wrapped):
    only_g = nnx.All(nnx.Param, nnx.PathContains("g"))
    optimizer = nnx.Optimizer(wrapped, wnx.on_nodes(optax.adam(0.1), wrapped), wrt=only_g)
    before = arrays(wrapped)
    optimizer.update(wrapped, nnx.grad(lambda w: jnp.sum(w(X) ** 2), argnums=nnx.DiffState(0, only_g))(wrapped))
    changed = {path[-1] for path, value in arrays(wrapped).items() if value != before[path]}
    assert changed - {"mean", "var", "count"} == {"g"}


def test_models_that_are_weight_normalized_already(plain, wrapped):
    for model in (wrapped, wrapped.model):
        with pytest.raises(ValueError, match=r"weight-normalized already .* \.plain\(\)"):
            wnx.WeightNormed(model, AXES)
    peer = nnx.Sequential(nnx.WeightNorm(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"'layers/0' is a flax.nnx.WeightNorm.*from_weight_norm"):
        wnx.WeightNormed(peer, {"layers/0/kernel": -2})
    wnx.WeightNormed(wrapped.plain(), AXES)


def test_bad_input(plain):
    with pytest.raises(TypeError, match="takes an NNX module; got a State"):
        wnx.WeightNormed(nnx.state(plain), AXES)
    with pytest.raises(ValueError, match=r"'first/kernal' \(did you mean 'first/kernel'"):
        wnx.WeightNormed(plain, {"first/kernal": -2})
    with pytest.raises(ValueError, match="match no leaf"):
        wnx.WeightNormed(plain, {})
    with pytest.raises(ValueError, match="axis -3 is out of range"):
        wnx.WeightNormed(plain, {"first/kernel": -3})
    with pytest.raises(ValueError, match="found no WeightNorm node"):
        wnx.on_nodes(optax.sgd(0.1), plain)
    with pytest.raises(TypeError, match="takes a function"):
        wnx.infer_axes(3)

    class Tuple(nnx.Module, pytree=False):
        def __init__(self):
            self.weights = (nnx.Param(jnp.ones((4, 3))),)

    with pytest.raises(ValueError, match="container that cannot be changed"):
        wnx.WeightNormed(Tuple(), {"weights/0": -2})


def test_a_state_that_was_filtered_after_the_rewrite():
    graph, state = nnx.split(Net(nnx.Rngs(0)))
    state = wn.reparameterize(state, AXES)

    def apply(params, x):
        return nnx.merge(graph, params)(x)

    assert wn.wrap(apply)(state, X).shape == (8, 2)
    filtered = nnx.filter_state(state, nnx.Param)
    some = nnx.State({**filtered, "first": state["first"]})
    for lost, nodes in ((filtered, "none"), (some, "first/kernel")):
        with pytest.raises(ValueError, match="leaves") as caught:
            wn.wrap(apply)(lost, X)
        note = "\n".join(caught.value.__notes__)
        assert f"nodes among them: {nodes}." in note
        assert "layers/1/bias" in note
        assert "filter first" in note
