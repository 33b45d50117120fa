"""`wrap(strict=True)`: an error where a weight is rebuilt that should not be, and none anywhere else.

Each program has a weight of 16 x 16 and an output of 2 x 16, so that the outputs are the cheaper side, and the axes of
its weight are proved.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

import wn_jax as wn
from wn_jax._program.notes import Reason

X = jax.random.normal(jax.random.key(0), (2, 16))
W = jax.random.normal(jax.random.key(1), (16, 16))
SHARDING = jax.sharding.NamedSharding(jax.make_mesh((1,), ("a",)), jax.sharding.PartitionSpec())


def nodes_of(fn, params=None, axes=(-2,)):
    return wn.reparameterize(params or {"w": W}, {"w": axes})


def in_custom_vjp(p, x):
    matmul = jax.custom_vjp(jnp.matmul)
    matmul.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, y: (y @ kept[1].T, kept[0].T @ y))
    return matmul(x, p["w"])


def in_while_loop(p, x):
    return lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["w"])), (0, x))[1]


def in_float16(p, x):
    return x.astype("float16") @ p["w"].astype("float16")


def returned(p, x):
    return x @ p["w"], p["w"]


def named(p, x):
    return x @ checkpoint_name(p["w"], "kernel")


def rounded(p, x):
    return x @ lax.reduce_precision(p["w"], 8, 7)


def converted_twice(p, x):
    return x @ p["w"].astype(jnp.bfloat16).astype(jnp.float32)


def in_a_jit_with_shardings(p, x):
    return jax.jit(jnp.matmul, in_shardings=SHARDING)(x, p["w"])


def carried(p, x):
    return lax.fori_loop(0, 2, lambda _, state: (jnp.tanh(state[0] @ state[1]), state[1]), (x, p["w"]))[0]


def from_a_cond(p, x):
    return x @ lax.cond(jnp.zeros(()) > 0, lambda w: w.T, lambda w: w.T, p["w"]).T  # data chooses nothing


REFUSED = {
    "custom rule": (in_custom_vjp, "dot_general in a function with a derivative rule of its own; move"),
    "while_loop": (in_while_loop, "dot_general in a while_loop; use scan"),
    "dtype": (in_float16, "dot_general in float16 and float32, too narrow"),
    "returned": (returned, "the function returns it, too; return it from another"),
    "name": (named, "name gets the weight: the name is for a remat policy"),
    "precision": (rounded, "reduce_precision gets the weight: it rounds"),
    "conversions": (converted_twice, "convert_element_type gets the weight: the scale cannot be moved"),
    "jit": (in_a_jit_with_shardings, "jit gets the weight: it is a call with options of its own"),
    "cond": (from_a_cond, "a cond or switch returns it"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("scale", ["auto", "output"])
def test_a_weight_that_cannot_give_its_scale_away_is_an_error(name, scale):
    fn, why = REFUSED[name]
    assert wn.infer_axes(fn)({"w": W}, X) == {"w": (-2,)}, "its uses are proved"
    nodes = nodes_of(fn)
    for run in (wn.wrap(fn, scale=scale, strict=True), jax.jit(wn.wrap(fn, scale=scale, strict=True))):
        with pytest.raises(ValueError, match=f"(?s)strict=True.*\n  w: {re.escape(why)}.*or wrap without strict"):
            run(nodes, X)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-2),
        wn.wrap(fn, scale=scale)(nodes, X),
        fn({"w": W}, X),
    )


def test_a_sharding_that_is_asked_for_is_an_error():
    mesh = jax.make_mesh((1,), ("a",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x, w = jax.device_put((X, W), jax.sharding.NamedSharding(mesh, jax.P()))

        def model(p, x):
            return jnp.einsum("bi,io->bo", x, p["w"], out_sharding=jax.P())

        with pytest.raises(ValueError, match="dot_general gets the weight: it asks for a sharding of its output"):
            jax.jit(wn.wrap(model, strict=True))(wn.reparameterize({"w": w}, {"w": (-2,)}), x)


def test_a_norm_over_other_axes_is_an_error():
    def model(p, x):
        return x @ p["w"]

    for axes in ((-1,), (-2, -1)):
        nodes = nodes_of(model, axes=axes)
        if axes == (-1,):
            with pytest.raises(ValueError, match=r"w: dot_general sums over \(-2,\), where its norm does not run"):
                wn.wrap(model, strict=True)(nodes, X)
        else:  # one scale for all
            np.testing.assert_allclose(wn.wrap(model, strict=True)(nodes, X), X @ W, rtol=1e-4, atol=1e-5)


def test_all_weights_are_named():
    def model(p, x):
        for name in ("a", "b"):
            x = in_custom_vjp({"w": p["layers"][name]}, x)
        return x @ checkpoint_name(p["c"], "c") @ checkpoint_name(p["d"], "d")

    params = {"layers": {"a": W, "b": W}, "c": W, "d": W}
    nodes = wn.reparameterize(params, lambda path, leaf: -2)
    with pytest.raises(ValueError, match=r"\n  layers/a: .*\n  layers/b: "):
        wn.wrap(model, strict=True)(nodes, X)
    nodes = wn.reparameterize(params, {"c": -2, "d": -2})
    with pytest.raises(ValueError, match=r"\n  c: .*\n  d: "):
        wn.wrap(model, strict=True)(nodes, X)


def test_weights_that_are_concatenated_are_all_named():
    def model(p, x):
        return x @ checkpoint_name(jnp.concatenate([p["a"], p["b"]], 1), "both")

    nodes = wn.reparameterize({"a": W, "b": W}, lambda path, leaf: -2)
    with pytest.raises(ValueError, match=r"\n  a, b: name gets the weight"):
        wn.wrap(model, strict=True)(nodes, X)


def stacked(p, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]


def dead_code(p, x):
    """Where nobody takes the result, nothing is to be gained."""
    y = x @ p["w"]
    carry = lax.fori_loop(0, 2, lambda _, state: (jnp.tanh(state[0] + 1), state[1] * 2), (y, p["w"]))
    lax.cond(x.sum() > 0, lambda w: w, lambda w: w, p["w"])
    return carry[0], (jnp.sum(p["w"] ** 2), checkpoint_name(p["w"], "w"))[:0]


ALLOWED = {
    "matmul": (lambda p, x: x @ p["w"], W),
    "through jit and remat": (lambda p, x: jax.jit(jax.checkpoint(jnp.matmul))(x, p["w"].T.T), W),
    "scanned stack": (stacked, jnp.stack([W, W])),
    "dead code": (dead_code, W),
    "carried as it is, which JAX makes a constant of the loop": (carried, W),
    "looked up besides, so not proved": (lambda p, x: (x @ p["w"]) + p["w"][jnp.arange(2)], W),
}


@pytest.mark.parametrize("name", ALLOWED)
@pytest.mark.parametrize("scale", ["auto", "output"])
def test_what_is_not_rebuilt_in_vain_is_no_error(name, scale):
    fn, w = ALLOWED[name]
    nodes = wn.reparameterize({"w": w}, {"w": (-2,)})
    for run in (lambda fn: fn, jax.jit):
        actual = run(wn.wrap(fn, scale=scale, strict=True))(nodes, X)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), actual, fn({"w": w}, X))


def test_a_weight_that_is_the_smaller_side_is_no_error_of_auto():
    x = jnp.concatenate([X] * 20)
    for name in ("custom rule", "name", "returned", "while_loop"):
        fn, _ = REFUSED[name]
        wn.wrap(fn, strict=True)(nodes_of(fn), x)
        with pytest.raises(ValueError, match="strict=True"):
            wn.wrap(fn, scale="output", strict=True)(nodes_of(fn), x)


def test_plain_trees_pass_and_the_weights_side_is_refused():
    np.testing.assert_array_equal(wn.wrap(in_while_loop, strict=True)({"w": W}, X), in_while_loop({"w": W}, X))
    with pytest.raises(ValueError, match="strict=True is for scale='auto' and 'output'"):
        wn.wrap(named, scale="weight", strict=True)


def test_a_size_that_is_left_open():
    def model(p, x):
        return x @ p["w"]

    nodes = nodes_of(model)
    (batch,) = jax.export.symbolic_shape("batch")
    x = jax.ShapeDtypeStruct((batch, 16), jnp.float32)
    jax.export.export(jax.jit(lambda x: wn.wrap(model, strict=True)(nodes, x)))(x)
    with pytest.raises(ValueError, match="leaves a size open"):
        jax.export.export(jax.jit(lambda x: wn.wrap(model, scale="output", strict=True)(nodes, x)))(x)


def test_a_pallas_call_is_named_and_gets_the_weight():
    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    def model(p, x):
        return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(X.shape, X.dtype), interpret=True)(x, p["w"])

    (use,) = wn.weight_uses(model)({"w": W}, X)
    assert (use.reason, use.by) == (Reason.OPAQUE, "pallas_call")
    nodes = nodes_of(model)
    for scale in ("auto", "output"):
        for strict in (False, True):  # not proved, so strict has nothing to say
            np.testing.assert_allclose(
                wn.wrap(model, scale=scale, strict=strict)(nodes, X), model({"w": W}, X), rtol=1e-4, atol=1e-5
            )
