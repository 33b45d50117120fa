"""Dead code is no use: a program reads as the same program that was written without it.

Each case is a pair of functions that compute the same, the second without what nobody takes. The oracle is the second.
"""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import wn_jax as wn
from wn_jax._program import jaxpr
from wn_jax._program.dead_code import live
from wn_jax._program.notes import Reason

X = jax.random.normal(jax.random.key(0), (3, 5, 4))
PARAMS = {
    "w": jax.random.normal(jax.random.key(1), (4, 4)),
    "u": jax.random.normal(jax.random.key(2), (4, 4)),
    "b": jnp.ones(4),
}


def _both(p, x):
    """A model with much besides, which has a penalty, a second use and a use of another shape among it."""
    y = jnp.tanh(x @ p["w"] + p["b"])
    return y @ p["u"], {"penalty": jnp.sum(p["w"] ** 2), "again": x @ p["u"], "table": p["w"][jnp.arange(2)]}


def _plain(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["u"]


def _through(transform):
    return lambda p, x: transform(_both)(p, x)[0]


def _custom_jvp(fn):
    rule = jax.custom_jvp(fn)
    rule.defjvp(lambda primals, tangents: jax.jvp(fn, primals, tangents))
    return rule


def _custom_vjp(fn):
    rule = jax.custom_vjp(fn)
    rule.defvjp(lambda p, x: (fn(p, x), (p, x)), lambda given, out: jax.vjp(fn, *given)[1](out))
    return rule


def _plain_rule(make):
    return lambda p, x: make(_plain)(p, x)


def _scan(dead):
    """A layer applied again and again. The dead one stacks, carries and hands on what nobody takes."""

    def model(p, x):
        def step(carry, x):
            h, w, square, _ = carry
            h = jnp.tanh(x @ p["w"] + h @ p["u"])
            if dead:
                # A carry that feeds another dead one, a weight that changes, and one that is handed out.
                return (h, w * 2, square + jnp.sum(w**2), p["u"]), (jnp.sum(p["w"] ** 2), p["u"][0])
            return (h, 0.0, 0.0, 0.0), None

        start = jnp.zeros((5, 4))
        carry = (start, p["w"], 0.0, p["w"]) if dead else (start, 0.0, 0.0, 0.0)
        return lax.scan(step, carry, x)[0][0]

    return model


def _nested_scans(dead):
    def model(p, x):
        def outer(carry, x):
            h, w = carry
            return (_scan(dead)(p, x[None]) + h, w + 1 if dead else w), p["w"].sum() if dead else None

        return lax.scan(outer, (jnp.zeros((5, 4)), p["w"] if dead else 0.0), x)[0][0]

    return model


def _while(dead):
    def model(p, x):
        def trip(state):
            i, h, w, square = state
            if dead:
                return i + 1, jnp.tanh(h @ p["w"]), w * 2, square + jnp.sum(w**2) + jnp.sum(p["w"] ** 2)
            return i + 1, jnp.tanh(h @ p["w"]), w, square

        start = (0, x, p["u"] if dead else 0.0, 0.0)
        return lax.while_loop(lambda state: state[0] < 3, trip, start)[1] @ p["u"]

    return model


def _cond(dead):
    def model(p, x):
        def yes(x):
            return (x @ p["w"], p["u"], jnp.sum(p["w"] ** 2)) if dead else x @ p["w"]

        def no(x):
            return (x @ p["w"] * 2, p["w"], 0.0) if dead else x @ p["w"] * 2

        out = lax.cond(x.sum() > 0, yes, no, x)
        return (out[0] if dead else out) @ p["u"]

    return model


def _gradient_left_over(p, x):
    """The derivative of a penalty by data, of which only the value is taken."""
    return jax.value_and_grad(lambda x: jnp.sum(_plain(p, x)))(x)[0]


CASES = {
    "nothing around": (_through(lambda fn: fn), _plain),
    "jit": (_through(jax.jit), lambda p, x: jax.jit(_plain)(p, x)),
    "jit in jit": (_through(lambda fn: jax.jit(lambda p, x: jax.jit(fn)(p, x))), _plain),
    "remat": (_through(jax.checkpoint), lambda p, x: jax.checkpoint(_plain)(p, x)),
    "custom_jvp": (_through(_custom_jvp), _plain_rule(_custom_jvp)),
    "custom_vjp": (_through(_custom_vjp), _plain_rule(_custom_vjp)),
    "scan": (_scan(True), _scan(False)),
    "scan in scan": (_nested_scans(True), _nested_scans(False)),
    "while_loop": (_while(True), _while(False)),
    "cond": (_cond(True), _cond(False)),
    "value_and_grad": (_gradient_left_over, lambda p, x: jnp.sum(_plain(p, x))),
}


@pytest.mark.parametrize("name", CASES)
def test_dead_code_is_no_use(name):
    dead, clean = CASES[name]
    assert wn.weight_uses(dead)(PARAMS, X) == wn.weight_uses(clean)(PARAMS, X)
    nodes = wn.reparameterize(PARAMS, wn.infer_axes(dead)(PARAMS, X))
    for scale in ("auto", "output"):
        np.testing.assert_allclose(wn.wrap(dead, scale=scale)(nodes, X), clean(PARAMS, X), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["nothing around", "jit", "remat", "custom_jvp"])
def test_a_weight_with_a_live_and_a_dead_use_is_initialized(name):
    dead, clean = CASES[name]
    nodes = wn.reparameterize(PARAMS, {"w": (-2,), "u": (-2,)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after = wn.init_from_data(dead)(nodes, X)
    expected = wn.init_from_data(clean)(nodes, X)
    jax.tree.map(np.testing.assert_array_equal, after, expected)
    assert (after["w"].g != nodes["w"].g).all()


def test_what_runs_for_its_effects_is_a_use():
    def told(p, x):
        jax.debug.callback(lambda square: None, jnp.sum(p["w"] ** 2))
        return _plain(p, x)

    def told_inside(p, x):
        def step(carry, x):
            jax.debug.print("{}", jnp.sum(p["w"] ** 2), ordered=True)
            return carry, None

        lax.scan(step, 0.0, x)
        return _plain(p, x)

    for fn in (told, jax.jit(told), told_inside):
        reasons = {use.path: use.reason for use in wn.weight_uses(fn)(PARAMS, X)}
        assert reasons == {"w": Reason.PENALTY, "u": None, "b": Reason.ELEMENTWISE}


def test_what_is_used_by_dead_code_alone_is_unused():
    uses = wn.weight_uses(lambda p, x: (x @ p["w"], x @ p["u"])[0])(PARAMS, X)
    assert {use.path: use.reason for use in uses} == {"w": None, "u": Reason.UNUSED, "b": Reason.UNUSED}


def test_a_module_that_returns_more_than_is_taken():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            out = {"stem": nn.Dense(6, name="stem")(x)}
            head = nn.Dense(3, name="head")
            out["by place"] = head(out["stem"])
            out["logits"] = head(out["stem"].mean(1))
            return out["logits"], out

    net = Net()
    variables = jax.eval_shape(net.init, jax.random.key(0), X)
    uses = wn.weight_uses(lambda variables, x: net.apply(variables, x)[0])(variables, X)
    assert {use.path: len(use.uses) for use in uses if use.reduction == (-2,)} == {
        "params/stem/kernel": 1,
        "params/head/kernel": 1,
    }


def test_a_collective_that_nobody_takes_is_dead():
    """It has the effect that it names a mesh axis, which keeps nothing alive."""
    program = jax.make_jaxpr(lambda x: (lax.psum(x, "i"), x * 2)[1], axis_env=[("i", 2)])(1.0)
    found = live(jaxpr.Body(program.jaxpr, ()))
    assert [found.is_dead((i,)) for i in range(2)] == [True, False]


def test_each_body_of_deep_loops_is_read_few_times(monkeypatch):
    """Loops in loops do not multiply the cost."""

    def nested(depth):
        def fn(x):
            def step(carry, _):
                a, b, c = carry
                return (nested(depth - 1)(c) if depth else jnp.sin(c), a, b), a

            return lax.scan(step, (x, x, x), None, length=2)[0][2]

        return fn

    count = 0
    backwards = jaxpr.backwards

    def counted(*args):
        nonlocal count
        count += 1
        return backwards(*args)

    monkeypatch.setattr(jaxpr, "backwards", counted)
    depth = 8
    live(jaxpr.trace(nested(depth), (1.0 * X[0, 0, 0],), {}, "").body)
    assert count <= 4 * (depth + 2)
