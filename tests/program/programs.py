"""JAX programs as plain data: a small language, its operations, and how to draw their static values.

A program is a list of registers: r0 is a number computed from the input (for branches and indices), then come the
weights, then the input, and every step appends its results. Some steps hold bodies, which are lists of their own.
`tests/program/test_fuzz.py` composes programs. Their `str` is a listing; their `repr` can be pasted into a test.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Step(NamedTuple):
    op: str
    inputs: tuple  # registers
    static: tuple
    results: tuple = ()  # shapes
    bodies: tuple = ()


class Body(NamedTuple):
    inputs: tuple  # shapes
    steps: tuple
    outputs: tuple  # registers


class Program(NamedTuple):
    weights: tuple  # of (shape, reduction axes), with axes None for a weight that is no node
    x: tuple  # shape
    body: Body
    seed: int

    def __str__(self):
        weights = [f"r{i}: {shape} norm over {axes}" for i, (shape, axes) in enumerate(self.weights, 1)]
        return "\n".join([f"seed {self.seed}", *weights, f"r{len(weights) + 1}: x {self.x}", *_listing(self.body, "")])


def build(program):
    """`(fn, params, x, axes)`; `fn(params, x)` returns a list of arrays, `axes` is what `reparameterize` takes."""
    rng = np.random.default_rng(program.seed)
    shapes = {f"w{i}": shape for i, (shape, _) in enumerate(program.weights)}
    params = {name: jnp.asarray(0.7 * rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    axes = {f"w{i}": axes for i, (_, axes) in enumerate(program.weights) if axes}

    def fn(params, x):
        return _run(program.body, jnp.sum(x), *(params[name] for name in shapes), x)

    return fn, params, jnp.asarray(rng.standard_normal(program.x), jnp.float32), axes


def _run(body, *env):
    env = list(env)
    for step in body.steps:
        env += run_step(step, [env[i] for i in step.inputs])
    return [env[i] for i in body.outputs]


def run_step(step, arrays):
    if step.bodies:
        return list(CALLS[step.op]([functools.partial(_run, body) for body in step.bodies], arrays, *step.static))
    return jax.tree.leaves({**MOVES, **USES}[step.op][0](*arrays, *step.static))


def _listing(body, indent):
    count = len(body.inputs)
    for step in body.steps:
        names = ", ".join(f"r{i}: {shape}" for i, shape in enumerate(step.results, count))
        count += len(step.results)
        yield f"{indent}{names} = {step.op}({', '.join([*(f'r{i}' for i in step.inputs), *map(repr, step.static)])})"
        for inner in step.bodies:
            yield f"{indent}  body of " + ", ".join(f"r{i}: {shape}" for i, shape in enumerate(inner.inputs))
            yield from _listing(inner, indent + "    ")
    yield f"{indent}return " + ", ".join(f"r{i}" for i in body.outputs)


def _fit(a, shape):
    """`a` repeated and cut to `shape`, by moves alone."""
    count = -(-math.prod(shape) // a.size)
    return a if a.shape == shape else jnp.stack([a] * count).ravel()[: math.prod(shape)].reshape(shape)


def _concatenate(a, b, axis):
    fits = a.ndim == b.ndim and all(a.shape[k] == b.shape[k] for k in range(a.ndim) if k != axis)
    return jnp.concatenate([a, b if fits else _fit(b, a.shape)], axis)


def _dynamic_slice(a, number, axis, keep):
    size = max(1, a.shape[axis] - 1) if keep else 1
    out = lax.dynamic_slice_in_dim(a, (jnp.sin(3 * number) > 0).astype(jnp.int32), size, axis)
    return out if keep else out.squeeze(axis)


def _einsum(a, b, left, right, out, dtype):
    sizes = dict(zip(left + right, a.shape + b.shape, strict=True))
    result = jnp.einsum(f"{left},{right}->{out}", a.astype(dtype), b.astype(dtype)).astype(jnp.float32)
    return result / math.prod(sizes[c] for c in sizes if c not in out) ** 0.5  # keeps the size of the numbers


def _dot_general(a, b, left, right, out, dtype):
    groups = [[c for c in left if c in right and (c in out) == batch] for batch in (False, True)]
    numbers = tuple(tuple([side.index(c) for c in group] for side in (left, right)) for group in groups)
    return lax.dot_general(a.astype(dtype), b.astype(dtype), numbers, preferred_element_type=jnp.float32) / 2


def _conv(a, b, kernel, other, specs, options):
    lhs, rhs = (_fit(b, other), a) if kernel else (a, _fit(b, other))
    return lax.conv_general_dilated(lhs, rhs, *options[:4], specs, *options[4:]) / rhs.size**0.5


def _axis(rng, shape, *_):
    return (rng.randrange(len(shape)),)


def _reshape(rng, shape):
    """Any shape of the same size: it merges, splits and does both at once."""
    new, size = [1] * rng.randint(1, 4), math.prod(shape)
    while size > 1:
        factor = rng.choice([n for n in range(2, size + 1) if size % n == 0][:3])
        new[rng.randrange(len(new))] *= factor
        size //= factor
    return (tuple(new),)


def _broadcast(rng, shape):
    axis = rng.randint(0, len(shape))
    return (*shape[:axis], rng.randint(2, 3), *shape[axis:]), (*range(axis), *range(axis + 1, len(shape) + 1))


def _letters(rng, a, b):
    """Dimensions of b are named as dimensions of a that are as long; one of those is summed over, and most others."""
    left, right = "abcdkl"[: len(a)], ""
    for n, new in zip(b, "efghij", strict=False):
        same = [c for c, m in zip(left, a, strict=True) if m == n and c not in right]
        right += rng.choice([*same, *same, new]) if right else (same or [new])[0]
    both, single = [c for c in left if c in right], [c for c in left + right if (c in left) != (c in right)]
    keep = [c for c in both[1:] if rng.randrange(3) == 0] + [c for c in single if rng.randrange(16)]
    return left, right, "".join(rng.sample(keep, len(keep))), rng.choice(["float32"] * 9 + ["bfloat16"])


def _conv_options(rng, a, b):
    """`a` is the kernel, or the image; the other is fitted. N and C of a kernel are what JAX calls O and I."""
    kernel, n, names = rng.random() < 0.7, len(a) - 2, "NCHW"[: len(a)]
    image, weight, out = ("".join(rng.sample(names, len(names))) for _ in range(3))
    size = dict(zip(weight if kernel else image, a, strict=True))
    groups = rng.choice([k for k in (1, 2, 3, 4) if (size["N"] if kernel else math.gcd(size["C"], 4)) % k == 0])
    other = {"N": 2 if kernel else 4, "C": size["C"] * groups if kernel else size["C"] // groups}
    other |= {c: 2 * size[c] if kernel else 2 for c in names[2:]}
    batches = rng.choice([1, 2]) if kernel and groups == 1 and size["N"] % 2 == 0 else 1
    strides, base, dilation = (tuple(rng.randint(1, 2) for _ in range(n)) for _ in range(3))
    specs = image, weight.translate(str.maketrans("NC", "OI")), out
    other = tuple(other[c] for c in (image if kernel else weight))
    return kernel, other, specs, (strides, tuple((k, 1) for k in dilation), base, dilation, groups, batches)


# A name -> (function, number of arrays, what draws static values from a Random and shapes). "r0": an array and r0.
# What moves a scale along; failing examples shrink towards the first of them.
MOVES = {
    "transpose": (jnp.transpose, 1, lambda rng, s: (tuple(rng.sample(range(len(s)), len(s))),)),
    "reshape": (jnp.reshape, 1, _reshape),
    "expand_dims": (jnp.expand_dims, 1, lambda rng, shape: (rng.randint(0, len(shape)),)),
    "squeeze": (lambda a: jnp.squeeze(a) if a.size > 1 else a, 1),
    "broadcast": (lax.broadcast_in_dim, 1, _broadcast),
    "stretch": (lambda a: jnp.broadcast_to(a, [2 if n == 1 else n for n in a.shape]), 1),
    "rev": (jnp.flip, 1, _axis),
    "slice": (lambda a, axis: lax.slice_in_dim(a, int(a.shape[axis] > 1), None, 1, axis), 1, _axis),
    "stride": (lambda a, axis: lax.slice_in_dim(a, 0, None, 2, axis), 1, _axis),
    "dynamic_slice": (_dynamic_slice, "r0", lambda rng, s, _: (rng.randrange(len(s)), rng.random() < 0.5)),
    "concatenate": (_concatenate, 2, _axis),
    "stack": (lambda a, b, axis: jnp.stack([a, _fit(b, a.shape)], axis), 2, _axis),
    "split": (lambda a, axis: jnp.split(a, 2 if a.shape[axis] % 2 == 0 else 1, axis)[-1], 1, _axis),
    "unstack": (lambda a, axis: jnp.unstack(a, axis=axis)[0] if a.ndim > 1 else a + 0, 1, _axis),
    "tile": (lambda a, axis: jnp.tile(a, [2 if i == axis else 1 for i in range(a.ndim)]), 1, _axis),
    "fit": (_fit, 1, lambda rng, _: (rng.choice([(2, 3), (4,), (3, 2, 2), (3, 4), (2, 2, 3, 1)]),)),
    "scale": (lambda a: a * -1.5, 1),
    "divide": (lambda a: a / 1.5, 1),
    "scale_by_array": (lambda a: jnp.array(0.6) * a, 1),
    "scale_by_data": (lambda a, number: a * (1.5 + jnp.sin(number)), "r0"),
    "scale_by_sum": (lambda a, b: a * jnp.sin(jnp.sum(b)), 2),
    "neg": (jnp.negative, 1),
    "copy": (jnp.copy, 1),
    "stop_gradient": (lax.stop_gradient, 1),
    "bfloat16": (lambda a: a.astype(jnp.bfloat16).astype(jnp.float32), 1),
}
# What needs the weight itself, or may treat it so; among them the contractions.
USES = {
    "dot_general": (_dot_general, 2, _letters),
    "einsum": (_einsum, 2, _letters),
    "conv": (_conv, 2, _conv_options),
    "square": (lambda a: a * a, 1),
    "multiply": (lambda a, b: a * _fit(b, a.shape), 2),
    "add": (lambda a, b: a + _fit(b, a.shape), 2),
    "sin": (jnp.sin, 1),
    "gather": (lambda a, i, k: a[jnp.array([i, k])], 1, lambda rng, s: (rng.randrange(s[0]), rng.randrange(s[0]))),
    "sum": (lambda a, axis, keep: a.sum(axis, keepdims=keep), 1, lambda rng, s: (*_axis(rng, s), len(s) > 2)),
    "where": (lambda a, number: jnp.where(jnp.sin(number + jnp.arange(a.shape[-1])) > 0, a, 0), "r0"),
    "sort": (jnp.sort, 1, _axis),
    "cumsum": (jnp.cumsum, 1, _axis),
    "pad": (lambda a: lax.pad(a, jnp.float32(0.3), [(1, 0, 0)] * a.ndim), 1),
    "roll": (lambda a, axis: jnp.roll(a, 1, axis), 1, _axis),
    "split": (lambda a, axis: lax.split(a, (1, a.shape[axis] - 1), axis) if a.shape[axis] > 1 else a, 1, _axis),
    "set": (lambda a, b: a.at[0].set(_fit(b, a.shape[1:])), 2),
}


def _grad(bodies, arrays):
    return jax.grad(lambda rest: sum(jnp.sum(jnp.sin(out)) for out in bodies[0](arrays[0], *rest)))(arrays[1:])


def _call(transform, bodies, arrays, close_over):
    return transform(lambda: bodies[0](*arrays))() if close_over else transform(bodies[0])(*arrays)


def _custom_jvp(bodies, arrays):
    """With a derivative that is not the function's, so that it shows when the rule gets lost. So has `_custom_vjp`."""
    fn = jax.custom_jvp(bodies[0])

    @fn.defjvp
    def rule(primals, tangents):
        out, tangents = jax.jvp(bodies[0], primals, tangents)
        return out, [1.5 * tangent for tangent in tangents]

    return fn(*arrays)


def _custom_vjp(bodies, arrays):
    fn = jax.custom_vjp(bodies[0])

    def backward(arrays, cotangents):
        return tuple(1.5 * cotangent for cotangent in jax.vjp(bodies[0], *arrays)[1](cotangents))

    fn.defvjp(lambda *arrays: (bodies[0](*arrays), arrays), backward)
    return fn(*arrays)


def _scan(bodies, arrays, carries, xs, reverse):
    number, *arrays = arrays
    carry, xs, consts = arrays[:carries], arrays[carries : carries + xs], arrays[carries + xs :]

    def step(carry, xs):
        out = bodies[0](number, *carry, *(xs or ()), *consts)
        return out[:carries], out[carries:]

    carry, ys = lax.scan(step, carry, xs or None, length=None if xs else 3, reverse=reverse)
    return carry + ys


def _fori_loop(bodies, arrays, n):
    return lax.fori_loop(0, 3, lambda _, c: bodies[0](arrays[0], *c, *arrays[n + 1 :]), arrays[1 : n + 1])


def _while_loop(bodies, arrays, carries):
    """Reverse mode does not go through a `while_loop`, so nothing is differentiated here."""
    number, *arrays = map(lax.stop_gradient, arrays)

    def trip(state):
        return [state[0] + 1, *bodies[0](number, *state[1:], *arrays[carries:])]

    return lax.while_loop(lambda state: state[0] < 2 + (number > 0), trip, [0, *arrays[:carries]])[1:]


def _switch(bodies, arrays, close_over):
    index = (len(bodies) * jnp.abs(jnp.sin(5 * arrays[0]))).astype(jnp.int32)
    if close_over:
        return lax.switch(index, [lambda body=body: body(*arrays) for body in bodies])
    return lax.switch(index, bodies, *arrays)


_DOTS = jax.checkpoint_policies.dots_saveable
# A name -> function of bodies, arrays (r0 first) and static values.
CALLS = {
    "jit": functools.partial(_call, jax.jit),
    "checkpoint": functools.partial(_call, jax.checkpoint),
    "checkpoint_dots": functools.partial(_call, functools.partial(jax.checkpoint, policy=_DOTS)),
    "vmap": lambda bodies, arrays, *in_axes: jax.vmap(bodies[0], (None, *in_axes))(*arrays),
    "scan": _scan,
    **{"fori_loop": _fori_loop, "while_loop": _while_loop, "switch": _switch},
    **{"custom_jvp": _custom_jvp, "custom_vjp": _custom_vjp, "grad": _grad},
}
