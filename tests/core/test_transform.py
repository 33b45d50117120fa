"""The tree side: choosing leaves, paths, labels, wrapping, and every error's message."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict, freeze
from flax.training.train_state import TrainState

import wn_jax as wn
from tests.zoo import ZOO


@pytest.fixture
def params():
    return {"params": {"Dense_0": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}, "steps": jnp.zeros((2, 2), int)}}


def test_a_new_tree_comes_back_and_the_old_one_is_untouched(params):
    kernel = params["params"]["Dense_0"]["kernel"]
    nodes = wn.reparameterize(params, {"params/Dense_0/kernel": 0})
    assert isinstance(nodes["params"]["Dense_0"]["kernel"], wn.WeightNorm)
    assert params["params"]["Dense_0"]["kernel"] is kernel
    assert nodes["params"]["Dense_0"]["bias"] is params["params"]["Dense_0"]["bias"]


def test_axes_as_a_function_sees_paths_and_unboxed_arrays():
    model = ZOO["linen_boxed"]()
    seen = {}

    def axes(path, leaf):
        seen[path] = leaf.shape
        return -2 if path.endswith("kernel") else None

    nodes = wn.reparameterize(model.params, axes)
    assert seen == {
        "params/Dense_0/bias": (8,),
        "params/Dense_0/kernel": (6, 8),
        "params/Dense_1/bias": (4,),
        "params/Dense_1/kernel": (8, 4),
    }
    by_dict = wn.reparameterize(model.params, model.axes)
    assert jax.tree.structure(nodes) == jax.tree.structure(by_dict)
    with_none = wn.reparameterize(model.params, {**model.axes, "params/Dense_0/bias": None})
    assert jax.tree.structure(nodes) == jax.tree.structure(with_none)


def test_one_dimensional_and_bare_leaves_when_asked_for():
    assert wn.reparameterize({"b": jnp.ones(3)}, {"b": -1})["b"].g.shape == (1,)
    assert wn.reparameterize(jnp.ones((3, 2)), {"": -2}).g.shape == (1, 2)
    assert wn.reparameterize({"w": np.ones((3, 2), np.float32)}, {"w": (0, 1)})["w"].g.shape == (1, 1)


@pytest.mark.parametrize(
    "container", [dict, freeze, lambda p: TrainState.create(apply_fn=None, params=p, tx=optax.sgd(0.1))]
)
def test_containers_keep_their_type(params, container):
    tree = container(params["params"]) if container is not dict else params
    prefix = "params/"
    if container is freeze:
        prefix = ""
    nodes = wn.reparameterize(tree, {f"{prefix}Dense_0/kernel": -2})
    assert type(nodes) is type(tree)
    assert type(tree) is not FrozenDict or isinstance(nodes["Dense_0"]["kernel"], wn.WeightNorm)
    assert jax.tree.structure(wn.reconstruct(nodes)) == jax.tree.structure(tree)


def test_a_tree_can_be_abstract(params):
    shapes = jax.eval_shape(lambda p: wn.reparameterize(p, {"params/Dense_0/kernel": -2}), params)
    assert shapes["params"]["Dense_0"]["kernel"].g.shape == (1, 2)
    specs = jax.eval_shape(lambda: params)
    with pytest.raises(ValueError, match="eval_shape"):
        wn.reparameterize(specs, {"params/Dense_0/kernel": -2})


ERRORS = {
    "unknown path": ({"params/Dense_0/kernle": -2}, r"'params/Dense_0/kernle' \(did you mean 'params/Dense_0/kernel'"),
    "prefix missing": ({"Dense_0/kernel": -2}, r"'Dense_0/kernel' \(did you mean 'params/Dense_0/kernel'\?\)"),
    "prefix twice": ({"params/params/Dense_0/kernel": -2}, r"did you mean 'params/Dense_0/kernel'"),
    "not a string": ({("params", "Dense_0"): -2}, "a path is a string"),
    "out of range": (
        {"params/Dense_0/kernel": 2},
        r"'params/Dense_0/kernel' .* axis 2 is out of range for shape \(3, 2\)",
    ),
    "an integer leaf": ({"params/steps": -2}, r"'params/steps' has shape \(2, 2\) and dtype int32"),
    "no match": ({}, "match no leaf of params"),
    "no match by function": (lambda path, leaf: None, "match no leaf of params.*kernel_axes"),
    "all None": ({"params/Dense_0/kernel": None}, "match no leaf"),
    "no axis": ({"params/Dense_0/kernel": "0"}, "axes must be an int or a tuple of ints"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_leaf_cause_and_remedy(params, name):
    axes, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        wn.reparameterize(params, axes)


def test_a_superfluous_prefix_is_recognized(params):
    with pytest.raises(ValueError, match=r"'params/Dense_0/kernel' \(did you mean 'Dense_0/kernel'\?\)"):
        wn.reparameterize(params["params"], {"params/Dense_0/kernel": -2})


def test_further_leaves_that_cannot_be_nodes(params):
    with pytest.raises(ValueError, match="complex64"):
        wn.reparameterize({"w": jnp.ones((3, 2), jnp.complex64)}, {"w": 0})
    with pytest.raises(ValueError, match="'f' is a function, not an array"):
        wn.reparameterize({"f": lambda x: x, "w": jnp.ones(2)}, {"f": 0})
    nodes = wn.reparameterize(params, wn.kernel_axes(params))
    for axes in (
        {"params/Dense_0/kernel": -2},
        wn.kernel_axes(nodes),
        lambda path, leaf: -2 if leaf.ndim == 2 else None,
    ):
        with pytest.raises(ValueError, match=r"'params/Dense_0/kernel' is already a WeightNorm node"):
            wn.reparameterize({"params": {"Dense_0": nodes["params"]["Dense_0"]}}, axes)
    with pytest.raises(ValueError, match="two leaves of params have the path 'a/b'"):
        wn.reparameterize({"a/b": jnp.ones((2, 2)), "a": {"b": jnp.ones((2, 2))}}, {"a/b": -2})
    with pytest.raises(TypeError, match="axes must be a dict from leaf path"):
        wn.reparameterize(params, (-2,))


def test_kernel_axes_goes_by_flax_names():
    assert wn.kernel_axes(ZOO["linen_cnn"]().params) == ZOO["linen_cnn"]().axes
    assert wn.kernel_axes(ZOO["nnx_mlp"]().params) == ZOO["nnx_mlp"]().axes
    assert wn.kernel_axes(ZOO["haiku_mlp"]().params) == {}
    assert wn.kernel_axes({"kernel": jnp.ones(3), "a": {"kernel": jax.nn.relu}}) == {}


def test_labels_name_every_leaf():
    model = ZOO["linen_boxed"]()
    labels = wn.labels(wn.reparameterize(model.params, model.axes))
    leaves = jax.tree_util.tree_leaves_with_path(labels)
    by_path = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    assert by_path["params/Dense_0/kernel/g/value"] == "g"
    assert by_path["params/Dense_0/kernel/v/value"] == "v"
    assert by_path["params/Dense_0/bias"] == "other"
    assert set(jax.tree.leaves(wn.labels(model.params))) == {"other"}


def test_node_key_paths_end_in_g_and_v():
    node = wn.WeightNorm.from_weight(jnp.ones((3, 2)), 0)
    paths = [
        jax.tree_util.keystr(path, simple=True) for path, _ in jax.tree_util.tree_leaves_with_path({"kernel": node})
    ]
    assert [path.split(".")[-1][-1] for path in paths] == ["g", "v"]


def test_a_plain_tree_is_reconstructed_as_it_is(params):
    assert wn.reconstruct(params) is params
    assert wn.reconstruct(None) is None


def test_any_type_with_the_protocol_is_rebuilt_innermost_first():
    @jax.tree_util.register_pytree_node_class
    class LowRank:
        """A node of someone else's: base + a @ b. As the `v` of a WeightNorm it makes DoRA."""

        def __init__(self, base, a, b):
            self.base, self.a, self.b = base, a, b

        def weight(self):
            return self.base + self.a @ self.b

        def factors(self):
            return self.weight(), 1.0

        def tree_flatten(self):
            return (self.base, self.a, self.b), None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls(*children)

    low_rank = LowRank(jnp.eye(3, 2), jnp.ones((3, 1)), jnp.full((1, 2), 0.5))
    dora = wn.WeightNorm(jnp.array([[2.0, 3.0]]), low_rank, (-2,))
    expected = low_rank.weight() / jnp.linalg.norm(low_rank.weight(), axis=0) * jnp.array([[2.0, 3.0]])
    rebuilt = wn.reconstruct({"dora": dora, "low_rank": low_rank})
    np.testing.assert_allclose(rebuilt["dora"], expected, rtol=1e-6)
    np.testing.assert_array_equal(rebuilt["low_rank"], low_rank.weight())
    assert set(jax.tree.leaves(wn.labels(dora))) == {"g", "v"}
    with pytest.raises(TypeError, match=r"a node inside a node is rebuilt by wn_jax\.reconstruct"):
        dora.weight()


def test_reconstruct_says_what_it_cannot_rebuild(params):
    class Unregistered:
        def weight(self): ...
        def factors(self): ...

    with pytest.raises(TypeError, match=r"Unregistered has weight\(\) and factors\(\) but is no pytree"):
        wn.reconstruct({"w": Unregistered()})
    nodes = wn.reparameterize(params, wn.kernel_axes(params))
    with pytest.raises(TypeError, match=r"use jax\.eval_shape\(wn_jax\.reconstruct, tree\)"):
        wn.reconstruct(jax.eval_shape(lambda: nodes))
    assert jax.eval_shape(wn.reconstruct, nodes)["params"]["Dense_0"]["kernel"].shape == (3, 2)
    assert wn.kernel_axes(wn.labels(nodes)) == {}


def test_wrap_passes_everything_else_on(params):
    nodes = wn.reparameterize(params, wn.kernel_axes(params))

    def fn(scale, params, *args, train, rngs=None):
        """Documented."""
        assert train is True
        return scale * params["params"]["Dense_0"]["kernel"], args, rngs

    wrapped = wn.wrap(fn, argnums=1)
    assert (wrapped.__name__, wrapped.__doc__) == ("fn", "Documented.")
    weight, args, rngs = wrapped(2.0, nodes, "text", train=True, rngs={"dropout": 1})
    np.testing.assert_array_equal(weight, 2 * params["params"]["Dense_0"]["kernel"])
    assert (args, rngs) == (("text",), {"dropout": 1})
    both = wn.wrap(lambda a, b: (a, b), argnums=(0, 1))(nodes, nodes)
    assert all(jax.tree.structure(tree) == jax.tree.structure(params) for tree in both)


def test_wrap_refuses_what_it_cannot_do(params):
    with pytest.raises(TypeError, match="argument 0 must be the parameters, by position"):
        wn.wrap(lambda params: params)(params=params)
    with pytest.raises(TypeError, match="takes a function"):
        wn.wrap(params)
    with pytest.raises(ValueError, match="scale must be 'auto', 'weight' or 'output'; got 'sideways'"):
        wn.wrap(len, scale="sideways")
    for argnums in (-1, (), "0", {0}):
        with pytest.raises(ValueError, match="argnums"):
            wn.wrap(len, argnums=argnums)


def test_flax_refuses_nodes_without_wrap(params):
    """The first mistake; README's troubleshooting quotes what Flax says then."""
    x = jnp.ones((1, 3))
    variables = nn.Dense(2).init(jax.random.key(0), x)
    nodes = wn.reparameterize(variables, wn.kernel_axes(variables))
    with pytest.raises(
        Exception, match=r'For parameter "kernel" .* expected to generate shape \(3, 2\), but .* shape \(1, 2\)'
    ):
        nn.Dense(2).apply(nodes, x)


def test_weights_that_a_jitted_function_closes_over_become_nodes():
    """They are no tracers themselves, and what is computed from them is."""
    params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 0.0]])}
    node = jax.jit(lambda: wn.reparameterize(params, {"kernel": -2}))()["kernel"]
    np.testing.assert_array_equal(node.g, [[5.0, 0.0]])
    np.testing.assert_array_equal(node.weight(), params["kernel"])
