"""The table of moves: each row is whole, each has a test, and where a rule is missing its reason holds."""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import primitives

import wn_jax as wn
from tests.program import programs
from tests.program.test_jaxpr import PRIMITIVES
from tests.program.test_views import equations, follow
from wn_jax._program import jaxpr as program
from wn_jax._program.factored import Factored
from wn_jax._program.moves import MOVES, moved
from wn_jax._program.views import View

# These rows no random program draws; the tests below are theirs.
TESTED_HERE = {primitives.name_p, primitives.reduce_precision_p, primitives.sharding_constraint_p, program.reshard_p}
NAMES = ["name", "reduce_precision", "sharding_constraint"]
RNG = np.random.default_rng(0)
V = jnp.asarray(RNG.standard_normal((3, 2)), jnp.float32)
VALUE = Factored(V, jnp.array([[0.3, 1.7]]), jnp.dtype("float32"))


def drawn():
    """The primitives in the moves that random programs are composed of."""
    rng, found = random.Random(0), set()
    for fn, arrays, *draw in programs.MOVES.values():
        for shape in [(2, 3), (1, 4), (3, 1, 2), (4,), (4, 2)]:
            shapes = [shape, ()] if arrays == "r0" else [shape] * arrays
            static = draw[0](rng, *shapes) if draw else ()
            operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
            traced = program.trace(
                lambda *arrays, fn=fn, static=static: fn(*arrays, *static), operands, {}, "in a test"
            )
            found |= primitives_of(traced.body)
    return found


def primitives_of(body):
    bodies = filter(None, map(program.call, body.jaxpr.eqns))
    return {eqn.primitive for eqn in body.jaxpr.eqns}.union(*map(primitives_of, bodies))


def test_each_row_is_whole():
    for operation, row in MOVES.items():
        assert callable(row.axes), operation
        if row.factors is None:
            assert len(row.why_not.split()) > 5, f"{operation} has no rule for the factors, and no reason"
        else:
            assert callable(row.factors), operation
            assert not row.why_not, f"{operation} has a rule for the factors, and a reason to have none"


def test_each_row_is_drawn_by_random_programs_or_tested_here():
    assert set(MOVES) - drawn() == TESTED_HERE


def last_equation(name):
    (*_, eqn) = equations(PRIMITIVES[name], V)
    assert str(eqn.primitive) == name
    return eqn


@pytest.mark.parametrize("name", NAMES)
def test_an_operation_that_moves_nothing_keeps_the_view(name):
    view = View.of("w", V.shape)
    assert follow(PRIMITIVES[name], view, V.shape) == view


def test_a_constraint_on_a_weight_is_one_on_v_unless_the_weight_is_rebuilt_anyway():
    eqn = last_equation("sharding_constraint")
    (result,) = moved(eqn, [VALUE])
    assert result.v.sharding == eqn.params["sharding"]
    np.testing.assert_array_equal(result.weight(), VALUE.weight())
    assert moved(eqn, [dataclasses.replace(VALUE, rebuilt=True)]) is None


@pytest.mark.parametrize("name", ["name", "reduce_precision"])
def test_where_the_factors_have_no_rule_the_operation_gets_the_weight(name):
    eqn = last_equation(name)
    assert moved(eqn, [VALUE]) is None
    node = wn.WeightNorm.from_weight(V, -2)
    x = jnp.ones((1, 3))
    run = wn.wrap(lambda w, x: x @ PRIMITIVES[name](w), scale="output")
    taken = []
    body = program.trace(run, (node, x), {}, "in a test").body

    def rule(eqn, operands, site):
        if eqn.primitive is getattr(primitives, f"{name}_p"):
            taken.append(operands[0])
        return program.bind(eqn, operands)

    doubled = dataclasses.replace(node, g=2 * node.g)
    (found,) = program.interpret(body, [doubled.g, doubled.v, x], rule)
    np.testing.assert_array_equal(taken, [doubled.weight()])
    np.testing.assert_array_equal(found, x @ PRIMITIVES[name](doubled.weight()))


def test_the_weight_is_rounded_and_not_v():
    """Which is why `reduce_precision` has no rule for the factors: the two differ."""
    rounded = PRIMITIVES["reduce_precision"]
    assert (rounded(V) * VALUE.scale != rounded(VALUE.weight())).any()


def test_a_weight_that_is_sharded_anew_takes_its_scale_along():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:2])
    node = wn.WeightNorm.from_weight(jnp.asarray(RNG.standard_normal((3, 4)), jnp.float32), -2)
    x = jnp.ones((1, 3))

    def columns(w, x):
        return x @ jax.sharding.reshard(w, jax.P(None, "x"))

    with jax.set_mesh(mesh):
        assert wn.infer_axes(lambda p, x: columns(p["w"], x))({"w": node.weight()}, x) == {"w": (-2,)}
        found = jax.jit(wn.wrap(columns, scale="output"))(node, x)
        assert jax.typeof(found).sharding.spec == jax.P(None, "x")
    np.testing.assert_allclose(found, x @ node.weight(), rtol=1e-6)
