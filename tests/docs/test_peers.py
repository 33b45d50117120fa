"""The README's table of what today's libraries get wrong: each row measures them and wn_jax side by side.

Only wn_jax's own value can fail a test. Where a peer has become right, a warning says that its cell is out of date.
"""

import warnings

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import wn_jax as wn


class LinenPeer(nn.Module):
    """`flax.linen.WeightNorm` around a Dense layer without a bias; with an identity as input it returns the weight."""

    features: int
    wrapped: bool = True
    dtype: jnp.dtype = jnp.float32
    names: tuple = ()

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        init = nn.with_partitioning(init, self.names) if self.names else init
        dense = nn.Dense(self.features, use_bias=False, dtype=self.dtype, param_dtype=self.dtype, kernel_init=init)
        return (nn.WeightNorm(dense) if self.wrapped else dense)(x)


def linen_weight(v):
    """The weight that `flax.linen.WeightNorm` makes of a direction `v`, with a scale of 1."""
    peer = LinenPeer(v.shape[1], dtype=v.dtype)
    eye = jnp.eye(len(v), dtype=v.dtype)
    scale = jnp.ones(v.shape[1], v.dtype)
    params = {"Dense_0": {"kernel": v}, "WeightNorm_0": {"Dense_0/kernel/scale": scale}}
    return peer.apply({"params": params}, eye)


def equinox_weight(v):
    """The same by `equinox.nn.WeightNorm`, which stores (out, in); its `g` is set to 1."""
    layer = eqx.nn.Linear(v.shape[0], v.shape[1], use_bias=False, key=jax.random.key(0), dtype=v.dtype)
    layer = eqx.nn.WeightNorm(eqx.tree_at(lambda layer: layer.weight, layer, v.T))
    layer = eqx.tree_at(lambda layer: layer.g, layer, jnp.ones((v.shape[1], 1), v.dtype))
    return jax.vmap(layer)(jnp.eye(len(v), dtype=v.dtype))


def our_weight(v):
    return wn.WeightNorm(jnp.ones((1, v.shape[1])), v, (-2,)).weight()


def expect_wrong(is_wrong, peer, row):
    if not is_wrong:
        warnings.warn(f"{peer} now gets '{row}' right; update the README's table", stacklevel=2)


def show(row, **figures):
    """Print a row of the README's table: `pytest tests/docs/test_peers.py -n0 -s`."""
    print(f"\n{row}: " + ", ".join(f"{name} {np.asarray(value, float).max():.5g}" for name, value in figures.items()))


def length(weight):
    return np.linalg.norm(np.asarray(weight, np.float64), axis=0)


def test_wrapping_changes_the_output():
    x = jax.random.normal(jax.random.key(1), (16, 32))
    plain = LinenPeer(8, wrapped=False)
    params = plain.init(jax.random.key(0), x)
    expected = plain.apply(params, x)
    kernel = params["params"]["Dense_0"]["kernel"]

    def change(output):
        return float(jnp.abs(output - expected).max())

    nodes = wn.reparameterize(params, wn.kernel_axes(params))
    linear = nnx.Linear(32, 8, use_bias=False, rngs=nnx.Rngs(0))
    linear.kernel[...] = kernel
    layer = eqx.nn.Linear(32, 8, use_bias=False, key=jax.random.key(0))
    layer = eqx.nn.WeightNorm(eqx.tree_at(lambda layer: layer.weight, layer, kernel.T))
    ours = change(wn.wrap(plain.apply)(nodes, x))
    linen, nnx_ = change(x @ linen_weight(kernel)), change(nnx.WeightNorm(linear, rngs=nnx.Rngs(0))(x))
    show("output change", linen=linen, nnx=nnx_, equinox=change(jax.vmap(layer)(x)), wn_jax=ours)
    assert ours <= 2e-6
    expect_wrong(linen > 0.1, "flax.linen.WeightNorm", "output change")
    expect_wrong(nnx_ > 0.1, "flax.nnx.WeightNorm", "output change")


def test_zero_row():
    zero = jnp.zeros((5, 2))
    x = jax.random.normal(jax.random.key(0), (5, 2))

    def forward_and_gradient(weight, v):
        return weight(v), jax.grad(lambda v: jnp.sum(weight(v) * x))(v)

    node = wn.WeightNorm.from_weight(zero, 0)
    forward, gradient = forward_and_gradient(lambda v: wn.WeightNorm(node.g, v, (-2,)).weight(), node.v)
    assert (forward == 0).all()
    assert np.abs(gradient).max() <= 10
    grad_g = jax.grad(lambda g: jnp.sum(wn.WeightNorm(g, node.v, (-2,)).weight() * x))(node.g)
    assert (np.abs(grad_g) > 1e-3).all()  # it trains
    for v in (zero, node.v):
        assert np.isfinite(forward_and_gradient(our_weight, v)[1]).all()
    ours = max(np.abs(grad_g).max(), np.abs(gradient).max())
    _, gradient = forward_and_gradient(linen_weight, zero)
    show("zero row, gradient", linen=np.abs(gradient), equinox=equinox_weight(zero), wn_jax=ours)
    expect_wrong(np.abs(gradient).max() > 1e5, "flax.linen.WeightNorm", "zero row")
    expect_wrong(np.isnan(equinox_weight(zero)).any(), "equinox.nn.WeightNorm", "zero row")


def test_small_norms():
    v = jnp.full((4, 2), 0.5e-6)
    weights = {"linen": linen_weight(v), "equinox": equinox_weight(v), "wn_jax": our_weight(v)}
    show("small norms", **{name: length(weight) for name, weight in weights.items()})
    np.testing.assert_allclose(length(our_weight(v)), 1, rtol=1e-6)
    expect_wrong(abs(length(linen_weight(v))[0] - 1) > 0.2, "flax.linen.WeightNorm", "small norms")


@pytest.mark.parametrize("peer", [linen_weight, equinox_weight])
def test_float16(peer):
    v = jnp.full((10_000, 1), 300, jnp.float16)
    np.testing.assert_allclose(length(our_weight(v)), 1, rtol=1e-3)
    show("float16", **{peer.__name__: length(peer(v[:2000])), "wn_jax": length(our_weight(v))})
    node = wn.WeightNorm.from_weight(v, 0)
    assert (node.weight() == v).all()
    expect_wrong(abs(length(peer(v[:2000]))[0] - 1) > 0.5, peer.__name__, "float16")


def test_bfloat16():
    v = jax.random.normal(jax.random.key(0), (4096, 16)).astype(jnp.bfloat16)

    def error(weight):
        return np.abs(length(weight) - 1).max()

    show("bfloat16", linen=error(linen_weight(v)), equinox=error(equinox_weight(v)), wn_jax=error(our_weight(v)))
    assert error(our_weight(v)) <= 2e-3
    assert error(our_weight(v)) < min(error(linen_weight(v)), error(equinox_weight(v)))


def test_sharding_names():
    x = jnp.ones((1, 4))
    names = ("in", "model")
    nodes = LinenPeer(3, wrapped=False, names=names).init(jax.random.key(0), x)
    nodes = wn.reparameterize(nodes, wn.kernel_axes(nodes))
    node = nodes["params"]["Dense_0"]["kernel"]
    assert (node.g.names, node.v.names) == ((None, "model"), names)
    (scale,) = LinenPeer(3, names=names).init(jax.random.key(0), x)["params"]["WeightNorm_0"].values()
    expect_wrong(not isinstance(scale, nn.Partitioned), "flax.linen.WeightNorm", "sharding names on the scale")


def test_a_forward_pass_changes_no_parameter():
    x = jnp.ones((2, 4))
    linear = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    graph, state = nnx.split(linear)
    nodes = wn.reparameterize(state, wn.kernel_axes(state))
    before = jax.tree.map(np.array, nodes)
    wn.wrap(lambda state, x: nnx.merge(graph, state)(x))(nodes, x)
    jax.tree.map(np.testing.assert_array_equal, nodes, before)
    peer = nnx.WeightNorm(linear, rngs=nnx.Rngs(0))
    kernel = np.array(linear.kernel[...])
    peer(x)
    expect_wrong((np.array(linear.kernel[...]) != kernel).any(), "flax.nnx.WeightNorm", "mutation")
