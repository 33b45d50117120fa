"""Three machines that run one and the same network: in JAX; in NumPy, for its value; in NumPy, for what weights reach.

A network is written once, against a machine. `Jax` makes the program that wn_jax reads. `Value` knows neither jaxprs
nor transformations: a loop is Python's, `jit` is nothing. `Reach` is a `Value` that keeps each pre-activation that the
network hands to `tap`, and goes on with fixed random numbers in its stead: a weight then reaches its own outputs and no
others. Masks, zeros and what is under `stop_gradient` are such numbers, too.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@functools.cache
def generic(shape, seed=0):
    """Fixed random numbers, none of them near zero."""
    rng = np.random.default_rng([seed, *shape])
    numbers = np.array(rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape))
    numbers.flags.writeable = False
    return numbers


def _mask(shape):
    return np.asarray(generic(shape, 1) > -0.9, np.float32)


class Jax:
    np = jnp

    def tap(self, y):
        """`y`, a pre-activation: all that a layer computes of its weights before anything else is done to it."""
        return y

    def dead(self, thunk):
        """The result of a thunk that nobody takes: there is none in NumPy, where it is not even run."""
        return thunk()

    def relu(self, x):
        return jax.nn.relu(x)

    def stop(self, array):
        return lax.stop_gradient(array)

    def mask(self, shape, how):
        return jnp.tril(jnp.ones(shape)) if how == "tril" else _mask(shape)

    def zeros(self, shape):
        return jnp.zeros(shape)

    def unstack(self, array, axis=0):
        return jnp.unstack(array, axis=axis)

    def at(self, array, i):
        """Number `i`, known to the running program only."""
        return lax.dynamic_index_in_dim(array, i, 0, keepdims=False)

    def cut(self, array, start, size, axis):
        return lax.dynamic_slice_in_dim(array, start, size, axis)

    def call(self, how, fn, *args):
        return _CALLS[how](fn)(*args)

    def scan(self, fn, carry, xs, reverse=False):
        return lax.scan(fn, carry, xs, reverse=reverse)

    def fori(self, n, fn, carry):
        return lax.fori_loop(0, n, fn, carry)

    def repeat_while(self, n, fn, carry):
        return lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, fn(c[0], c[1])), (0, carry))[1]

    def vmap(self, fn, params, h, axes, axis):
        """`fn(params, h)` for each index of the `axes` of params (a dict), or of `axis` of h, stacked in front."""
        return jax.vmap(fn, (axes, axis))(params, h)

    def cond(self, which, fns, *args):
        return lax.cond(which, *fns, *args)

    def ragged_dot(self, x, w, sizes):
        return lax.ragged_dot(x, w, jnp.asarray(sizes, jnp.int32))

    def conv(self, x, w, spec, options):
        """`x` is (N, *spatial, C); `spec` names the dimensions of `w`, spatial ones by A and B."""
        stride, pad, dilate_x, dilate_w, groups = options
        n = w.ndim - 2
        image = f"N{'AB'[:n]}C"
        return lax.conv_general_dilated(
            x, w, (stride,) * n, (pad,) * n, (dilate_x,) * n, (dilate_w,) * n, (image, spec, image), groups
        )


def _custom_jvp(fn):
    wrapped = jax.custom_jvp(fn)
    wrapped.defjvp(lambda primals, tangents: jax.jvp(fn, primals, tangents))
    return wrapped


def _custom_vjp(fn):
    wrapped = jax.custom_vjp(fn)
    wrapped.defvjp(lambda *args: (fn(*args), args), lambda args, cotangent: jax.vjp(fn, *args)[1](cotangent))
    return wrapped


_CALLS = {"jit": jax.jit, "remat": jax.checkpoint, "custom_jvp": _custom_jvp, "custom_vjp": _custom_vjp}


class Value:
    np = np

    def tap(self, y):
        return y

    def dead(self, thunk):
        return None

    def relu(self, x):
        return np.maximum(x, 0)

    def stop(self, array):
        return array

    def mask(self, shape, how):
        return np.tril(np.ones(shape)) if how == "tril" else _mask(shape)

    def zeros(self, shape):
        return np.zeros(shape)

    def unstack(self, array, axis=0):
        return list(np.moveaxis(array, axis, 0))

    def at(self, array, i):
        return array[i]

    def cut(self, array, start, size, axis):
        return np.take(array, range(start, start + size), axis)

    def call(self, how, fn, *args):
        return fn(*args)

    def scan(self, fn, carry, xs, reverse=False):
        n, ys = len(jax.tree.leaves(xs)[0]), []
        for i in reversed(range(n)) if reverse else range(n):
            carry, y = fn(carry, jax.tree.map(lambda a, i=i: a[i], xs))
            ys.append(y)
        return carry, jax.tree.map(lambda *ys: np.stack(ys), *(ys[::-1] if reverse else ys))

    def fori(self, n, fn, carry):
        return functools.reduce(lambda carry, i: fn(i, carry), range(n), carry)

    repeat_while = fori

    def vmap(self, fn, params, h, axes, axis):
        n = h.shape[axis] if axis is not None else next(params[k].shape[a] for k, a in axes.items())
        slices = [{k: p if axes is None else np.take(p, i, axes[k]) for k, p in params.items()} for i in range(n)]
        return np.stack([fn(p, h if axis is None else np.take(h, i, axis)) for i, p in enumerate(slices)])

    def cond(self, which, fns, *args):
        return fns[0 if which else 1](*args)

    def ragged_dot(self, x, w, sizes):
        ends = np.cumsum(sizes)
        return np.concatenate([x[end - n : end] @ part for part, n, end in zip(w, sizes, ends, strict=True)])

    def conv(self, x, w, spec, options):
        stride, pad, dilate_x, dilate_w, groups = options
        n = w.ndim - 2
        w = np.transpose(w, [spec.index(c) for c in "AB"[:n] + "IO"])
        apart = np.zeros((len(x), *((size - 1) * dilate_x + 1 for size in x.shape[1:-1]), x.shape[-1]))
        apart[(slice(None), *[slice(None, None, dilate_x)] * n)] = x
        x = np.pad(apart, [(0, 0), *[pad] * n, (0, 0)])
        out = [(a - (k - 1) * dilate_w - 1) // stride + 1 for a, k in zip(x.shape[1:-1], w.shape, strict=False)]
        x, w = (a.reshape(*a.shape[:-1], groups, -1) for a in (x, w))
        y = 0
        for at in itertools.product(*map(range, w.shape[:n])):
            cuts = (
                slice(k * dilate_w, k * dilate_w + (m - 1) * stride + 1, stride) for k, m in zip(at, out, strict=True)
            )
            y = y + np.einsum("n...gi,igo->n...go", x[(slice(None), *cuts)], w[at])
        return y.reshape(*y.shape[:-2], -1)


class Reach(Value):
    def __init__(self):
        self.taps = []

    def tap(self, y):
        self.taps.append(np.ravel(y))
        return generic(y.shape, len(self.taps))

    def relu(self, x):
        return np.tanh(x)  # a zero would hide that a weight is there

    def stop(self, array):
        return generic(array.shape, 2)  # a constant: no derivative goes through

    def mask(self, shape, how):
        return generic(shape, 3)

    def zeros(self, shape):
        return generic(shape, 3)

    def cond(self, which, fns, *args):
        return jax.tree.map(np.add, *(fn(*args) for fn in fns))  # as either may run
