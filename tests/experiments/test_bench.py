"""The benchmark's arms: all libraries compute the same networks, normalize them, and take the same steps."""

import functools
import importlib.util

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx

from experiments.bench import bound, networks, rows
from experiments.bench.arms import CannotError
from experiments.bench.libraries import carried, equinox, linen, nnx, ours
from experiments.bench.libraries.jax_steps import accumulated, accumulated_once, inputs, loss, sgd
from experiments.bench.rows import MEMBERS, PARTS, Row

TINY = {
    "mlp": lambda: networks.mlp(6),
    "lstm": lambda: networks.recurrent("lstm", 3, 4),
    "gru": lambda: networks.recurrent("gru", 3, 4),
    "conv": lambda: networks.conv_pool(4),
    "hifi-gan": lambda: networks.hifi_gan(2, 32, 5),
    "gpt": lambda: networks.gpt(5, 1, 16, 2),
}
RECURRENT = ("lstm", "gru")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Networks of a few numbers, under names of their own."""
    monkeypatch.setattr(rows, "NETWORKS", TINY)


def randomized(tree):
    """The same structure with other numbers in it, in the biases too, of a size that keeps outputs from saturating."""
    random = np.random.default_rng(2)

    def draw(leaf):
        size = (leaf.shape[-1] / leaf.size) ** 0.5 if leaf.ndim > 1 else 0.1
        return jnp.asarray(size * random.standard_normal(leaf.shape), jnp.float32)

    return jax.tree.map(draw, tree)


def shapes(build, *args):
    """The parameters of a network that is built, as shapes: no number is drawn."""
    return jax.eval_shape(lambda: build(*args)[1])


def in_linen(row):
    """Linen's network, as a function, and random parameters of it."""
    kept = []

    def build():
        apply, params = linen.build(row)
        kept.append(apply)
        return params

    params = randomized(jax.eval_shape(build))
    return kept[0], params


def in_nnx(params, state):
    """NNX's state with Linen's numbers, whose layers have the same layout."""
    flat = flax_nnx.to_flat_state(state)
    own = {path: leaf.replace(params["params"][path[1]][path[2]]) for path, leaf in flat}
    return flax_nnx.from_flat_state(own)


def in_equinox(params, layers):
    """Equinox's layers with Linen's numbers: features first, then inputs."""
    for name, own in params["params"].items():
        layers = eqx.tree_at(
            lambda tree, name=name: tree[name].weight, layers, jnp.moveaxis(own["kernel"], (-1, -2), (0, 1))
        )
        if "bias" in own:
            bias = own["bias"].reshape(layers[name].bias.shape)
            layers = eqx.tree_at(lambda tree, name=name: tree[name].bias, layers, bias)
    return layers


@pytest.mark.parametrize(
    "name", ["mlp", "gpt", *(pytest.param(name, marks=pytest.mark.slow) for name in ("conv", "hifi-gan"))]
)
def test_the_libraries_compute_the_same_network(name):
    """Recurrent cells are the libraries' own, and keep their gates in different ways."""
    row = Row(name, name, 2)
    (apply, params), x = in_linen(row), inputs(row)
    expected = jax.jit(apply)(params, x)
    assert expected.std() > 1e-3
    nnx_apply, state = nnx.build(row)
    np.testing.assert_allclose(jax.jit(nnx_apply)(in_nnx(params, state), x), expected, rtol=1e-4, atol=1e-5)
    eqx_apply, layers = equinox.build(row)
    own = jax.jit(eqx_apply)(in_equinox(params, layers), inputs(row, channels_first=True))
    np.testing.assert_allclose(own.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)


def wrapped(row):
    """How each library builds its weight-normalized network."""
    found = {"wn_jax": in_nodes, "linen": functools.partial(linen.build, wrapped=True)}
    found["nnx"] = functools.partial(nnx.build, wrapped=True)
    found["paramax"] = lambda row: equinox.build(row, equinox.wrap_weights, equinox.paramax_unwrap)
    if row.network not in RECURRENT:
        found["equinox"] = lambda row: equinox.build(row, eqx.nn.WeightNorm)
    return found


def in_nodes(row):
    apply, _, nodes = ours.build(row)
    return ours.wn.wrap(apply), nodes


@pytest.mark.parametrize("name", ["mlp", "lstm", "gru", pytest.param("conv", marks=pytest.mark.slow)])
def test_every_wrapped_network_does_not_depend_on_the_lengths_of_its_directions(name):
    row = Row(name, name, 2)
    for library, build in wrapped(row).items():
        apply, params = build(row)
        x = inputs(row, channels_first=library in ("equinox", "paramax"))
        longer = jax.tree.map(lambda leaf: leaf * 2 if sum(size > 1 for size in leaf.shape) > 1 else leaf, params)
        before, after = jax.jit(apply)(params, x), jax.jit(apply)(longer, x)
        assert np.std(before) > 1e-3
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4, err_msg=library)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lstm", "conv", "gpt"])
def test_in_half_precision_all_but_the_magnitudes_is_half_precise(name):
    row = Row(name, name, 2, dtype="bfloat16")
    apply, _, nodes = ours.build(row)
    x = inputs(row)
    step = jax.jit(lambda nodes, x: sgd(nodes, jax.grad(loss(ours.wn.wrap(apply)))(nodes, x)))
    after = step(nodes, x)
    assert x.dtype == jnp.bfloat16
    for leaf, label in zip(jax.tree.leaves(after), jax.tree.leaves(ours.wn.labels(after)), strict=True):
        assert leaf.dtype == (jnp.float32 if label == "g" else jnp.bfloat16)
        assert jnp.isfinite(leaf).all()


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


_LARGE = pytest.param("hifi-gan", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [_LARGE if name == "hifi-gan" else name for name in TINY if name not in RECURRENT])
def test_every_library_has_as_many_magnitudes_as_there_are_features(name):
    row = Row(name, name, 1)
    features = sum(layer.features for layer in row.build().layers.values())
    plain = {library: size(shapes(library.build, row)) for library in (linen, nnx, equinox)}
    of = {"wn_jax": linen, "linen": linen, "nnx": nnx, "paramax": equinox, "equinox": equinox}
    for library, build in wrapped(row).items():
        assert size(shapes(build, row)) - plain[of[library]] == features, library


def test_gradients_of_microbatches_are_those_of_the_whole_batch():
    row = Row("parts", "mlp", 3, "accumulate")
    apply, _, nodes = ours.build(row)
    parts = inputs(row)
    whole = jax.grad(loss(ours.wn.wrap(apply)))(nodes, parts.reshape(PARTS * 3, -1))
    for gradient in (accumulated_once(apply, ours.wn.reconstruct), accumulated(ours.wn.wrap(apply))):
        for own, expected in zip(jax.tree.leaves(gradient(nodes, parts)), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(own, expected, rtol=1e-5, atol=1e-7)


def test_a_carried_norm_takes_the_same_steps():
    row = Row("mlp", "mlp", 3)
    apply, _, nodes = ours.build(row)
    x, apply = inputs(row), ours.wn.wrap(apply)
    own = ours.carry(nodes, measured=True)
    for _ in range(3):
        own = carried.update(own, jax.grad(loss(apply))(own, x))
        nodes = sgd(nodes, jax.grad(loss(apply))(nodes, x))
    np.testing.assert_allclose(apply(own, x), apply(nodes, x), rtol=1e-5)
    kernel, other = (tree["params"]["first"]["kernel"] for tree in (own, nodes))
    np.testing.assert_allclose(kernel.v, other.v, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(kernel.g, other.g, rtol=1e-5)


WIDTH, BATCH = 6, 2
KERNEL, VECTOR, ACTIVATION = 4 * WIDTH**2, 4 * WIDTH, 4 * BATCH * WIDTH
MATMUL = KERNEL + 2 * ACTIVATION  # its operands and its result, whichever of the three is the kernel or its gradient
UPDATE = 3 * 3 * (KERNEL + VECTOR)
NORMS = 3 * KERNEL
BOUNDS = {
    "train": (8 * MATMUL + UPDATE, NORMS + 4 * 3 * VECTOR),  # the first layer's input has no gradient
    "serve": (3 * MATMUL, NORMS + 3 * VECTOR),
    "accumulate": (PARTS * (8 * MATMUL + UPDATE) + UPDATE, NORMS + 4 * 3 * VECTOR),
    "ensemble": (
        MEMBERS * (8 * MATMUL + UPDATE) - 2 * (MEMBERS - 1) * ACTIVATION,  # all read one input, forward and backward
        MEMBERS * (NORMS + 4 * 3 * VECTOR),
    ),
}


@pytest.mark.parametrize("work", BOUNDS)
def test_the_bytes_that_must_move_counted_by_hand(work):
    plain, added = BOUNDS[work]
    assert bound.of(Row("mlp", "mlp", BATCH, work)) == (plain, plain + added)


def test_a_loop_counts_as_often_as_it_runs():
    lstm = bound.of(Row("lstm", "lstm", 2, "serve"))[0]
    gates, steps = 4, 3
    kernels, states, outputs = 2 * gates * 4 * 16, 2 * 4 * 2 * 4, 2 * gates * 4 * 2 * 4
    assert lstm == steps * (kernels + states + outputs)


def test_libraries_that_cannot_say_why():
    with pytest.raises(CannotError, match="a recurrent cell has two"):
        equinox.arms(Row("lstm", "lstm", 2))


def in_torch(network, params, net):
    """The network in PyTorch with Linen's numbers; the taps of a transposed convolution in the other order."""
    import torch

    for name, own in params["params"].items():
        kernel = jnp.moveaxis(own["kernel"], (-1, -2), (0, 1))
        if isinstance(network.layers[name], networks.Upsample):
            kernel = jnp.flip(kernel, -1).swapaxes(0, 1)
        net.layers[name].weight.data = torch.from_numpy(np.array(kernel))
        if "bias" in own:
            net.layers[name].bias.data = torch.from_numpy(np.array(own["bias"]))
    return net


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
@pytest.mark.parametrize("name", [name for name in TINY if name not in RECURRENT])
def test_pytorch_computes_the_same_network(name):
    from experiments.bench.libraries import torch

    row = Row(name, name, 2)
    apply, params = in_linen(row)
    expected = jax.jit(apply)(params, inputs(row))
    own = in_torch(row.build(), params, torch.build(row))(torch._input(row)).detach().numpy()
    np.testing.assert_allclose(own.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
@pytest.mark.parametrize("work", ["train", "serve", "accumulate"])
def test_the_networks_in_pytorch(work):
    from experiments.bench.libraries import torch

    for arm in torch.arms(Row("mlp", "mlp", 3, work)):
        arm.run(2)
        assert arm.deviation < 1e-5
        assert arm.compile is None
    with pytest.raises(CannotError, match="vmap"):
        torch.arms(Row("mlp", "mlp", 3, "ensemble"))
