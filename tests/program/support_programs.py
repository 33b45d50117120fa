"""Random networks whose truth is known by hand: layers, in loops, branches and stacks, some of them traps."""

import itertools
import random
from typing import NamedTuple

import numpy as np

from tests.program import support_layers as layers
from tests.program.support_layers import Layer, Leaf
from tests.program.support_machines import Jax
from tests.program.support_traps import trap

_KINDS = [
    *[layers.dense, layers.heads, layers.fused, layers.gating, layers.joined, layers.ragged, layers.conv, layers.rnn],
    *[layers.twice, layers.pooled, layers.frozen, layers.dead, layers.experts],
]
_SIZES = [2, 3, 4, 6]


class Network(NamedTuple):
    seed: int
    blocks: tuple
    activations: tuple
    size: int
    """Of the input's last axis."""

    def __call__(self, machine, params, x):
        """The output, of params that are a tree of arrays, on a machine."""
        for k, (block, activation) in enumerate(zip(self.blocks, self.activations, strict=True)):
            x = block.apply(machine, params[f"l{k}"], x)
            x = machine.relu(x) if activation == "relu" else getattr(machine.np, activation)(x)
            x = x * params[f"l{k}"]["gain"] + params[f"l{k}"]["bias"]
        return x

    @property
    def leaves(self):
        """The leaves and what they are, by path."""
        return {f"l{k}/{name}": leaf for k, block in enumerate(self.blocks) for name, leaf in block.leaves.items()}

    def arrays(self):
        """`(params, x)`, in float64."""
        rng = np.random.default_rng(self.seed)
        draw = lambda shape: rng.uniform(0.3, 0.9, shape) * rng.choice([-1, 1], shape)  # noqa: E731
        params = [{name: draw(leaf.shape) for name, leaf in block.leaves.items()} for block in self.blocks]
        return {f"l{k}": leaves for k, leaves in enumerate(params)}, draw((rng.integers(3, 6), self.size))

    def program(self, params, x):
        """The network in JAX: what wn_jax reads."""
        return self(Jax(), params, x)

    def kind(self, path):
        return self.blocks[int(path[1 : path.index("/")])].kind


def network(seed):
    """The network of this number."""
    rng = random.Random(seed)
    sizes = [rng.choice(_SIZES) for _ in range(rng.choice([2, 2, 3, 4]))]
    blocks = [_with_a_bias(_block(rng, i, o), o) for i, o in itertools.pairwise(sizes)]
    activations = [rng.choice(["tanh", "sin", "relu", "arctan"]) for _ in blocks]
    return Network(seed, tuple(blocks), tuple(activations), sizes[0])


def _with_a_bias(block, o):
    more = {"gain": layers.never(o), "bias": layers.never(o)}
    return block._replace(leaves=block.leaves | more)


def _block(rng, i, o, depth=0):
    """A layer, a trap, or one of these in a call, a loop or a stack."""
    choice = rng.choice(["layer"] * 5 + ["trap"] * 2 + ["wrap"] * 6 * (depth < 2))
    if choice == "layer":
        return rng.choice(_KINDS)(rng, i, o)
    if choice == "trap":
        return _widened(rng, trap(rng, i), i, o)
    wrap = rng.choice([_called, _branched, _over_time, _over_batch, _ensemble, _stacked, _stacked, _repeated])
    if wrap in (_stacked, _repeated):
        return _widened(rng, wrap(rng, _block(rng, i, i, depth + 1)), i, o)
    block = _block(rng, i, o, depth + 1)
    # JAX has no vmap of a ragged_dot over all of its axes.
    return (_called if "ragged" in block.kind and wrap in (_over_batch, _ensemble) else wrap)(rng, block)


def _widened(rng, block, i, o):
    """A block from i to i, made one from i to o by a dense layer."""
    if i == o:
        return block
    last = layers.dense(rng, i, o)

    def apply(m, p, h):
        return last.apply(m, {"w": p["last"]}, m.np.tanh(block.apply(m, p, h)))

    return Layer(f"{block.kind}; {last.kind}", block.leaves | {"last": last.leaves["w"]}, apply)


def _called(rng, block):
    how = rng.choice(["jit", "remat", "custom_jvp", "custom_vjp"])

    def apply(m, p, h):
        return m.call(how, lambda p, h: block.apply(m, p, h), p, h)

    return Layer(f"{how}({block.kind})", block.leaves, apply)


def _branched(rng, block):
    """Under a `cond`, whose other branch does the same with other numbers."""

    def apply(m, p, h):
        fns = [lambda p, h: block.apply(m, p, h), lambda p, h: m.np.sin(block.apply(m, p, 0.6 * h + 0.23))]
        return m.cond(h.sum() > 0, fns, p, h)

    return Layer(f"cond({block.kind})", block.leaves, apply)


def _over_time(rng, block):
    reverse = rng.random() < 0.5

    def apply(m, p, h):
        def trip(carry, x):
            y = m.np.tanh(block.apply(m, p, x + carry.mean()))
            return carry + y.mean(), y

        return m.scan(trip, h[0, 0], m.np.stack([h, 0.6 * h + 0.23]), reverse)[1].sum(0)

    return Layer(f"scan over time({block.kind})", block.leaves, apply)


def _over_batch(rng, block):
    def apply(m, p, h):
        return m.vmap(lambda p, row: block.apply(m, p, row[None])[0], p, h, None, 0)

    return Layer(f"vmap over rows({block.kind})", block.leaves, apply)


def _repeated(rng, block):
    """The same weights again and again."""
    how = rng.choice(["fori_loop", "while_loop", "in Python"])

    def apply(m, p, h):
        trip = lambda i, h: m.np.tanh(block.apply(m, p, h))  # noqa: E731
        if how == "in Python":
            return trip(1, trip(0, h))
        return (m.fori if how == "fori_loop" else m.repeat_while)(2, trip, h)

    return Layer(f"{how}({block.kind})", block.leaves, apply)


def _stack(leaf, n, axis):
    """The leaf with a further axis, which counts copies."""
    if leaf.need == "never":
        return leaf._replace(shape=(*leaf.shape[:axis], n, *leaf.shape[axis:]))
    shift = lambda axes: tuple(a + (a >= axis) for a in axes)  # noqa: E731
    copies = None if leaf.copies is None else tuple(sorted((axis, *shift(leaf.copies))))
    return Leaf((*leaf.shape[:axis], n, *leaf.shape[axis:]), shift(leaf.summed), copies, leaf.need)


def _less(leaf, gathers):
    """Of an ensemble, whose first layers have one input for all, so that what counts copies is a feature's axis."""
    return leaf._replace(copies=None, need="may" if gathers and leaf.need == "must" else leaf.need)


def _ensemble(rng, block):
    n = rng.choice([2, 3])
    axes = {name: rng.choice([0, rng.randint(0, len(leaf.shape))]) for name, leaf in block.leaves.items()}

    def apply(m, p, h):
        own = {name: p[name] for name in axes}
        return m.np.sin(m.vmap(lambda p, h: block.apply(m, p, h), own, h, axes, None)).sum(0)

    # Under vmap a dynamic slice of a weight is a gather.
    gathers = any(word in block.kind for word in ("dynamic", "counter", "fori index"))
    leaves = {name: _less(_stack(leaf, n, axes[name]), gathers) for name, leaf in block.leaves.items()}
    return Layer(f"ensemble({block.kind})", leaves, apply)


def _stacked(rng, block):
    """Layers one after the other, their weights in stacks."""
    n, how = rng.choice([2, 3]), rng.choice([*_LOOPS])
    names = [*block.leaves]

    def apply(m, p, h):
        own = {name: p[name] for name in names}
        return _LOOPS[how](m, own, h, lambda p, h: m.np.tanh(block.apply(m, p, h)), n)

    leaves = {name: _stack(leaf, n, 0) for name, leaf in block.leaves.items()}
    if how == "stack by halved counter":
        leaves = {k: leaf._replace(need="may") if leaf.need == "must" else leaf for k, leaf in leaves.items()}
    return Layer(f"{how}({block.kind})", leaves, apply)


def _scanned(m, p, h, layer, n):
    return m.scan(lambda h, p: (layer(p, h), None), h, p)[0]


def _scanned_backwards(m, p, h, layer, n):
    return m.scan(lambda h, p: (layer(p, h), None), h, p, True)[0]


def _counted(m, p, h, layer, n):
    return m.fori(n, lambda i, h: layer({k: m.at(w, i) for k, w in p.items()}, h), h)


def _halved_count(m, p, h, layer, n):
    return m.fori(2 * n, lambda i, h: layer({k: m.at(w, i // 2) for k, w in p.items()}, h), h)


def _indexed(m, p, h, layer, n):
    return m.fori(n, lambda i, h: layer({k: w[i] for k, w in p.items()}, h), h)


def _carried_count(m, p, h, layer, n):
    """As AlphaFold's `layer_stack`: the counter is a part of the carry."""

    def trip(carry, _):
        i, h = carry
        return (i + 1, layer({k: m.at(w, i) for k, w in p.items()}, h)), None

    return m.scan(trip, (0, h), np.zeros(n, np.float32))[0][1]


def _scanned_count(m, p, h, layer, n):
    return m.scan(lambda h, i: (layer({k: m.at(w, i) for k, w in p.items()}, h), None), h, np.arange(n))[0]


def _python_loop(m, p, h, layer, n):
    for i in range(n):
        h = layer({k: w[i] for k, w in p.items()}, h)
    return h


def _unstacked(m, p, h, layer, n):
    apart = {k: m.unstack(w) for k, w in p.items()}
    for i in range(n):
        h = layer({k: parts[i] for k, parts in apart.items()}, h)
    return h


_LOOPS = {
    "stack scanned": _scanned,
    "stack scanned backwards": _scanned_backwards,
    "stack by fori counter": _counted,
    "stack by fori index": _indexed,
    "stack by carried counter": _carried_count,
    "stack by scanned counter": _scanned_count,
    "stack by halved counter": _halved_count,
    "stack in Python": _python_loop,
    "stack unstacked": _unstacked,
}
