"""Facts about jaxprs that `wn_jax._program` relies on: a new JAX that differs fails here first, and says in what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import primitives

from wn_jax._program import jaxpr as program

X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2)), jnp.float32)
C = jnp.asarray(np.random.default_rng(1).standard_normal((2,)), jnp.float32)
SHARDING = jax.sharding.NamedSharding(jax.sharding.Mesh(jax.devices()[:1], ("devices",)), jax.sharding.PartitionSpec())
VERSION = f"under jax {jax.__version__}, "


def f(x):
    return jnp.tanh(x) * C


@jax.custom_jvp
def f_jvp(x):
    return f(x)


f_jvp.defjvp(lambda primals, tangents: (f(*primals), 3 * tangents[0]))


@jax.custom_vjp
def f_vjp(x):
    return f(x)


f_vjp.defvjp(lambda x: (f(x), x), lambda x, z: (4 * z,))


def conv(x):
    return lax.conv_general_dilated(x, x, (1,), "VALID", dimension_numbers=("NCH", "OIH", "NCH"))


def while_loop(x):
    return lax.while_loop(lambda s: s[0] + x.sum() * 0 < C.sum() * 0 + 3, lambda s: (s[0] + 1, s[1] * C), (0.0, x))[1]


def equations(fn, *args):
    return program.trace(fn, args, {}, "in a test").body.jaxpr.eqns


def equation(fn, *args):
    """The equation with a body in the program of `fn`, or the last one."""
    found = equations(fn, *args)
    return next((eqn for eqn in found if program.call(eqn) or program.branches(eqn) or _loop(eqn)), found[-1])


def _loop(eqn):
    return program.scan(eqn) or program.while_loop(eqn)


def bound(eqn, operands, site):
    return program.bind(eqn, operands)


def bind_all(body, inputs):
    return program.interpret(body, inputs, bound)


def assert_equal(a, b, message=""):
    assert jax.tree.structure(a) == jax.tree.structure(b), message
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=message)


PRIMITIVES = {
    "jit": jax.jit(f),
    "remat": jax.checkpoint(f),
    "custom_jvp_call": f_jvp,
    "custom_vjp_call": f_vjp,
    "scan": lambda x: lax.scan(lambda c, row: (c + row, row), C, x),
    "while": while_loop,
    "cond": lambda x: lax.cond(x[0, 0] > 0, f, jnp.sin, x),
    "dot_general": lambda x: x @ x.T,
    "conv_general_dilated": lambda x: conv(x[None]),
    "copy": jnp.copy,
    "name": lambda x: checkpoint_name(x, "x"),
    "neg": lambda x: -x,
    "reduce_precision": lambda x: lax.reduce_precision(x, 8, 7),
    "rev": lambda x: lax.rev(x, (0,)),
    "sharding_constraint": lambda x: lax.with_sharding_constraint(x, SHARDING),
    "stop_gradient": lax.stop_gradient,
    "convert_element_type": lambda x: x.astype(jnp.bfloat16),
    "transpose": lambda x: x.T,
    "squeeze": lambda x: lax.squeeze(x[:1], (0,)),
    "broadcast_in_dim": lambda x: lax.broadcast(x, (5,)),
    "reshape": lambda x: x.reshape(6),
    "slice": lambda x: x[1:],
    "dynamic_slice": lambda x: lax.dynamic_slice(x, (1, 0), (1, 2)),
    "concatenate": lambda x: jnp.concatenate([x, x]),
    "gather": lambda x: x.at[jnp.array([2, 0])].get(mode="clip"),
    "add": lambda x: x + x,
    "mul": lambda x: x * 2,
    "div": lambda x: x / 2,
    "square": jnp.square,
    "integer_pow": lambda x: x**3,
    "reduce_sum": jnp.sum,
    "reduce_max": jnp.max,
    "reduce_min": jnp.min,
}


@pytest.mark.parametrize("name", PRIMITIVES)
def test_functions_trace_to_the_primitives_that_are_compared_with(name):
    expected = getattr(primitives, f"{name}_p", None)
    assert expected is not None, VERSION + f"jax.extend.core.primitives has no {name}_p"
    found = [eqn.primitive for eqn in equations(PRIMITIVES[name], X)]
    assert any(p is expected for p in found), VERSION + f"{name} traces to {found}, none of which is {name}_p"


KNOWN = {
    "jit": {*("jaxpr", "in_shardings", "out_shardings", "in_layouts", "out_layouts", "donated_invars", "ctx_mesh")}
    | {*("name", "keep_unused", "inline", "compiler_options_kvs")},
    "remat": {"jaxpr", "prevent_cse", "differentiated", "policy"},
    "while": {"cond_nconsts", "cond_jaxpr", "body_nconsts", "body_jaxpr"},
    "cond": {"branches"},
}


@pytest.mark.parametrize("name", KNOWN)
def test_equations_have_the_parameters_that_the_code_knows(name):
    """A parameter that is new may change what the equation computes."""
    eqn = equation(PRIMITIVES[name], X)
    assert set(eqn.params) == KNOWN[name], VERSION + f"the parameters of {name} changed: {sorted(eqn.params)}"


def test_scans_have_the_parameters_that_the_code_knows():
    params = set(equation(PRIMITIVES["scan"], X).params)
    known = {"jaxpr", "length", "reverse", "unroll"}
    assert params in (known | {"num_consts", "num_carry"}, known | {"ft_in", "ft_out"}), (
        VERSION + f"the parameters of scan changed: {sorted(params)}"
    )


@pytest.mark.parametrize("name", ["jit", "remat", "custom_jvp_call", "custom_vjp_call"])
def test_a_call_has_one_body_that_takes_and_gives_what_the_equation_does(name):
    eqn = equation(PRIMITIVES[name], X)
    body = program.call(eqn)
    assert body is not None, VERSION + f"{name} is no call any more"
    assert [aval.shape for aval in body.inputs] == program.shapes(eqn), VERSION + "operands are not the body's inputs"
    assert [a.shape for a in body.outputs] == [a.shape for a in program.outputs(eqn)], VERSION + "results differ"
    assert len(body.jaxpr.constvars) == len(body.consts), VERSION + f"the body of {name} lacks its constants"
    assert program.is_custom_rule(eqn) == name.startswith("custom")
    assert _loop(eqn) is None
    assert program.branches(eqn) is None
    operands = [X if aval.shape == X.shape else C for aval in body.inputs]
    np.testing.assert_allclose(bind_all(body, operands)[0], f(X), rtol=1e-6)


def test_arrays_in_a_closure_are_constants_of_the_program_or_of_a_body():
    """From inside a `jit` too they come to the interpreter, as the same arrays."""
    for fn in (lambda x: x + C, jax.jit(lambda x: x + C)):
        body = program.trace(fn, (X,), {}, "in a test").body
        inner = program.call(body.jaxpr.eqns[0]) or body
        consts = [*body.consts, *inner.consts]
        assert any(np.array_equal(c, C) for c in consts), VERSION + f"constants are elsewhere than in {consts}"
        if inner.consts:  # `const` is applied to each
            shifted = program.interpret(inner, [X], bound, const=lambda c: c + 1)[0]
            np.testing.assert_allclose(shifted, X + C + 1, rtol=1e-5)


def opaque(x):
    specs = {"in_specs": SHARDING.spec, "out_specs": SHARDING.spec}
    return {
        "shard_map": lambda: jax.shard_map(f, mesh=SHARDING.mesh, **specs)(x),
        "pure_callback": lambda: jax.pure_callback(lambda x: x, x, x),
        "custom_linear_solve": lambda: lax.custom_linear_solve(lambda y: 2 * y, x, lambda _, b: b / 2, symmetric=True),
        "cholesky": lambda: lax.linalg.cholesky(x.T @ x),
        "scan": lambda: PRIMITIVES["scan"](x),
        "fori_loop": lambda: lax.fori_loop(0, 3, lambda _, x: f(x), x),
        "scan without xs": lambda: lax.scan(lambda x, _: (f(x), None), x, length=3)[0],
        "while": lambda: while_loop(x),
        "cond": lambda: PRIMITIVES["cond"](x),
    }


@pytest.mark.parametrize("name", opaque(X))
def test_what_is_no_call_is_not_entered_as_one(name):
    """A `fori_loop` and a `shard_map`, too, have one body with as many inputs as the equation, but it is no call."""
    for eqn in equations(lambda x: opaque(x)[name](), X):
        assert program.call(eqn) is None, VERSION + f"{eqn.primitive} of {name} is taken for a call"
        assert (program.scan(eqn) is not None) == (eqn.primitive is primitives.scan_p)
        assert (program.while_loop(eqn) is not None) == (eqn.primitive is primitives.while_p)
        assert (program.branches(eqn) is not None) == (eqn.primitive is primitives.cond_p)


def test_the_first_operand_of_a_cond_is_the_index_of_its_branch():
    branches = [lambda x: x, lambda x: 10 * x, lambda x: 100 * x]
    (*_, eqn) = equations(lambda i, x: lax.switch(i, branches, x), jnp.int32(1), C)
    assert program.shapes(eqn) == [(), (2,)], VERSION + "a cond orders its operands otherwise"
    for i, branch in enumerate(program.branches(eqn)):
        expected = 10**i * C
        assert_equal(bind_all(branch, [C]), [expected], VERSION + "branches are ordered otherwise")
        assert_equal(program.bind(eqn, [jnp.int32(i), C]), [expected], VERSION + "the index means something else")
    chosen = equation(lambda x: lax.cond(x[0, 0] > 0, lambda x: x, lambda x: -x, x), X)
    otherwise, then = program.branches(chosen)
    assert_equal(bind_all(otherwise, [X]), [-X], VERSION + "the first branch is not that of False")
    assert_equal(bind_all(then, [X]), [X])


def test_a_jit_is_plain_when_it_asks_for_nothing():
    for options in ({}, {"donate_argnums": 0}, {"keep_unused": True}, {"inline": False}):
        assert program.is_plain_jit(equation(jax.jit(f, **options), X)), VERSION + f"jit with {options} is not plain"
    for options in ({"in_shardings": SHARDING}, {"out_shardings": SHARDING}):
        assert not program.is_plain_jit(equation(jax.jit(f, **options), X)), VERSION + f"jit with {options} is plain"
    for name in ("remat", "custom_jvp_call", "scan"):
        assert not program.is_plain_jit(equation(PRIMITIVES[name], X))


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_saveable])
@pytest.mark.parametrize("prevent_cse", [True, False])
def test_a_remat_can_be_made_again(policy, prevent_cse):
    eqn = equation(jax.checkpoint(f, policy=policy, prevent_cse=prevent_cse), X)
    again = program.again(eqn, lambda *operands: bind_all(program.call(eqn), operands))
    assert again is not None, VERSION + f"a remat has other parameters: {sorted(eqn.params)}"
    operands = [X if shape == X.shape else C for shape in program.shapes(eqn)]
    made = equation(again, *operands)
    assert made.primitive is primitives.remat_p
    assert (made.params["policy"], made.params["prevent_cse"]) == (policy, prevent_cse)
    assert_equal(program.bind(made, operands), program.bind(eqn, operands))


def test_a_differentiated_remat_and_all_else_cannot_be_made_again():
    found = equations(jax.grad(lambda x: jax.checkpoint(f)(x).sum()), X)
    remats = [eqn for eqn in found if eqn.primitive is primitives.remat_p]
    assert remats, VERSION + "the gradient of a remat holds no remat"
    assert all(program.again(eqn, lambda *_: []) is None for eqn in remats)
    for name in ("jit", "custom_jvp_call", "scan", "cond"):
        assert program.again(equation(PRIMITIVES[name], X), lambda *_: []) is None


def test_effects_stand_in_the_equations_around_them():
    """The `effects` of an equation are those of the calls around it, too. A collective has one that is none."""
    tell = equations(jax.jit(lambda x: (jax.debug.callback(lambda x: None, x), x)[1]), X)
    silent = equations(jax.jit(lambda x: x * 2), X)
    assert [bool(eqn.effects) for eqn in (*tell, *silent)] == [True, False], f"{VERSION}effects are told differently"
    assert not isinstance(next(iter(tell[0].effects)), program._axis_effect()), f"{VERSION}effects are alike"
