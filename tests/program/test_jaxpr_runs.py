"""`wn_jax._program` at work: `bind` and `interpret` give what the function gives, and `trace` takes any arguments."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl

import wn_jax as wn
from tests.program.test_jaxpr import PRIMITIVES, SHARDING, C, X, assert_equal, bind_all, f, f_jvp, f_vjp, while_loop
from tests.program.test_jaxpr_loops import SCANS, W
from wn_jax._program import jaxpr as program


def runs(fn, *args):
    """`fn`, run from its program equation by equation."""
    traced = program.trace(fn, args, {}, "in a test")
    return lambda *arrays: traced.unflatten(bind_all(traced.body, arrays))


def debugged(x):
    jax.debug.print("{}", x.sum())
    return x * 2


DIFFERENTIABLE = {
    "literals and repeated operands": lambda x: (x * x + 2.0, jnp.where(x > 0, 1.0, x), jnp.maximum(x, 0)),
    "several results": lambda x: (lax.top_k(x, 2), lax.sort((x, -x), num_keys=1)),
    "one result of several": lambda x: lax.top_k(x, 1)[0],
    "jit": lambda x: jax.jit(lambda x, s: (f(x), jax.jit(jnp.sin)(x) * s))(x, 2.0),
    "remat": jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable),
    "custom_jvp": f_jvp,
    "custom_vjp": f_vjp,
    "custom_vjp of several": lambda x: jax.nn.relu(x) + jax.nn.silu(x) + jnp.linalg.norm(x) + jax.nn.logsumexp(x),
    "cond": PRIMITIVES["cond"],
    "switch": lambda x: lax.switch((x[0, 0] > 0).astype(int) + 1, [jnp.sin, jnp.cos, lambda x: x @ W], x),
    **{f"scan: {name}": lambda x, fn=fn: fn(x, C, W) for name, (fn, _) in SCANS.items()},
    "gather": lambda x: (x[jnp.array([2, 0])], x.at[1].add(3)),
    "cumsum": lambda x: (jnp.cumsum(x, 0), lax.associative_scan(jnp.add, x)),
    "linear solve": lambda x: jnp.linalg.solve(x.T @ x + jnp.eye(2), x.T),
    "cholesky": lambda x: jnp.linalg.cholesky(x.T @ x + jnp.eye(2)),
    "random": lambda x: x * jax.random.normal(jax.random.key(3), x.shape),
    "gradient": jax.grad(lambda x: jax.checkpoint(f_vjp)(x).sum()),
    "print": debugged,
    "platform": lambda x: lax.platform_dependent(x, tpu=jnp.sin, default=jnp.cos),
}
ONLY_FORWARD = {
    "while": while_loop,
    "pure_callback": lambda x: jax.pure_callback(lambda x: np.asarray(x) * 2, x, x, vmap_method="sequential"),
    "shard_map": lambda x: jax.shard_map(f, mesh=SHARDING.mesh, in_specs=SHARDING.spec, out_specs=SHARDING.spec)(x),
    "integers": lambda x: jnp.argmax(x.astype(jnp.int32) ** 2, axis=0) << 2,
}


@pytest.mark.parametrize("name", [*DIFFERENTIABLE, *ONLY_FORWARD])
def test_bind_gives_what_the_function_gives(name):
    fn = {**DIFFERENTIABLE, **ONLY_FORWARD}[name]
    run = runs(fn, X)

    def transformed(fn, x):
        results = {"jit": fn(x), "vmap": jax.vmap(fn)(jnp.stack([x, 2 * x]))}
        if name in DIFFERENTIABLE:
            results["grad"] = jax.grad(lambda x: sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(fn(x))))(x)
        return results

    found, expected = jax.jit(lambda x: [transformed(run, x), transformed(fn, x)])(X)
    assert jax.tree.structure((run(X), found)) == jax.tree.structure((fn(X), expected))
    for a, b in zip(jax.tree.leaves((run(X), found)), jax.tree.leaves((fn(X), expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_branch_for_another_platform_is_never_lowered():
    """As that of a Pallas kernel beside its fallback."""

    def double(x_ref, out_ref):
        out_ref[...] = 2 * x_ref[...]

    def fn(params, x):
        kernel = pl.pallas_call(double, out_shape=x)  # which has no lowering for the CPU
        return lax.platform_dependent(x, params["w"], tpu=lambda x, w: kernel(x) @ w, default=lambda x, w: (2 * x) @ w)

    params = {"w": jnp.ones((128, 128))}
    nodes = wn.reparameterize(params, {"w": -2})
    for scale in ("weight", "output"):
        found = jax.jit(wn.wrap(fn, scale=scale))(nodes, jnp.ones((8, 128)))
        np.testing.assert_allclose(found, np.full((8, 128), 256), rtol=1e-6)


def test_bind_keeps_scopes_source_lines_and_configuration():
    def written_here(x):
        with jax.named_scope("outer"), jax.named_scope("inner"):
            return jax.nn.sigmoid(x @ C)

    text = jax.jit(runs(written_here, X)).lower(X).as_text(debug_info=True)
    assert "outer/inner/dot_general" in text
    assert "written_here" in text
    bits = {}
    for flag in (False, True):
        with jax.threefry_partitionable(flag):
            traced = runs(lambda key: jax.random.bits(key, (3, 5)), jax.random.key(1))
            bits[flag] = jax.random.bits(jax.random.key(1), (3, 5))
        assert_equal(traced(jax.random.key(1)), bits[flag])
    assert not np.array_equal(bits[False], bits[True])  # so one of the two ran under another configuration


@pytest.mark.parametrize("ordered", [False, True])
def test_effects_are_kept_in_number(ordered):
    seen = []

    def fn(x):
        jax.debug.callback(lambda v: seen.append(float(v)), x[0], ordered=ordered)
        lax.scan(lambda c, row: (c, jax.debug.callback(seen.append, row, ordered=ordered)), 0, x)
        return x * 2

    run = runs(fn, C)
    assert not seen
    for call in (run, jax.jit(run)):
        assert_equal(call(C), 2 * C)
        jax.effects_barrier()
        assert len(seen) == 3
        seen.clear()


class Value:
    """Stands for an array, so that it can be seen to die."""


def test_interpret_holds_no_dead_values():
    def fn(x):
        for _ in range(20):
            x = jnp.sin(x)
        lax.top_k(x, 1)  # results that nothing uses
        return x

    live, most = weakref.WeakSet(), []

    def rule(eqn, operands, site):
        results = [Value() for _ in eqn.outvars]
        live.update(results)
        most.append(len(live))
        return results

    (result,) = program.interpret(program.trace(fn, (C,), {}, "").body, [Value()], rule)
    assert max(most) <= 3
    assert set(live) == {result}


def test_interpret_keeps_results_whatever_they_are():
    def fn(x, y):
        z = jnp.sin(x)
        w = jnp.cos(z)
        return x, z, z, w, 1, jnp.float32(2.0), x, C

    traced = program.trace(fn, (X, C), {}, "")
    found = traced.unflatten(bind_all(traced.body, [X, C]))
    assert_equal(found, fn(X, C))
    inner = program.call(program.trace(jax.jit(lambda x: (x, x, 1.0, x + 1)), (X,), {}, "").body.jaxpr.eqns[0])
    assert_equal(bind_all(inner, [X])[-1], X + 1)
    empty = program.trace(lambda x: (), (X,), {}, "")
    assert empty.unflatten(bind_all(empty.body, [X])) == ()


def test_interpret_names_each_equation_by_its_site():
    sites = []
    body = program.trace(lambda x: jnp.cos(jnp.sin(x)), (X,), {}, "").body
    program.interpret(body, [X], lambda eqn, operands, site: sites.append(site) or operands, (4, 2))
    assert sites == [(4, 2, 0), (4, 2, 1)]


def test_what_is_no_array_reaches_the_function_and_comes_back():
    given = {}

    def fn(params, x, mode, *, train, note=None, activation, factor, names):
        given.update(mode=mode, train=train, note=note, activation=activation, factor=factor, names=names)
        return {"y": activation(x * params["w"]), "mode": mode, "n": 3, "none": None, "f": activation}, factor

    statics = {"train": True, "activation": jnp.tanh, "factor": 2.5, "names": np.array(["a", "b"])}
    traced = program.trace(fn, ({"w": C, "name": "layer"}, X, "mean"), statics, "")
    assert len(traced.arrays) == 2
    assert given["train"] is True
    assert given["activation"] is jnp.tanh
    assert given["names"] is statics["names"]
    assert (given["mode"], given["note"], given["factor"]) == ("mean", None, 2.5)
    out, factor = traced.unflatten(bind_all(traced.body, traced.arrays))
    assert (out["mode"], out["n"], out["none"], out["f"], factor) == ("mean", 3, None, jnp.tanh, 2.5)
    np.testing.assert_allclose(out["y"], jnp.tanh(X * C), rtol=1e-6)


def test_what_counts_as_an_array():
    for array in (C, np.ones(3), np.ones(3, bool), jax.random.key(0), jax.ShapeDtypeStruct((2,), jnp.float32)):
        assert program.is_input(array)
    for other in (1, 2.0, True, "x", None, jnp.tanh, np.float32(1), np.array("x"), np.array([{}]), jnp.float32):
        assert not program.is_input(other)


def test_numpy_arrays_keys_and_abstract_arrays_are_traced():
    def fn(key, x, *, y):
        return jax.random.normal(key, (2,)) + x + y

    abstract = jax.ShapeDtypeStruct((2,), jnp.float32)
    for x, y in ((np.ones(2, np.float32), C), (abstract, np.ones(2, np.float32)), (abstract, abstract)):
        traced = program.trace(fn, (jax.random.key(0), x), {"y": y}, "")
        assert len(traced.arrays) == 3
        key = jax.random.key(7)
        found = traced.unflatten(bind_all(traced.body, [key, jnp.ones(2), C]))
        np.testing.assert_allclose(found, fn(key, jnp.ones(2), y=C), rtol=1e-6)


def test_a_closure_over_something_that_changes_is_traced_anew():
    state = {"factor": 2.0, "w": C}

    def fn(x):
        return x * state["factor"] + state["w"]

    assert_equal(runs(fn, X)(X), fn(X))
    state.update(factor=3.0, w=-C)
    assert_equal(runs(fn, X)(X), X * 3 - C)


def test_a_closure_may_hold_tracers():
    @jax.jit
    def outer(w, x):
        return (
            runs(lambda x: jnp.sin(x * w), x)(x).sum() + jax.grad(lambda w: runs(lambda x: x * w, x)(x).sum())(w).sum()
        )

    expected = lambda w, x: jnp.sin(x * w).sum() + (w * 0 + x).sum()  # noqa: E731
    np.testing.assert_allclose(outer(C, X), expected(C, X), rtol=1e-5)
    for a, b in zip(jax.grad(outer, (0, 1))(C, X), jax.grad(expected, (0, 1))(C, X), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


class UnlikeError(Exception):
    """An exception with a constructor of its own."""

    def __init__(self, code, *, where):
        super().__init__(code)
        self.where = where


def test_an_error_passes_through_with_a_note():
    def fails(x):
        raise UnlikeError(7, where=x.shape)

    with pytest.raises(UnlikeError) as caught:
        program.trace(fails, (X,), {}, "to find an error.")
    assert caught.value.where == (3, 2)
    (note,) = (note for note in caught.value.__notes__ if "wn_jax" in note)
    assert note.endswith("fails to a jaxpr, to find an error.")
    with pytest.raises(jax.errors.TracerBoolConversionError):
        program.trace(lambda x: x if x.sum() > 0 else -x, (X,), {}, "")


def test_an_operand_that_is_given_twice_may_have_two_values():
    """Found by the fuzz: `dot(r, r)` where one of the two is a direction, and the other its weight."""
    (eqn,) = jax.make_jaxpr(lambda r: jnp.dot(r, r))(jnp.ones(3)).jaxpr.eqns
    assert program.bind(eqn, [jnp.full(3, 2.0), jnp.full(3, 5.0)])[0] == 30.0


def test_a_result_that_nobody_takes_is_gone_before_the_next_equation():
    """An eager run would else hold arrays longer than the function itself does."""

    def fn(x):
        first, _ = jnp.linalg.eigh(x)
        return jnp.sum(first) + 1

    alive = []

    def rule(eqn, operands, _):
        alive.append([ref() is not None for ref in made])
        results = program.bind(eqn, operands)
        made.extend(weakref.ref(result) for result in results)
        return results

    made = []
    traced = program.trace(fn, (jnp.eye(3),), {}, "to see what it holds.")
    program.interpret(traced.body, traced.arrays, rule)
    assert len(alive) > 2
    assert all(sum(living) <= 1 for living in alive), alive
