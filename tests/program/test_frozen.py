"""Arrays that a tree says are not trained: left alone, however the program uses them."""

import dataclasses
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

import wn_jax as wn
import wn_jax.nnx
from wn_jax._program.notes import Reason

X = jax.random.normal(jax.random.key(0), (64, 3))
FREQUENCIES = 10 * jax.random.normal(jax.random.key(1), (3, 8))


class Fourier(nn.Module):
    """Features of fixed frequencies, which stand in a collection of their own."""

    @nn.compact
    def __call__(self, x):
        frequencies = self.variable("constants", "frequencies", lambda: FREQUENCIES).value
        phases = self.variable("constants", "phases", lambda: jnp.ones(8)).value
        return nn.Dense(2)(jnp.sin(x @ frequencies + phases))


class Constant(nnx.Variable):
    """A Variable of one's own."""


class Low(nnx.LoRAParam):
    """A parameter of one's own."""


class NNXFourier(nnx.Module):
    def __init__(self, kind, rngs):
        self.frequencies = kind(FREQUENCIES)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.out = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(self.drop(self.norm(jnp.sin(x @ self.frequencies[...]))))


def reasons(fn, params, *args):
    return {use.path: (use.reason, use.by) for use in wn.weight_uses(fn)(params, *args)}


@pytest.mark.parametrize("make", [dict, freeze])
def test_what_lies_beside_params_is_frozen(make):
    net = Fourier()
    variables = make(net.init(jax.random.key(0), X))
    found = reasons(net.apply, variables, X)
    assert found["constants/frequencies"] == (Reason.FROZEN, "constants")
    assert found["constants/phases"] == (Reason.ELEMENTWISE, "add")  # which it would be in params, too
    assert wn.infer_axes(net.apply)(variables, X) == {"params/Dense_0/kernel": (-2,)}


def test_the_kinds_of_variables_tell_what_is_frozen():
    for kind in (Constant, nnx.BatchStat, nnx.Cache):
        graph, state = nnx.split(NNXFourier(kind, nnx.Rngs(0)))
        found = reasons(lambda state, x, graph=graph: nnx.merge(graph, state)(x), state, X)
        assert found["frequencies"] == (Reason.FROZEN, kind.__name__)
        assert found["norm/scale"] == (Reason.ELEMENTWISE, "mul")
        assert found["out/kernel"] == (None, None)
        assert not {reason for path, (reason, _) in found.items() if path.startswith("drop/")} & {None}


@pytest.mark.parametrize("kind", [nnx.Param, nnx.LoRAParam, Low])
def test_every_param_is_a_weight(kind):
    graph, state = nnx.split(NNXFourier(kind, nnx.Rngs(0)))
    axes = wn.infer_axes(lambda state, x: nnx.merge(graph, state)(x))(state, X)
    assert axes == {"frequencies": (-2,), "out/kernel": (-2,)}


def test_a_tree_that_holds_variables_need_not_be_a_state():
    params = {"fixed": Constant(FREQUENCIES), "out": nnx.Param(jnp.ones((8, 2)))}

    def model(params, x):
        return x @ params["fixed"][...] @ params["out"][...]

    assert wn.infer_axes(model)(params, X) == {"out": (-2,)}


@dataclasses.dataclass
class Net:
    params: jax.Array
    head: jax.Array


jax.tree_util.register_dataclass(Net, ["params", "head"], [])


@pytest.mark.parametrize(
    "params",
    [
        {"params": FREQUENCIES, "head": jnp.ones((8, 2))},  # an array is no collection
        {"net": {"params": FREQUENCIES}, "head": jnp.ones((8, 2))},  # not at the top
        Net(FREQUENCIES, jnp.ones((8, 2))),  # attributes are no collections
    ],
)
def test_params_of_other_kinds_freeze_nothing(params):
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(params), strict=True)
    first, second = sorted(range(2), key=lambda i: leaves[i].shape)

    def model(params, x):
        leaves = jax.tree.leaves(params)
        return x @ leaves[first] @ leaves[second]

    assert len(wn.infer_axes(model)(params, X)) == len(paths)


def test_data_initialization_leaves_frozen_nodes_and_biases_alone_and_says_so():
    net = Fourier()
    variables = net.init(jax.random.key(0), X)
    nodes = wn.reparameterize(variables, {"constants/frequencies": (-2,), "params/Dense_0/kernel": (-2,)})
    with pytest.warns(UserWarning, match=r"constants/frequencies: it is not trained"):
        after = wn.init_from_data(net.apply)(nodes, X)
    np.testing.assert_array_equal(after["constants"]["frequencies"].g, nodes["constants"]["frequencies"].g)
    out = wn.wrap(net.apply)(after, X)
    np.testing.assert_allclose(out.std(0), 1, rtol=1e-4)

    # A frozen array that is added to a weight's output: g is set, and the array stays.
    def model(variables, x):
        return x @ variables["params"]["w"] + variables["constants"]["shift"]

    variables = {"params": {"w": wn.WeightNorm.from_weight(jnp.ones((3, 2)), -2)}, "constants": {"shift": jnp.ones(2)}}
    with pytest.warns(UserWarning, match="constants/shift: it is frozen"):
        after = wn.init_from_data(model)(variables, X)
    np.testing.assert_array_equal(after["constants"]["shift"], 1)
    np.testing.assert_allclose(wn.wrap(model)(after, X).std(0), 1, rtol=1e-4)


def test_a_frozen_node_is_run_as_any_other():
    """Where a scale may go has nothing to do with training."""

    def model(variables, x):
        return jnp.sin(x @ variables["constants"]["w"]) @ variables["params"]["w"]

    variables = {"params": {"w": jnp.ones((8, 2))}, "constants": {"w": FREQUENCIES}}
    nodes = wn.reparameterize(variables, {"params/w": (-2,), "constants/w": (-2,)})
    program = str(jax.make_jaxpr(wn.wrap(model, scale="output"))(nodes, X))
    weights = str(jax.make_jaxpr(wn.wrap(model, scale="weight"))(nodes, X))
    assert program.count("3,8] = mul") < weights.count("3,8] = mul")
    np.testing.assert_allclose(wn.wrap(model, scale="output")(nodes, X), model(variables, X), rtol=2e-4, atol=1e-4)


def test_the_functions_for_nnx_models_agree():
    model = NNXFourier(Constant, nnx.Rngs(0))
    axes = wn_jax.nnx.infer_axes(lambda model, x: model(x))(model, X)
    assert axes == {"out/kernel": (-2,)}
    wrapped = wn_jax.nnx.WeightNormed(model, axes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after = wn_jax.nnx.init_from_data(lambda model, x: model(x))(wrapped, X)
    np.testing.assert_array_equal(after.frequencies[...], FREQUENCIES)
    np.testing.assert_allclose(after(X).std(0), 1, rtol=1e-4)


def test_a_node_is_frozen_where_none_of_its_variables_is_a_param():
    def model(params, x):
        return x @ params["w"][...]

    for kind, expected in ((nnx.Param, None), (Constant, Reason.FROZEN)):
        nodes = wn.reparameterize({"w": kind(FREQUENCIES)}, {"w": (-2,)})
        (use,) = wn.weight_uses(model)(nodes, X)
        assert use.reason == expected
