"""`WeightNormed`: training against a reference by hand, and what an NNX module can do, against the plain model."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import errors, nnx

import wn_jax as wn
from tests.by_hand import OPTIMIZERS, assert_close, data, trained
from tests.nnx.net import AXES, Net, X, arrays, call, is_whole
from tests.zoo import ZOO
from tests.zoo.arrays import bodies, equations
from wn_jax.nnx import WeightNormed, infer_axes


class Perceptron(nnx.Module):
    """The model whose output `tests.by_hand` computes."""

    def __init__(self, rngs):
        self.hidden, self.out = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.hidden(x)))


def flat(model):
    layers = (model.model.hidden, model.model.out)
    return [[np.asarray(p[...], np.float64) for p in (l.kernel.g, l.kernel.v, l.bias)] for l in layers]  # noqa: E741


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_follows_the_reference(name):
    x, y = (a.astype(np.float32) for a in data(6, 3))
    model = WeightNormed(Perceptron(nnx.Rngs(0)), {"hidden/kernel": -2, "out/kernel": -2})
    expected = [[p.reshape(p.shape[-1:]) if i == 0 else p for i, p in enumerate(layer)] for layer in flat(model)]
    expected = trained(name, expected, x.astype(np.float64), y.astype(np.float64), 50)
    optimizer = nnx.Optimizer(model, OPTIMIZERS[name][1], wrt=nnx.Param)
    traces = []

    @nnx.jit
    def step(model, optimizer):
        traces.append(1)
        optimizer.update(model, nnx.grad(lambda model: jnp.mean((model(x) - y) ** 2))(model))

    for _ in range(50):
        step(model, optimizer)
        before = arrays(model)
        model(x)
        assert arrays(model) == before
    assert_close([[layer[0][0], *layer[1:]] for layer in flat(model)], expected)
    for _ in range(20):
        model(x)
    assert arrays(model) == before
    for _ in range(50):  # on to the hundredth
        step(model, optimizer)
    assert len(traces) == 1
    assert np.isfinite(np.concatenate([p.ravel() for layer in flat(model) for p in layer])).all()
    assert (arrays(model)["model", "hidden", "kernel", "v"]) != before["model", "hidden", "kernel", "v"]


def test_g_and_v_are_params_and_all_else_is_as_it_was(plain, wrapped):
    node = wrapped.model.first.kernel
    assert type(node) is wn.WeightNorm
    assert type(node.g) is type(node.v) is nnx.Param
    assert wrapped.model.again is wrapped.model.layers[0]
    params = {path for path, _ in nnx.to_flat_state(nnx.state(wrapped, nnx.Param))}
    assert {("model", "first", "kernel", "g"), ("model", "first", "kernel", "v"), ("model", "first", "bias")} < params
    assert isinstance(plain.first.kernel, nnx.Param)  # the given model stays as it is
    names = {path[1:] for path in arrays(wrapped)} - {(*path, part) for path in _kernels() for part in "gv"}
    assert names == set(arrays(plain)) - set(_kernels())


def _kernels():
    return [("first", "kernel"), ("again", "kernel"), ("layers", 1, "kernel")]


def test_statistics_and_random_keys_move_as_the_plain_model_s(plain, wrapped):
    for mode in ("train", "eval", "train"):
        getattr(plain, mode)()
        getattr(wrapped, mode)()
        for _ in range(2):
            np.testing.assert_allclose(wrapped(X), plain(X), atol=1e-6)
        np.testing.assert_array_equal(wrapped.model.norm.mean[...], plain.norm.mean[...])
        np.testing.assert_array_equal(wrapped.model.dropout.rngs.count[...], plain.dropout.rngs.count[...])
    assert float(jnp.abs(plain.norm.mean[...]).max()) > 0
    assert int(plain.dropout.rngs.count[...]) == 4


def test_plain_is_the_folded_model(plain, wrapped):
    folded = wrapped.plain()
    assert type(folded) is Net
    assert type(folded.first.kernel) is nnx.Param
    assert folded.again is folded.layers[0]
    for model in (plain, wrapped, folded):
        model.eval()
    np.testing.assert_array_equal(folded(X), plain(X))
    folded.first.kernel[...] = jnp.zeros((4, 6))  # a copy
    np.testing.assert_array_equal(wrapped(X), plain(X))


def test_a_jax_jit_closure_in_eval_mode_and_what_plain_nnx_refuses(plain, wrapped):
    plain.eval()
    wrapped.eval()
    np.testing.assert_allclose(jax.jit(lambda x: wrapped(x))(X), plain(X), atol=1e-5)
    np.testing.assert_allclose(jax.vmap(lambda x: wrapped(x))(X), plain(X), atol=1e-5)
    np.testing.assert_allclose(jax.jit(wrapped.features)(X), plain.features(X), atol=1e-5)
    plain.train()
    wrapped.train()
    for model in (plain, wrapped):
        with pytest.raises(errors.TraceContextError):
            jax.jit(lambda x, model=model: model(x))(X)
    wrapped.eval()
    assert wrapped(X).shape == (8, 2)  # it is whole after the error
    assert is_whole(wrapped)


@pytest.mark.slow
def test_an_ensemble_by_vmap_and_a_stack_by_scan():
    @nnx.vmap
    def make(rngs):
        return WeightNormed(nnx.Linear(4, 4, rngs=rngs), {"kernel": -2})

    stack = make(nnx.Rngs(0).split(3))
    assert stack.model.kernel.g.shape == (3, 1, 4)
    kernels, biases = stack.plain().kernel[...], stack.model.bias[...]
    members = nnx.vmap(call, in_axes=(0, None))(stack, X)
    np.testing.assert_allclose(members, jnp.einsum("bi,nio->nbo", X, kernels) + biases[:, None], atol=1e-5)

    def step(x, layer):
        return jnp.tanh(layer(x))

    scanned = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    expected = X
    for kernel, bias in zip(kernels, biases, strict=True):
        expected = jnp.tanh(expected @ kernel + bias)
    np.testing.assert_allclose(scanned(X, stack), expected, atol=1e-5)
    grads = nnx.grad(lambda stack: jnp.sum(scanned(X, stack) ** 2))(stack)
    assert grads["model"]["kernel"]["g"].shape == (3, 1, 4)
    assert float(jnp.abs(grads["model"]["kernel"]["v"].get_value()).min(axis=(1, 2)).max()) > 0


@pytest.mark.parametrize("name", ["nnx_scan", "nnx_ensemble", "nnx_lstm"])
def test_layers_within_loops_and_maps(name):
    model = ZOO[name]()
    wrapped = WeightNormed(model.module(), model.axes)
    nodes = wn.reparameterize(model.params, model.axes)
    value, grads = nnx.jit(nnx.value_and_grad(lambda wrapped: jnp.sum(wrapped(model.x) ** 2)))(wrapped)
    expected, gradients = jax.jit(jax.value_and_grad(lambda n: jnp.sum(wn.wrap(model.fn)(n, model.x) ** 2)))(nodes)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    ours, theirs = jax.tree.leaves(grads["model"]), jax.tree.leaves(gradients)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_recurrent_weight_is_computed_outside_of_its_loop():
    model = ZOO["nnx_lstm"]()
    wrapped = WeightNormed(model.module(), model.axes)
    graph, state = nnx.split(wrapped)
    jaxpr = jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(x))(state, model.x).jaxpr
    (loop,) = (eqn for eqn in equations(jaxpr) if str(eqn.primitive) == "scan")
    roots = [eqn for eqn in equations(jaxpr) if str(eqn.primitive) == "sqrt"]
    assert len(roots) == len(model.axes)
    assert not any(str(eqn.primitive) == "sqrt" for body in bodies(loop) for eqn in equations(body))


def test_sharding_metadata():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("data", "model"))
    with jax.set_mesh(mesh):
        model = WeightNormed(nnx.Linear(8, 8, kernel_init=init, rngs=nnx.Rngs(0)), {"kernel": -2})
        specs = nnx.get_partition_spec(nnx.state(model, nnx.Param))["model"]["kernel"]
        spec = jax.sharding.PartitionSpec
        assert (specs["g"].get_value(), specs["v"].get_value()) == (spec(None, "model"), spec("data", "model"))
        node = model.model.kernel
        assert node.g.get_value().sharding.spec == spec(None, "model")
        assert node.v.get_value().sharding.spec == spec("data", "model")
        assert model.plain().kernel.out_sharding == ("data", "model")


def test_orbax(wrapped, tmp_path):
    state = nnx.state(wrapped)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", state)
    other = WeightNormed(Net(nnx.Rngs(1)), AXES)
    assert arrays(other) != arrays(wrapped)
    with ocp.StandardCheckpointer() as checkpointer:
        nnx.update(other, checkpointer.restore(tmp_path / "checkpoint", nnx.state(other)))
    assert arrays(other) == arrays(wrapped)
    np.testing.assert_array_equal(other(X), wrapped(X))


def test_around_a_part_of_a_model():
    class Outer(nnx.Module):
        def __init__(self, rngs):
            self.encoder = WeightNormed(Net(rngs), AXES)
            self.head = nnx.Linear(2, 1, rngs=rngs)

        def __call__(self, x):
            return self.head(self.encoder(x))

    model = Outer(nnx.Rngs(0))
    model.eval()
    assert model.encoder.model.dropout.deterministic
    assert nnx.jit(call)(model, X).shape == (8, 1)
    assert infer_axes(call)(model, X) == {
        **{f"encoder/model/{path}": axes for path, axes in AXES.items()},
        "head/kernel": (-2,),
    }
