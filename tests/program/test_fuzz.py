"""Random programs: wherever the scale goes, `wrap` computes what it computes with the scale on the weight."""

import functools
import itertools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import wn_jax as wn
from tests.program.programs import CALLS, MOVES, USES, Body, Program, Step, build, run_step
from wn_jax._program.reading import ParameterLeaf

_WILD = {"while_loop", "custom_jvp", "custom_vjp", "grad", "fit", "dynamic_slice", "scale_by_data", "scale_by_sum"}


def programs():
    """Programs that are well-typed by construction, as shapes are tracked while they are drawn."""
    return st.randoms(use_true_random=False).map(_draw_program)


def _draw_program(rng):
    """Three of four programs are tame: they use weights as layers do, so that a scale can go to the outputs.

    In the others almost every weight meets an operation that needs the weight itself.
    """
    tame = rng.randrange(4) < 3
    sizes = rng.choice([(2, 3), (3, 2), (2, 4), (4, 3)])  # few, so that dimensions of the same size meet
    weights = []
    for i in range(rng.choice([2, 1, 3])):
        shape = tuple(rng.choice(sizes) for _ in range(rng.choice([2, 2, 2, 3, 3, 4, 1])))
        axes = tuple(sorted(rng.sample(range(-len(shape), 0), rng.randint(1, len(shape)))))
        weights.append((shape, None if i and rng.randrange(4) == 3 else axes))
    x = tuple(rng.choice(sizes) for _ in range(rng.choice([2, 1, 3])))
    kinds = [None, *("weight" if axes else None for _, axes in weights), "data"]
    env = _Registers(rng, [(), *(shape for shape, _ in weights), x], kinds, tame)
    env.draw_steps(rng.choice([5, 1, 2, 3, 4, 6, 7]), depth=2)
    while tame and any(env.kinds[i] == "weight" for i in env.unused()):
        env.draw_operation("dot_general", next(i for i in env.unused() if env.kinds[i] == "weight"))
    program = Program(
        tuple(weights), x, env.body([*env.unused(), env.pick("data" if tame else None)]), rng.randrange(99)
    )
    return _with_proved_axes(program) if tame and rng.randrange(3) < 2 else program


def _with_proved_axes(program):
    """With the reduction axes that the program itself proves. Those drawn blindly are seldom the ones summed over."""
    fn, params, x, _ = build(program)
    proved = wn.infer_axes(fn)(params, x)
    weights = [(shape, axes and proved.get(f"w{i}", axes)) for i, (shape, axes) in enumerate(program.weights)]
    return program._replace(weights=tuple(weights))


class _Registers:
    """A body while it is drawn: its steps, its registers' shapes, and their kinds.

    The kinds are `"weight"` (of a node, only moved), `"data"` (depends on the input) and None.
    """

    def __init__(self, rng, shapes, kinds, tame):
        self.rng, self.inputs, self.tame = rng, tuple(shapes), tame
        self.shapes, self.kinds, self.steps = list(shapes), list(kinds), []

    def body(self, outputs):
        return Body(self.inputs, tuple(self.steps), tuple(outputs))

    def unused(self):
        taken = {i for step in self.steps for i in step.inputs}
        return [i for i in range(1, len(self.shapes)) if i not in taken]

    def pick(self, kind=None, accept=lambda shape: True):
        """A register with 1 to 4 dimensions, of a kind or else mostly a weight; None if there is none."""
        fitting = [i for i, s in enumerate(self.shapes) if 1 <= len(s) <= 4 and math.prod(s) <= 64 and accept(s)]
        preferred = [i for i in fitting if self.kinds[i] == (kind or "weight")]
        fitting = preferred if kind or (preferred and self.rng.randrange(4) < 3) else fitting
        return self.rng.choice([*fitting[-2:], *fitting][::-1]) if fitting else None

    def add(self, op, inputs, static=(), bodies=(), kinds=None):
        step = Step(op, tuple(inputs), tuple(static), (), tuple(bodies))
        arrays = [jax.ShapeDtypeStruct(self.shapes[i], jnp.float32) for i in inputs]
        shapes = tuple(result.shape for result in jax.eval_shape(functools.partial(run_step, step), arrays))
        self.steps.append(step._replace(results=shapes))
        self.shapes += shapes
        used = [self.kinds[i] for i in inputs]
        moved = used[0] if op in MOVES else None
        mixed = op == "concatenate" and "data" in used
        self.kinds += kinds or [moved if moved and not mixed else "data" if "data" in used else None] * len(shapes)
        return len(self.shapes) - 1

    def draw_steps(self, count, depth):
        for _ in range(count):
            kind = self.rng.choice(["move"] * 5 + ["contract"] * 3 + ["use"] + ["call"] * (4 if depth else 0))
            names = {"move": [*MOVES], "contract": [*USES][:3], "use": [*USES][3:], "call": [*CALLS]}[kind]
            op = self.rng.choice([op for op in names if not (self.tame and op in _WILD and self.rng.randrange(9))])
            if kind == "call":
                self._draw_call(op, depth)
            else:
                self.draw_operation(op)

    def draw_operation(self, op, first=None):
        _, arrays, *draw_static = {**MOVES, **USES}[op]
        contracts = op in [*USES][:3]
        other = "data" if self.tame and (op in USES or op == "scale_by_sum") else None
        if first is None:
            can = (lambda s: len(s) in (3, 4) and max(s) <= 4) if op == "conv" else (lambda s: True)
            first = self.pick(None if contracts or op in MOVES else other, can)
            first = self.add("fit", [self.pick()], [(2, 4, 3)]) if first is None else first
        inputs = [first, 0] if arrays == "r0" else [first]
        if arrays == 2:
            if other is None and self.tame and self.kinds[first] == "weight":
                other = "weight"  # beside which it stays one
            shared = self.pick(other, lambda shape: shape[0] in self.shapes[first])
            if shared is None and contracts:
                shared = self.add("fit", [self.pick(other)], [(*self.shapes[first][:1], 2)])
            inputs.append(self.pick(other) if shared is None else shared)
        shapes = [self.shapes[i] for i in inputs]
        self.add(op, inputs, *(draw(self.rng, *shapes) for draw in draw_static))

    def _draw_call(self, op, depth):
        rng, carries = self.rng, 0
        inputs = [self.pick() for _ in range(rng.randint(1, 3))] + [self.pick("data")] * self.tame
        axes, static = [None] * len(inputs), (rng.random() < 0.5,)
        if op in ("vmap", "scan"):
            inputs, axes = self._draw_mapped(inputs, any_axis=op == "vmap")
            op = op if op == "scan" or axes[0] is not None else "fori_loop"
        mapped = len(axes) - axes.count(None)
        if op in ("scan", "fori_loop", "while_loop"):
            rest = sorted(inputs[mapped:], key=lambda i: self.kinds[i] != "data")
            able = sum(self.kinds[i] == "data" for i in rest) if self.tame else len(rest)
            carries = rng.randint(op != "scan", able)
            inputs = [*rest[:carries], *inputs[:mapped], *rest[carries:]]
            axes = [*[None] * carries, *axes[:mapped], *[None] * (len(rest) - carries)]
            static = (carries, mapped, *static) if op == "scan" else (carries,)
        elif op not in ("jit", "checkpoint", "checkpoint_dots", "switch"):
            static = axes if op == "vmap" else ()
        shapes = [_without(self.shapes[i], axis) for i, axis in zip(inputs, axes, strict=True)]
        first = [(), *shapes], [None, *(self.kinds[i] for i in inputs)], self.tame
        kind = "data" if self.tame and op in ("scan", "fori_loop", "switch") else None
        more = 0 if op.endswith("loop") else rng.randint(1, 2)
        bodies, results, kinds = [], shapes[:carries], None
        for _ in range(rng.randint(2, 3) if op == "switch" else 1):
            inner = _Registers(rng, *first)
            outputs = inner.draw_body(depth - 1, results, 0 if bodies else more, kind)
            bodies.append(inner.body(outputs))
            results, kinds = [inner.shapes[i] for i in outputs], [inner.kinds[i] for i in outputs]
        if op in ("grad", "custom_jvp", "custom_vjp", "while_loop"):
            kinds = ["data" if any(self.kinds[i] == "data" for i in inputs) else None]
            kinds *= len(inputs) if op == "grad" else len(results)
        self.add(op, [0, *inputs], static, bodies, kinds)

    def _draw_mapped(self, inputs, any_axis):
        """With a register in front that a `vmap` or `scan` runs over, the others over an axis as long, or None."""
        stack = self.pick(None, lambda shape: len(shape) > 1)
        if stack is None:
            return inputs, [None] * len(inputs)
        first = self.rng.randrange(len(self.shapes[stack]) if any_axis else 1)
        pairs = [(stack, first)]
        for i in inputs:
            equal = [k for k, n in enumerate(self.shapes[i]) if n == self.shapes[stack][first] and (any_axis or k == 0)]
            pairs.append((i, self.rng.choice([*(equal if len(self.shapes[i]) > 1 else []), None])))
        return zip(*sorted(pairs, key=lambda pair: pair[1] is None), strict=True)

    def draw_body(self, depth, required, more, kind):
        """The outputs of a body: of the `required` shapes and `more` others, all of a kind (None: of any)."""
        self.draw_steps(self.rng.randint(0, 3), depth)
        outputs = []
        for shape in required:
            same = [i for i, s in enumerate(self.shapes) if i and s == shape and kind in (None, self.kinds[i])]
            output = self.rng.choice([*same, None])
            outputs.append(self.add("fit", [self.pick(kind)], [shape]) if output is None else output)
        return [*outputs, *(self.pick(kind) for _ in range(more))]


def _without(shape, axis):
    return tuple(n for k, n in enumerate(shape) if k != axis)


def nodes_of(params, axes, rng):
    """`params` with nodes, whose scales `g / ||v||` are 0.3 to 3, of both signs."""

    def node(v, axes):
        g = np.sqrt(np.sum(v * v, axis=axes, keepdims=True))
        g, v = g * rng.choice([-1, 1], g.shape), v * rng.uniform(1 / 3, 3, g.shape)
        return wn.WeightNorm(jnp.asarray(g, jnp.float32), jnp.asarray(v, jnp.float32), axes)

    return {name: node(np.asarray(w, np.float64), axes[name]) if name in axes else w for name, w in params.items()}


def results(fn, nodes, tangents, x, second):
    """Output, value, gradient and, along `tangents`, a forward derivative or a Hessian-vector product."""

    def loss(nodes):
        out = fn(nodes, x)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in out), out

    def slope(nodes):
        return sum(map(jnp.vdot, jax.tree.leaves(jax.grad(loss, has_aux=True)(nodes)[0]), jax.tree.leaves(tangents)))

    (value, out), gradient = jax.value_and_grad(loss, has_aux=True)(nodes)
    found = {"output": out, "value": value, "gradient": gradient}
    if second == "jvp":
        found["jvp"] = jax.jvp(lambda nodes: fn(nodes, x), (nodes,), (tangents,))[1]
    elif second == "hvp":
        found["hvp"] = jax.grad(slope)(nodes)
    return found


def check(program, second, wrap=wn.wrap):
    """`wrap` is an argument so that a wrong one can show that the check sees it."""
    fn, params, x, axes = build(program)
    rng = np.random.default_rng(program.seed)
    nodes = nodes_of(params, axes, rng)
    tangents = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), nodes)
    if second == "jvp" and "custom_vjp" in repr(program):
        second = "hvp"  # as it has no forward mode

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles in 2/3 of the time
    def run(nodes, x):
        return {s: results(wrap(fn, scale=s), nodes, tangents, x, second) for s in ("weight", "output", "auto")}

    found = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), run(nodes, x))
    for scale, name in itertools.product(("output", "auto"), found["weight"]):
        message = f"{name} of scale={scale!r} is not that of scale='weight' in\n{program}\n\n{program!r}"
        tolerance = 0.1 if "bfloat16" in repr(program) else 1e-4
        assert jax.tree.structure(found[scale][name]) == jax.tree.structure(found["weight"][name]), message
        actual, expected = jax.tree.leaves(found[scale][name]), jax.tree.leaves(found["weight"][name])
        # An array that is small beside the others, such as the gradient of a `v` of which only the length counts, is
        # a difference of larger numbers, and has their rounding.
        least = 0.01 * max(np.abs(b).max(initial=0) for b in expected)
        for a, b in zip(actual, expected, strict=True):
            assert a.shape == b.shape, message
            assert np.isfinite(b).all(), message
            assert np.abs(a - b).max(initial=0) <= tolerance * max(np.abs(b).max(initial=0), least), message


fuzz = hypothesis.settings(
    deadline=None,
    print_blob=True,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.data_too_large,
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
)
any_program = hypothesis.given(program=programs(), second=st.sampled_from([None, None, "jvp", "hvp"]))


@hypothesis.settings(fuzz, max_examples=5, derandomize=True)
@any_program
def test_the_scale_goes_where_it_changes_nothing(program, second):
    check(program, second)


@pytest.mark.slow
@hypothesis.settings(fuzz, max_examples=60, derandomize=True)
@any_program
def test_the_scale_goes_where_it_changes_nothing_at_length(program, second):
    check(program, second)


@pytest.fixture
def unproved(monkeypatch):
    """Moves every scale, proved or not: what runs programs must be right without what reads them."""
    monkeypatch.setattr(ParameterLeaf, "goes_to_output", lambda leaf, always=False: True)


@pytest.mark.slow
@hypothesis.settings(fuzz, max_examples=15, derandomize=True)
@any_program
def test_a_run_is_right_even_where_nothing_is_proved(unproved, program, second):
    check(program, second)


@pytest.mark.parametrize("axes", [(-3,), (-3, -2), (-2, -1), (-3, -2, -1)])
def test_a_norm_over_the_axis_that_a_scan_slices(axes):
    """Found by the fuzz: the scale had nothing to slice."""
    node = wn.WeightNorm.from_weight(jnp.arange(1.0, 25).reshape(3, 4, 2), axes)
    x = jnp.ones((2, 4))

    def fn(w, x):
        return jax.lax.scan(lambda carry, w: (carry, x @ w), 0.0, w)[1]

    expected = fn(node.weight(), x)
    np.testing.assert_allclose(jax.jit(wn.wrap(fn, scale="output"))(node, x), expected, rtol=1e-6)
