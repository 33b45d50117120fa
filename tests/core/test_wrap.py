"""`wrap`: the three places of the scale give one function, and the output side multiplies no weight."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wn_jax as wn
from tests.zoo import ZOO
from tests.zoo.arrays import bodies, cast, equations, split, zoo

WITH_NODES = [name for name, model in ZOO.items() if model().axes]
SAMPLE = WITH_NODES[::16]  # of the matrix, in the default run
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 0.1, jnp.float16: 2e-2}


def assert_close(got, expected, limit):
    """Each array to `limit` of the largest number of its kind: outputs are compared with outputs, gradients alike."""
    top = max((float(np.abs(np.asarray(b, np.float64)).max(initial=0)) for b in expected), default=0)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=0, atol=limit * top)


def everything(name, scale, dtype, hows):
    """The results of `wrap` by transformation: a list of outputs and a list of derivatives."""
    model, nodes = zoo(name)
    arrays, merge = split(cast(nodes, dtype))
    x = cast(model.x, dtype)
    fn = wn.wrap(model.fn, scale=scale)

    def output(arrays):
        return fn(merge(arrays), x)

    def loss(arrays):
        return jnp.mean(jnp.sin(output(arrays).astype(jnp.float32) / 8))  # not too steep for rounded outputs

    def mapped(arrays):
        stacks = [jnp.stack([a, a / 2]) for a in arrays]
        return [jax.vmap(output)(stacks)], jax.vmap(jax.grad(loss))(stacks)

    def product(arrays):  # Hessian times a vector
        tangents = [jnp.cos(a * 7) for a in arrays]
        return [], jax.grad(lambda arrays: jax.jvp(loss, (arrays,), (tangents,))[1])(arrays)

    ways = {
        "grad": lambda arrays: ([output(arrays)], jax.grad(loss)(arrays)),
        "remat": lambda arrays: ([], jax.grad(jax.checkpoint(loss))(arrays)),
        "vmap": mapped,
        "hvp": product,
    }
    return arrays, lambda arrays: {how: ways[how](arrays) for how in hows}


def check(name, dtype, hows, scales=("output",)):
    """Compares in one compiled function, without XLA's optimizations, which take most of the time."""
    hows = [how for how in hows if how != "hvp" or zoo(name)[0].forward_mode]
    sides = {scale: everything(name, scale, dtype, hows) for scale in (*scales, "weight")}
    arrays = sides["weight"][0]
    run = jax.jit(
        lambda arrays: {scale: fn(arrays) for scale, (_, fn) in sides.items()},
        compiler_options={"xla_backend_optimization_level": 0},
    )
    found = run(arrays)
    for scale in scales:
        for how in hows:
            limit = TOLERANCE[jnp.bfloat16 if "bfloat16" in name else dtype] * (5 if how == "hvp" else 1)
            for got, expected in zip(found[scale][how], found["weight"][how], strict=True):
                assert_close(got, expected, limit)


@pytest.mark.parametrize("name", WITH_NODES[::8])
def test_the_output_side_equals_the_weight_side(name):
    check(name, jnp.float32, ["grad"])


@pytest.mark.parametrize("name", SAMPLE[::2])
def test_the_output_side_equals_the_weight_side_under_all_transformations(name):
    check(name, jnp.float32, ["remat", "vmap", "hvp"])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", SAMPLE)
def test_the_output_side_equals_the_weight_side_in(name, dtype):
    check(name, dtype, ["grad"])


@pytest.mark.parametrize("name", SAMPLE)
def test_the_output_side_equals_the_weight_side_outside_jit(name):
    model, nodes = zoo(name)
    got, expected = (wn.wrap(model.fn, scale=scale)(nodes, model.x) for scale in ("output", "weight"))
    assert_close([got], [expected], TOLERANCE[jnp.float32])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, jnp.float32) for name in WITH_NODES),
        *((name, jnp.bfloat16) for name in WITH_NODES[::4]),
        *((name, jnp.float16) for name in WITH_NODES[::8]),  # where all scales go to the weights
    ],
)
@pytest.mark.usefixtures("quickly_compiled")
def test_every_side_equals_the_weight_side_everywhere(name, dtype):
    if (name, dtype) == ("nnx_attention", jnp.float16):
        pytest.skip("Flax asks for a float16 dot that CPUs do not have, with or without nodes")
    others = ("remat", "vmap", "hvp") if dtype == jnp.float32 else ("remat", "vmap")
    own = others[WITH_NODES.index(name) % len(others)]  # in turn, as all of them of all models take ten minutes
    check(name, dtype, ["grad", own], scales=("auto", "output"))


def products_of_parameters(jaxpr, data):
    """The shapes of all products into which no data flows. `data`: into which of the inputs it does."""
    flows = dict(zip(jaxpr.invars, data, strict=True))
    found = collections.Counter()

    for eqn in jaxpr.eqns:
        operands = [not hasattr(var, "val") and flows.get(var, False) for var in eqn.invars]
        for body in bodies(eqn):
            looped = str(eqn.primitive) in ("scan", "while") and any(operands)
            inside = [
                flag or (looped and var.aval.shape in [out.aval.shape for out in body.outvars])  # perhaps a carry
                for flag, var in zip(operands[len(operands) - len(body.invars) :], body.invars, strict=True)
            ]
            found += products_of_parameters(body, inside)
        if str(eqn.primitive) == "mul" and not any(operands):
            found[tuple(sorted(n for n in eqn.outvars[0].aval.shape if n > 1))] += 1
        flows.update(dict.fromkeys(eqn.outvars, any(operands)))
    return found


@pytest.mark.parametrize("name", [name for name in WITH_NODES if ZOO[name]().output][::2])
def test_the_output_side_multiplies_no_weight(name):
    model = ZOO[name]()
    nodes = wn.reparameterize(model.params, {path: model.axes[path] for path in model.output})
    found = jax.tree.leaves(nodes, is_leaf=lambda x: isinstance(x, wn.WeightNorm))
    weights = [jax.tree.leaves(node.v)[0].shape for node in found if isinstance(node, wn.WeightNorm)]

    def products(fn, params):
        arrays, merge = split(params)
        jaxpr = jax.make_jaxpr(lambda arrays, x: fn(merge(arrays), x))(arrays, model.x).jaxpr
        shapes = products_of_parameters(jaxpr, [False] * len(arrays) + [True] * (len(jaxpr.invars) - len(arrays)))
        return collections.Counter({shape: n for shape, n in shapes.items() if np.prod(shape) >= smallest})

    smallest = min(map(np.prod, weights))
    plain = products(model.fn, model.params)
    assert products(wn.wrap(model.fn, scale="output"), nodes) <= plain
    assert (products(wn.wrap(model.fn, scale="weight"), nodes) - plain).total() >= len(weights)  # so it can be seen


def scan_bodies(fn, *args):
    """Of each scan of a program, the results of at least 1,000 numbers that are no matmuls."""
    scans = [eqn for eqn in equations(jax.make_jaxpr(fn)(*args).jaxpr) if str(eqn.primitive) == "scan"]
    return [
        collections.Counter(
            (str(eqn.primitive), var.aval.shape)
            for body in bodies(scan)
            for eqn in body.eqns
            for var in eqn.outvars
            if var.aval.size >= 1000
        )
        for scan in scans
    ]


@pytest.mark.parametrize("scale", ["auto", "output", "weight"])
def test_the_loops_of_an_lstm_hold_nothing_that_the_plain_models_do_not(scale):
    import flax.linen as nn

    model = nn.RNN(nn.OptimizedLSTMCell(32))
    x = jnp.ones((2, 128, 32))
    params = model.init(jax.random.key(0), x)
    nodes = wn.reparameterize(params, wn.infer_axes(model.apply)(params, x))

    def gradient(apply):
        return jax.grad(lambda params, x: jnp.sum(apply(params, x) ** 2))

    plain = scan_bodies(gradient(model.apply), params, x)
    assert len(plain) == 2  # forward and backward
    assert scan_bodies(gradient(wn.wrap(model.apply, scale=scale)), nodes, x) == plain


def test_auto_takes_the_side_with_fewer_numbers():
    weight = wn.reparameterize({"w": jnp.ones((16, 16))}, {"w": -2})

    def products(batch):
        jaxpr = jax.make_jaxpr(wn.wrap(lambda p, x: x @ p["w"]))(weight, jnp.ones((batch, 16))).jaxpr
        return [eqn.outvars[0].aval.shape for eqn in equations(jaxpr) if str(eqn.primitive) == "mul"]

    assert products(4) == [(4, 16)]  # the output
    assert products(64) == [(16, 16)] * 2  # the weight: v times a power of two, which is mostly 1, and the scale
    table = wn.weight_uses(lambda p, x: x @ p["w"])
    assert [table(weight, jnp.ones((n, 16)))[0].scale for n in (4, 64)] == ["output", "weight"]


def test_a_bfloat16_output_is_scaled_in_float32_and_rounded_once():
    node = wn.reparameterize({"w": jnp.ones((64, 4))}, {"w": -2})
    fn = wn.wrap(lambda p, x: x @ p["w"].astype(jnp.bfloat16), scale="output")
    jaxpr = jax.make_jaxpr(fn)(node, jnp.ones((8, 64), jnp.bfloat16)).jaxpr
    (product,) = [eqn for eqn in equations(jaxpr) if str(eqn.primitive) == "mul"]
    assert product.outvars[0].aval.dtype == jnp.float32
    assert jaxpr.outvars[0].aval.dtype == jnp.bfloat16


@pytest.mark.parametrize("dead", ["g", "v", "none"])
@pytest.mark.parametrize("batch", [1, 2])
def test_second_derivatives_on_the_outputs_where_a_feature_is_dead(batch, dead):
    x = jax.random.normal(jax.random.key(0), (batch, 3))
    node = wn.WeightNorm.from_weight(jax.random.normal(jax.random.key(1), (3, 4)), -2)
    if dead != "none":
        node = dataclasses.replace(node, **{dead: getattr(node, dead).at[:, 0].set(0)})
    direction = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(2), leaf.shape), node)

    def products(scale):
        apply = wn.wrap(lambda kernel, x: x @ kernel, scale=scale)
        gradient = jax.grad(lambda node: jnp.sum(jnp.tanh(apply(node, x)) ** 2))
        along = lambda node: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient(node), direction)))  # noqa: E731
        return jax.tree.leaves((jax.jvp(gradient, (node,), (direction,))[1], jax.grad(along)(node)))

    for own, expected in zip(products("output"), products("weight"), strict=True):
        assert np.isfinite(own).all()
        np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-5)
