"""The facts about the jaxprs of loops that `wn_jax._program` takes for granted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.program.test_jaxpr import VERSION, C, X, assert_equal, bind_all, equation, equations
from wn_jax._program import jaxpr as program

W = jnp.asarray(np.random.default_rng(2).standard_normal((2, 2)), jnp.float32)
KEYS = jax.random.split(jax.random.key(0))
# A function of (X, C, W), and the scan's (constants, carries, slices, length, reverse, unroll).
SCANS = {
    "carry and xs": (lambda x, c, w: lax.scan(lambda s, r: (s + r, r * s), c, x), (0, 1, 1, 3, False, 1)),
    "constants": (lambda x, c, w: lax.scan(lambda s, r: (s @ w + r, s), c, x), (1, 1, 1, 3, False, 1)),
    "only xs": (lambda x, c, w: lax.scan(lambda s, r: (s, r @ w * c), None, x), (2, 0, 1, 3, False, 1)),
    "only carry": (lambda x, c, w: lax.scan(lambda s, _: (s * 2, None), x, length=4), (0, 1, 0, 4, False, 1)),
    "only length": (lambda x, c, w: lax.scan(lambda s, _: (s, c * 2), None, length=4), (1, 0, 0, 4, False, 1)),
    "reverse": (lambda x, c, w: lax.scan(lambda s, r: (s * c + r, s), c, x, reverse=True), (1, 1, 1, 3, True, 1)),
    "unrolled": (lambda x, c, w: lax.scan(lambda s, r: (s * 2 + r, s), c, x, unroll=2), (0, 1, 1, 3, False, 2)),
    "stacks": (
        lambda x, c, w: lax.scan(lambda s, t: (s @ w + t[0].T, {"a": s, "b": t[1]}), x, (x[..., None], x)),
        (1, 1, 2, 3, False, 1),
    ),
    "fori": (lambda x, c, w: lax.fori_loop(0, 3, lambda i, s: s @ w + i, x), (1, 2, 0, 3, False, 1)),
    "map": (lambda x, c, w: lax.map(lambda r: r @ w, x), (1, 0, 1, 3, False, 1)),
    "no trips": (lambda x, c, w: lax.scan(lambda s, r: (s + r, r * 2), c, x[:0]), (0, 1, 1, 0, False, 1)),
    "nested": (
        lambda x, c, w: lax.scan(lambda s, r: lax.scan(lambda s, e: (s * c + e, s @ w), s, r), c, x),
        (2, 1, 1, 3, False, 1),
    ),
    "keys": (
        lambda x, c, w: lax.scan(
            lambda s, k: (s + jax.random.uniform(k), None), c, jax.random.split(jax.random.key(0))
        ),
        (0, 1, 1, 2, False, 1),
    ),
}


@pytest.mark.parametrize("name", SCANS)
def test_the_parts_of_a_scan_are_told_by_rank_and_run_again_the_same(name):
    fn, expected = SCANS[name]
    traced = program.trace(fn, (X, C, W), {}, "in a test")
    again = []

    def rule(eqn, operands, site):
        scan = program.scan(eqn)
        if scan is None:
            return program.bind(eqn, operands)
        consts, carry, xs = scan.grouped(operands)
        if len(site) == 1:
            found = (len(consts), len(carry), len(xs), scan.length, scan.reverse, scan.unroll)
            assert found == expected, VERSION + f"the scan {name} is read as {found}, and is {expected}"
        again.append(site)

        def trip(carry, xs):
            results = program.interpret(scan.body, [*consts, *carry, *xs], rule, site)
            return results[: scan.num_carry], results[scan.num_carry :]

        carry, ys = scan.run(trip, carry, xs)
        return [*carry, *ys]

    results = traced.unflatten(program.interpret(traced.body, traced.arrays, rule))
    assert len(set(again)) == 1 + (name == "nested"), VERSION + f"{name} is no scan"
    assert_equal(results, fn(X, C, W), VERSION + "Scan.run does not give what the scan gives")


def test_invariant_carries_of_loops_are_seen():
    scan = program.scan(equation(lambda x: lax.scan(lambda s, r: ((s[0], s[1] + r, s[0]), r), (C, C, C), x), X))
    if scan.num_carry == 3:
        assert scan.invariant() == [True, False, False], VERSION + "a scan hands its carries on otherwise"
    else:  # JAX made a constant of it
        assert (scan.num_consts, scan.invariant()) == (1, [False, False]), VERSION + "a scan is ordered otherwise"
    looped = equation(lambda x: lax.while_loop(lambda s: s[0] < C[0], lambda s: (s[0] + x[0, 0], s[1]), (0.0, x)), X)
    found = program.while_loop(looped).invariant()
    assert found in ([False, True], [False]), VERSION + "a while hands its carries on otherwise"  # or a constant
    swapped = equation(lambda x: lax.while_loop(lambda s: C[0] < 0, lambda s: (s[1], s[0], s[2] + 1), (x, -x, 0)), X)
    assert program.while_loop(swapped).invariant() == [False] * 3, VERSION + "a while hands its carries on otherwise"


def test_the_operands_of_a_while_are_constants_of_the_condition_then_of_the_body_then_carries():
    limit, factor = jnp.float32(40), jnp.array([2.0, 3.0])
    (eqn,) = equations(
        lambda x, a, b: lax.while_loop(lambda s: s.sum() < a, lambda s: s * b, x), jnp.ones(2), 0 * limit, C
    )
    loop = program.while_loop(eqn)
    assert (loop.condition_consts, loop.body_consts) == (1, 1), VERSION + "a while counts its constants otherwise"
    assert program.shapes(eqn) == [(), (2,), (2,)], VERSION + "a while orders its operands otherwise"
    value = jnp.ones(2)
    while bind_all(loop.condition, [limit, value])[0]:
        (value,) = bind_all(loop.body, [factor, value])
    assert_equal(value, jnp.array([16.0, 81.0]))
    assert_equal(program.bind(eqn, [limit, factor, jnp.ones(2)]), [value])
