"""The parameters of `flax.linen.WeightNorm` and `flax.nnx.WeightNorm` as nodes: the outputs are Flax's."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze

import wn_jax as wn
from wn_jax import linen, optim
from wn_jax import nnx as wnx

X = jax.random.normal(jax.random.key(0), (2, 6, 6, 4))


def identity(layer, **_):
    return layer


class Attention(nn.Module):
    """Wrapped in `__call__`, beside the wrappers; `norm` is `nn.WeightNorm`, or nothing."""

    norm: object = identity

    @nn.compact
    def __call__(self, x):
        x = self.norm(nn.Dense(8))(x[:, 0])
        x = self.norm(nn.MultiHeadDotProductAttention(num_heads=2))(x, x)
        return self.norm(nn.Dense(3, use_bias=False, name="head"), name="head_norm")(nn.LayerNorm()(x))


class Convolutions(nn.Module):
    """Wrapped in `setup`, within the wrappers, but for the last."""

    norm: object = identity

    def setup(self):
        self.down = self.norm(nn.Conv(8, (3, 3), strides=2))
        self.blocks = [self.norm(nn.Conv(8, (3, 3), feature_group_count=2)), self.norm(nn.ConvTranspose(5, (2, 2)))]
        self.last = nn.Dense(2)

    def __call__(self, x):
        x = nn.relu(self.down(x))
        for block in self.blocks:
            x = nn.relu(block(x))
        return self.last(x)


class Inner(nn.Module):
    norm: object = identity

    @nn.compact
    def __call__(self, x):
        return nn.tanh(Attention(self.norm)(x)) + nn.tanh(self.norm(nn.Dense(3))(x[:, 1]))


def perturbed(params):
    """Scales apart from 1, some of them negative."""
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(treedef, [x + 0.5 * rng.standard_normal(x.shape).astype(x.dtype) for x in leaves])


@pytest.mark.parametrize(
    "model", [Convolutions, *(pytest.param(model, marks=pytest.mark.slow) for model in (Attention, Inner))]
)
def test_linen(model):
    theirs, ours = model(nn.WeightNorm), model()
    params = perturbed(theirs.init(jax.random.key(0), X))
    nodes = linen.from_weight_norm(params)
    expected = theirs.apply(params, X)
    np.testing.assert_allclose(wn.wrap(ours.apply)(nodes, X), expected, rtol=1e-6, atol=1e-6)
    assert jax.tree.structure(wn.reconstruct(nodes)) == jax.tree.structure(ours.init(jax.random.key(0), X))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert len(optim.direction_stats(nodes)) == sum(path.endswith("/scale']") for path in paths) > 2
    part = linen.from_weight_norm(params["params"])
    assert jax.tree.structure(part) == jax.tree.structure(nodes["params"])


def test_v_is_kept_so_that_training_goes_on_as_it_was():
    theirs, ours = nn.WeightNorm(nn.Dense(3)), nn.Dense(3)
    x = X[:, 0, 0]
    params = perturbed(theirs.init(jax.random.key(0), x))
    nodes = linen.from_weight_norm(params)["params"]
    np.testing.assert_array_equal(nodes["kernel"].v, params["params"]["layer_instance"]["kernel"])
    grads = jax.grad(lambda params: jnp.sum(theirs.apply(params, x) ** 2))(params)["params"]
    gradients = jax.grad(lambda nodes: jnp.sum(wn.wrap(ours.apply)({"params": nodes}, x) ** 2))(nodes)
    np.testing.assert_allclose(gradients["kernel"].v, grads["layer_instance"]["kernel"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradients["kernel"].g[0], grads["layer_instance/kernel/scale"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "feature_axes", [None, (0, -1), *(pytest.param(x, marks=pytest.mark.slow) for x in (-1, (1,), [-1, 1]))]
)
def test_feature_axes(feature_axes):
    theirs = nn.WeightNorm(nn.Conv(5, (2, 3)), feature_axes=feature_axes)
    params = perturbed(theirs.init(jax.random.key(0), X))
    nodes = linen.from_weight_norm(params, feature_axes=feature_axes)
    outputs = wn.wrap(nn.Conv(5, (2, 3)).apply)(nodes, X)
    np.testing.assert_allclose(outputs, theirs.apply(params, X), rtol=1e-6, atol=2e-6)


def test_a_normalized_bias_becomes_plain():
    theirs = nn.WeightNorm(nn.Dense(3), variable_filter={"kernel", "bias"})
    params = perturbed(theirs.init(jax.random.key(0), X))
    nodes = linen.from_weight_norm(params)
    assert isinstance(nodes["params"]["bias"], jax.Array)
    np.testing.assert_allclose(wn.wrap(nn.Dense(3).apply)(nodes, X), theirs.apply(params, X), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "feature_axes", [-1, 1, pytest.param(0, marks=pytest.mark.slow), pytest.param(None, marks=pytest.mark.slow)]
)
def test_a_stack_keeps_its_copies(feature_axes):
    def stack(norm):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.tanh(norm(nn.Dense(4))(x)), None

        return nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)()  # all sizes are 4

    theirs, ours = stack(functools.partial(nn.WeightNorm, feature_axes=feature_axes)), stack(identity)
    params = perturbed(theirs.init(jax.random.key(0), X, None))
    nodes = linen.from_weight_norm(params, feature_axes=feature_axes)
    expected = theirs.apply(params, X, None)[0]
    np.testing.assert_allclose(wn.wrap(ours.apply)(nodes, X, None)[0], expected, rtol=1e-6, atol=1e-6)


def test_epsilon_zero_vectors_and_half_precision():
    theirs = nn.WeightNorm(nn.Dense(3), epsilon=0.1)
    params = theirs.init(jax.random.key(0), X)
    kernel = params["params"]["layer_instance"]["kernel"].at[:, 1].set(0)
    params["params"]["layer_instance"]["kernel"] = kernel
    nodes = linen.from_weight_norm(params, epsilon=0.1)
    np.testing.assert_allclose(wn.wrap(nn.Dense(3).apply)(nodes, X), theirs.apply(params, X), rtol=1e-6, atol=1e-6)
    assert nodes["params"]["kernel"].g[0, 1] == 0
    assert np.linalg.norm(nodes["params"]["kernel"].v[:, 1]) > 0.9  # it can train
    theirs = nn.WeightNorm(nn.Dense(3, param_dtype=jnp.bfloat16))
    params = theirs.init(jax.random.key(0), X)
    nodes = linen.from_weight_norm(params)
    np.testing.assert_allclose(wn.wrap(nn.Dense(3).apply)(nodes, X), theirs.apply(params, X), rtol=1e-5, atol=1e-5)


def test_the_kind_of_dict_and_boxes():
    theirs = nn.WeightNorm(nn.Dense(3, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))))
    params = theirs.init(jax.random.key(0), X)
    nodes = linen.from_weight_norm(freeze(params))
    assert isinstance(nodes, FrozenDict)
    node = nodes["params"]["kernel"]
    assert (node.g.names, node.v.names) == ((None, "out"), ("in", "out"))


def test_linen_errors():
    params = nn.Dense(3).init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="no scale of a flax WeightNorm"):
        linen.from_weight_norm(params)
    params = nn.WeightNorm(nn.Dense(3)).init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"'params/layer_instance/kernel' has shape \(4, 3\).*\(3,\).*feature_axes 0"):
        linen.from_weight_norm(params, feature_axes=0)
    with pytest.raises(ValueError, match="feature_axes"):
        linen.from_weight_norm(params, feature_axes=7)
    with pytest.raises(ValueError, match="feature_axes None"):
        linen.from_weight_norm(nn.WeightNorm(nn.Dense(4)).init(jax.random.key(0), X), feature_axes=None)
    for model in (Unscaled(True), Unscaled(False)):
        with pytest.raises(ValueError, match=r"without (a scale|one)"):
            linen.from_weight_norm(model.init(jax.random.key(0), X))
    twice = nn.WeightNorm(nn.WeightNorm(nn.Dense(3)))
    with pytest.raises(ValueError, match="within one another"):
        linen.from_weight_norm(twice.init(jax.random.key(0), X))
    alone = {"params": {"layer_instance/kernel/scale": jnp.ones(3)}}
    with pytest.raises(
        ValueError, match="'params/layer_instance/kernel/scale' is the scale of a weight that is not there"
    ):
        linen.from_weight_norm(alone)


class Unscaled(nn.Module):
    """A wrapper without a scale before one that has it; made here, or in `setup`."""

    here: bool

    def setup(self):
        self.layers = [] if self.here else self.make()

    def make(self):
        return [nn.WeightNorm(nn.Dense(4), use_scale=False), nn.WeightNorm(nn.Dense(4))]

    @nn.compact
    def __call__(self, x):
        for layer in self.layers or self.make():
            x = layer(x)
        return x


class NNXNet(nnx.Module):
    """Convolutions, then attention."""

    def __init__(self, rngs, norm):
        self.convs = nnx.List([norm(nnx.Conv(4, 8, (3, 3), rngs=rngs)), norm(nnx.Conv(8, 6, (2, 2), rngs=rngs))])
        self.attention = norm(nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs))
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        for conv in self.convs:
            x = nnx.relu(conv(x))
        return self.head(self.attention(x[:, 0]))


def nnx_peer():
    model = NNXNet(nnx.Rngs(0), lambda layer: nnx.WeightNorm(layer, rngs=nnx.Rngs(1)))
    rng = np.random.default_rng(0)
    for layer in (*model.convs, model.attention):
        for path, scale in layer.scales.items():
            new = jnp.asarray(1 + 0.5 * rng.standard_normal(scale.shape).astype(np.float32))
            if isinstance(scale, nnx.Param):
                scale[...] = new
            else:
                layer.scales[path] = new
    return model


@pytest.mark.slow
def test_nnx_modules_and_states():
    theirs = nnx_peer()
    ours, state = wnx.from_weight_norm(theirs), wnx.from_weight_norm(nnx.state(theirs))
    expected = theirs(X)  # after the conversion: the call writes to v
    np.testing.assert_allclose(ours(X), expected, rtol=1e-6, atol=1e-6)
    plain = NNXNet(nnx.Rngs(2), lambda layer: layer)
    graph, _ = nnx.split(plain)
    np.testing.assert_allclose(
        wn.wrap(lambda state, x: nnx.merge(graph, state)(x))(state, X), expected, rtol=1e-6, atol=1e-6
    )
    assert type(ours.plain().convs[0]) is nnx.Conv
    assert set(wnx.infer_axes(lambda m, x: m(x))(ours, X)) == {*_node_paths(ours), "head/kernel"}
    ours = wnx.from_weight_norm(theirs)  # after a call, which flips the weights whose scales are negative
    np.testing.assert_allclose(ours(X), theirs(X), rtol=1e-5, atol=1e-6)


def _node_paths(model):
    return optim.direction_stats(wnx.split(model)[1])


def test_nnx_errors():
    with pytest.raises(ValueError, match=r"has no flax.nnx.WeightNorm"):
        wnx.from_weight_norm(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="no scale of a flax WeightNorm"):
        wnx.from_weight_norm(nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0))))
    with pytest.raises(TypeError, match="got a int"):
        wnx.from_weight_norm(3)
    rngs = nnx.Rngs(0)
    alone = nnx.WeightNorm(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    assert wnx.from_weight_norm(alone)(jnp.ones((1, 3))).shape == (1, 2)
    state = nnx.state(nnx.Sequential(alone, nnx.WeightNorm(nnx.Linear(2, 2, rngs=rngs), use_scale=False, rngs=rngs)))
    with pytest.raises(ValueError, match="layer_instance has no scale beside it"):
        wnx.from_weight_norm(state)
    unscaled = nnx.WeightNorm(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), use_scale=False, rngs=nnx.Rngs(0))
    ours = wnx.from_weight_norm(unscaled)
    np.testing.assert_allclose(ours(jnp.eye(3)), unscaled(jnp.eye(3)), atol=1e-6)


def test_a_scale_that_an_nnx_wrapper_was_told_to_leave_out_is_left_out():
    """Flax asks `use_scale` in each call, not when the scales are made."""
    wrapper = nnx.WeightNorm(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    wrapper.scales = jax.tree.map(lambda scale: 5 * scale, wrapper.scales)
    wrapper.use_scale = False
    model = nnx.Sequential(wrapper)
    x = jnp.array([[1.0, -2.0, 0.5]])
    expected = model(x)
    np.testing.assert_allclose(wnx.from_weight_norm(model)(x), expected, rtol=1e-6)
