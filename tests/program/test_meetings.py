"""The other operands that a weight meets in its contractions: data, constants, learned vectors, weights, gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wn_jax as wn
from wn_jax._program.notes import Reason

X = jax.random.normal(jax.random.key(0), (6, 5, 4))


def normal(*shape, seed=1):
    return jax.random.normal(jax.random.key(seed), shape)


def reasons(fn, params, *args):
    return {use.path: use.reason for use in wn.weight_uses(fn)(params, *args)}


def unrolled(p, x):
    """A recurrent network whose first state is zeros, or is learned."""
    h = jnp.broadcast_to(p["start"], (x.shape[0], 3)) if "start" in p else jnp.zeros((x.shape[0], 3))
    for t in range(x.shape[1]):
        h = jnp.tanh(x[:, t] @ p["wx"] + h @ p["wh"])
    return h


@pytest.mark.parametrize("start", [None, (3,), (1, 3)])
def test_a_first_state_does_not_undo_the_other_uses(start):
    p = {"wx": normal(4, 3), "wh": normal(3, 3), **({"start": jnp.ones(start)} if start else {})}
    assert wn.infer_axes(unrolled)(p, X) == {"wx": (-2,), "wh": (-2,)}


def test_a_learned_vector_at_one_use_does_not_undo_the_others():
    def both(p, x):
        return x @ p["w"] + p["vector"] @ p["w"]

    assert wn.infer_axes(both)({"w": normal(4, 3), "vector": jnp.ones(4)}, X) == {"w": (-2,)}


@pytest.mark.parametrize("norm", [lambda z: z, lambda z: jax.nn.standardize(z, axis=-1)])
def test_learned_queries_that_are_repeated_over_a_batch(norm):
    """As Perceiver, DETR and the pooling head of a vision transformer have them."""

    def pooled(p, x):
        query = norm(jnp.broadcast_to(p["latents"], (x.shape[0], *p["latents"].shape))) @ p["query"]
        return jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", query, x @ p["key"])) @ (x @ p["value"])

    p = {"latents": normal(3, 4), **{name: normal(4, 4) for name in ("query", "key", "value")}}
    assert wn.infer_axes(pooled)(p, X) == {"query": (-2,), "key": (-2,), "value": (-2,)}


def test_a_map_head_of_attention():
    class Head(nn.Module):
        @nn.compact
        def __call__(self, x):
            probe = self.param("probe", nn.initializers.ones, (1, 1, 4))
            return nn.MultiHeadDotProductAttention(num_heads=2)(jnp.tile(probe, (x.shape[0], 1, 1)), x)[:, 0]

    params = Head().init(jax.random.key(0), X)
    found = wn.infer_axes(Head().apply)(params, X)
    assert found["params/MultiHeadDotProductAttention_0/query/kernel"] == (-3,)


def test_positions_that_a_small_network_makes_of_constants():
    def biased(p, x):
        table = jnp.linspace(-1, 1, 5)[:, None]
        return x + jnp.tanh(table @ p["first"]) @ p["second"]

    p = {"first": normal(1, 7), "second": normal(7, 4)}
    assert wn.infer_axes(biased)(p, X) == {"first": (-2,), "second": (-2,)}


def adapted(p, x):
    return x @ (p["a"] @ p["b"])


def rotated(p, x):
    return x @ (p["w"] @ jnp.eye(4))


def of_experts(p, x):
    """The matrices are made by a network, from a vector for each expert."""
    made = (jnp.tanh(p["expert"] @ p["first"] + jnp.broadcast_to(p["bias"], (6, 7))) @ p["second"]).reshape(6, 4, 3)
    return jnp.einsum("ebi,eio->ebo", x, made)


def weights_of_one_sum(p, x):
    return jnp.einsum("bi,ij,jk->bk", x[:, 0], p["a"], p["b"], optimize=[(1, 2), (0, 1)])


@pytest.mark.parametrize(
    ("fn", "params", "expected"),
    [
        (adapted, {"a": normal(4, 2), "b": normal(2, 3)}, {"a": "product", "b": "product"}),
        (rotated, {"w": normal(3, 4).T}, {"w": "no data"}),
        (weights_of_one_sum, {"a": normal(4, 5), "b": normal(5, 3)}, {"a": "product", "b": "product"}),
        (
            of_experts,
            {"expert": normal(6, 2), "first": normal(2, 7), "bias": normal(7), "second": normal(7, 12)},
            {"expert": "product", "first": "product", "bias": "elementwise", "second": "no data"},
        ),
    ],
)
def test_what_serves_as_a_weight_tells_nothing_of_the_axes_of_what_it_is_made_of(fn, params, expected):
    if fn is rotated:
        params = {"w": normal(4, 4)}
    assert reasons(fn, params, X) == expected


def energy(p, x):
    return (jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]).sum()


def with_forces(p, x):
    return energy(p, x), -jax.grad(energy, 1)(p, x)


def forces_alone(p, x):
    return -jax.grad(energy, 1)(p, x)


def pulled_back(p, x):
    return jax.vjp(lambda x: jnp.tanh(x @ p["a"]) @ p["b"] @ p["c"], x)[1](jnp.ones((6, 5, 1)))


P = {"a": normal(4, 7), "b": normal(7, 6), "c": normal(6, 1)}
AXES = dict.fromkeys(P, (-2,))


@pytest.mark.parametrize("fn", [with_forces, forces_alone, pulled_back])
def test_a_program_that_differentiates_inside_says_so(fn):
    assert set(reasons(fn, P, X).values()) == {Reason.DIFFERENTIATED}
    assert "pass the function that it differentiates" in str(wn.weight_uses(fn)(P, X))


@pytest.mark.parametrize("fn", [with_forces, forces_alone])
@pytest.mark.parametrize("scale", ["auto", "output", "weight"])
def test_with_the_axes_of_the_inner_function_all_is_right(fn, scale):
    assert wn.infer_axes(energy)(P, X) == AXES
    nodes = wn.reparameterize(P, AXES)
    nodes = jax.tree.map(lambda a: 1.1 * a, nodes)

    def loss(apply):
        return lambda nodes: sum(jnp.sum(y**2) for y in jax.tree.leaves(apply(nodes)))

    wrapped, plain = loss(lambda n: wn.wrap(fn, scale=scale)(n, X)), loss(lambda n: fn(wn.reconstruct(n), X))
    found, expected = (jax.jit(jax.value_and_grad(f))(nodes) for f in (wrapped, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def test_data_initialization_of_a_program_that_differentiates_names_what_it_leaves():
    nodes = wn.reparameterize(P, AXES)
    with pytest.warns(UserWarning, match="pass the function that it differentiates"):
        new = wn.init_from_data(with_forces)(nodes, X)
    jax.tree.map(np.testing.assert_array_equal, new, nodes)


def test_a_weight_that_is_made_complex_says_so():
    found = wn.weight_uses(lambda p, x: x.astype(complex) @ p["w"].astype(complex))({"w": normal(4, 3)}, X)
    assert [(use.reason, use.by) for use in found] == [(Reason.DTYPE, "convert_element_type")]


def kernel_of_a_basis(p, x):
    """A weight times constants, by which data is multiplied and summed: `(x @ w) @ basis`."""
    return (x[:, 0, :, None] * (p["w"] @ jnp.cos(jnp.arange(18.0).reshape(3, 6)))).sum(1)


def stacked_in_rows(p, x):
    return jax.lax.map(lambda w: x[:, 0, :2] @ w, p["w"].reshape(2, 2, 3))


def counted_in_rows(p, x):
    return jax.lax.fori_loop(0, 2, lambda i, y: y + x[:, 0, :2] @ p["w"].reshape(2, 2, 3)[i], jnp.zeros((6, 3)))


def block_diagonal(p, x):
    blocks = jnp.where(jnp.eye(2, dtype=bool)[:, None, :, None], p["w"].reshape(2, 2, 3)[:, :, None, :], 0)
    return x[:, 0] @ blocks.reshape(4, 6)


@pytest.mark.parametrize("fn", [kernel_of_a_basis, stacked_in_rows, counted_in_rows, block_diagonal])
def test_no_axis_is_claimed_that_the_program_sums_otherwise(fn):
    assert wn.infer_axes(fn)({"w": normal(4, 3)}, X) == {}


def test_a_returned_product_with_a_constant_does_not_undo_the_other_uses():
    assert wn.infer_axes(lambda p, x: (x @ p["w"], jnp.ones((2, 4)) @ p["w"]))({"w": normal(4, 3)}, X) == {"w": (-2,)}


def test_numbers_that_a_conversion_changes_are_not_known():
    def chosen(p, x):
        return jnp.where(jnp.full((6, 4), 2).astype(bool), x[:, 0], 0) @ p["w"]

    def counted_as_bool(p, x):  # 0, 1, 1
        return jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"][i.astype(bool).astype(int)]), x)

    assert wn.infer_axes(chosen)({"w": normal(4, 3)}, X) == {"w": (-2,)}
    nodes = wn.reparameterize({"w": normal(3, 4, 4)}, {"w": -2})
    with pytest.warns(UserWarning, match="only a run chooses"):
        wn.init_from_data(counted_as_bool)(nodes, X)
