"""Layers whose truth is known by hand: for each leaf, which axes are summed over, and whether it must be found.

Each layer maps (B, i) to (B, o) on a machine of `support_machines`, and taps its pre-activations. `support_programs`
composes them.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tests.program.support_machines import generic


class Leaf(NamedTuple):
    shape: tuple
    summed: tuple = ()
    """The axes that are summed over, counted from 0."""
    copies: tuple | None = None
    """The axes that count copies; `None` where the program does not tell them from features."""
    need: str = "must"
    """"must" be found; "may" be left alone; "never" to be taken: what is no weight, or not provably one."""


class Layer(NamedTuple):
    kind: str
    leaves: dict
    apply: Callable
    """`(machine, params, h) -> h`."""


def never(*shape):
    return Leaf(shape, need="never")


# ---- What a layer may do to a weight first, which changes nothing about its axes.

_DRESSES = {
    "neg": lambda m, w: -w,
    "scaled": lambda m, w: w * 0.7,
    "divided": lambda m, w: w / np.float32(1.3),
    "flipped in front": lambda m, w: m.np.flip(w, 0),
    "flipped behind": lambda m, w: m.np.flip(w, -1),
    "transposed twice": lambda m, w: m.np.transpose(m.np.transpose(w)),
    "expanded": lambda m, w: m.np.squeeze(m.np.expand_dims(w, 1), 1),
    "flat and back": lambda m, w: w.reshape(1, *w.shape, 1)[0, ..., 0],
    "times a mask": lambda m, w: w * m.mask(w.shape, "constant"),
    "mask times": lambda m, w: m.mask(w.shape, "constant") * w,
    "times a thin mask": lambda m, w: w * m.mask((*w.shape[:-1], 1), "constant"),
    "times a row": lambda m, w: w * m.mask(w.shape[-1:], "constant"),
    "where": lambda m, w: m.np.where(m.mask(w.shape, "constant") != 0, w, 0),
    "where not": lambda m, w: m.np.where(m.mask(w.shape, "constant") == 0, 0.0, w),
    "lower triangle": lambda m, w: w * m.mask(w.shape, "tril"),
    "where triangle": lambda m, w: m.np.where(m.mask(w.shape, "tril") > -9, w, 0.0),
}


def dress(rng):
    """`(name, function)`: nothing mostly, or up to two moves and masks."""
    names = rng.sample([*_DRESSES], rng.choice([0, 0, 0, 1, 1, 2]))

    def put_on(m, w):
        for name in names:
            w = _DRESSES[name](m, w)
        return w

    return "".join(f", {name}" for name in names), put_on


# ---- Layers whose weights must be found.

_PRODUCTS = {
    "x @ w": (False, lambda m, h, w: h @ w),
    "x @ w.T": (True, lambda m, h, w: h @ w.T),
    "einsum": (False, lambda m, h, w: m.np.einsum("bi,io->bo", h, w)),
    "w first": (True, lambda m, h, w: m.np.einsum("oi,bi->bo", w, h)),
    "tensordot": (False, lambda m, h, w: m.np.tensordot(w, h, (0, 1)).T),
    "swapped": (True, lambda m, h, w: m.np.matmul(h, m.np.swapaxes(w, 0, 1))),
    "by vector": (True, lambda m, h, w: m.np.stack([w @ row for row in h])),
}


def dense(rng, i, o):
    name = rng.choice([*_PRODUCTS])
    turned, product = _PRODUCTS[name]
    worn, put_on = dress(rng)
    leaf = Leaf((o, i), (1,), ()) if turned else Leaf((i, o), (0,), ())
    return Layer(f"dense {name}{worn}", {"w": leaf}, lambda m, p, h: m.tap(product(m, h, put_on(m, p["w"]))))


def heads(rng, i, o):
    """Into heads and out of them; kernels that have an axis for heads, or get one by a reshape of the output axis."""
    n, d = rng.choice([(2, 3), (3, 2), (2, 2)])
    worn, put_on = dress(rng)
    into, out = rng.choice(["ihd", "hid", "reshaped", "merged"]), rng.choice(["hdo", "ohd", "merged"])
    shapes = {"ihd": ((i, n, d), (0,)), "hid": ((n, i, d), (1,)), "reshaped": ((i, n * d), (0,))}
    shapes |= {"merged": shapes["ihd"], "hdo": ((n, d, o), (0, 1)), "ohd": ((o, n, d), (1, 2))}

    def apply(m, p, h):
        q = put_on(m, p["q"])
        if into == "merged":
            y = (h @ q.reshape(i, n * d)).reshape(-1, n, d)
        else:
            y = m.np.einsum(
                f"bi,{into.replace('reshaped', 'ihd')}->bhd", h, q.reshape(i, n, d) if into == "reshaped" else q
            )
        y = m.np.tanh(m.tap(y))
        if out == "merged":
            return m.tap(y.reshape(-1, n * d) @ p["out"].reshape(n * d, o))
        return m.tap(m.np.einsum(f"bhd,{out}->bo", y, p["out"]))

    leaves = {"q": Leaf(*shapes[into]), "out": Leaf(*shapes["hdo" if out == "merged" else out], ())}
    return Layer(f"heads {into}, {out}{worn}", leaves, apply)


def fused(rng, i, o):
    """One weight that is cut along its output axis into the weights of several products."""
    widths = [o, *rng.choice([[o, o], [2], [1, 3], [o]])]
    ends = list(np.cumsum(widths))
    how = rng.choice(["split", "split behind", "slices", "dynamic slices", "equal", "reshaped"])
    if how in ("equal", "reshaped"):
        widths, ends = [o] * 3, [o, 2 * o, 3 * o]
    turned = how == "split"
    worn, put_on = dress(rng)

    def apply(m, p, h):
        w = put_on(m, p["w"])
        if how in ("split", "split behind"):
            parts = m.np.split(w, [int(end) for end in ends[:-1]], 0 if turned else -1)
        elif how == "equal":
            parts = m.np.split(w, 3, 1)
        elif how == "reshaped":
            parts = m.unstack(w.reshape(i, 3, o), 1)
        elif how == "slices":
            parts = [w[:, end - n : end] for n, end in zip(widths, ends, strict=True)]
        else:
            parts = [m.cut(w, int(end) - n, n, 1) for n, end in zip(widths, ends, strict=True)]
        first, *others = [m.tap(h @ (part.T if turned else part)) for part in parts]
        return first + sum(m.np.tanh(other).mean(1, keepdims=True) for other in others)

    leaf = Leaf((sum(widths), i), (1,), ()) if turned else Leaf((i, sum(widths)), (0,), ())
    return Layer(f"fused by {how}{worn}", {"w": leaf}, apply)


def gating(rng, i, o):
    """A weight for the gate and one for the values, in one array."""
    how = rng.choice(["w[0]", "unstack", "split", "w[:, 0]", "w[..., 0]", "einsum"])
    axis = {"w[:, 0]": 1, "w[..., 0]": 2}.get(how, 0)
    shape, worn = [i, o], dress(rng)
    shape.insert(axis, 2)

    def apply(m, p, h):
        w = worn[1](m, p["w"])
        if how == "einsum":
            gate, value = m.unstack(m.tap(m.np.einsum("bi,kio->kbo", h, w)))
            return m.np.tanh(gate) * value
        parts = {"unstack": lambda: m.unstack(w), "split": lambda: [a[0] for a in m.np.split(w, 2, 0)]}
        slices = [w[(slice(None),) * axis + (k,)] for k in (0, 1)] if how not in parts else parts[how]()
        gate, value = (m.tap(h @ part) for part in slices)
        return m.np.tanh(gate) * value

    leaf = Leaf(tuple(shape), (1,) if axis == 0 else (0,), None if how == "einsum" else (axis,))
    return Layer(f"gating by {how}{worn[0]}", {"w": leaf}, apply)


def joined(rng, i, o):
    """Several weights in one product."""
    how = rng.choice(["stack", "stack behind", "stack between", "concatenate", "tile", "tile in front"])
    letters = {"stack": "kio", "stack behind": "iok", "stack between": "iko"}.get(how)

    def apply(m, p, h):
        if letters:
            w = m.np.stack([p["a"], p["b"]], letters.index("k"))
            return m.np.tanh(m.tap(m.np.einsum(f"bi,{letters}->bko", h, w))).sum(1)
        if how == "concatenate":
            y = m.tap(h @ m.np.concatenate([p["a"], p["b"]], 1))
        elif how == "tile":
            y = m.tap(h @ m.np.tile(p["a"], (1, 2))) + m.tap(m.np.tile(h @ p["b"], (1, 2)))
        else:
            w = m.np.tile(p["a"][None], (2, 1, 1))
            y = m.tap(m.np.einsum("kbi,kio->kbo", m.np.stack([h, 2 * h + 1]), w)).sum(0)
            return y + m.np.tanh(m.tap(h @ p["b"]))
        return m.np.tanh(y[:, :o]) + y[:, o:]

    return Layer(f"joined by {how}", {"a": Leaf((i, o), (0,)), "b": Leaf((i, o), (0,))}, apply)


def ragged(rng, i, o):
    """A mixture of experts: each takes some of the rows."""
    n, turned = rng.choice([2, 3]), rng.random() < 0.3
    worn, put_on = dress(rng)

    def apply(m, p, h):
        sizes = np.full(n, len(h) // n)
        sizes[0] += len(h) - sizes.sum()
        w = put_on(m, p["w"])
        return m.tap(m.ragged_dot(h, m.np.swapaxes(w, 1, 2) if turned else w, sizes))

    leaf = Leaf((n, o, i), (2,), (0,)) if turned else Leaf((n, i, o), (1,), (0,))
    return Layer(f"ragged_dot{' turned' * turned}{worn}", {"w": leaf}, apply)


def experts(rng, i, o):
    """A mixture in which each expert takes all."""
    n, d, (worn, put_on) = rng.choice([2, 3]), rng.choice([2, 3]), dress(rng)

    def apply(m, p, h):
        y = m.np.tanh(m.tap(m.np.einsum("bi,nid->bnd", h, p["up"])))
        return m.tap(m.np.einsum("bnd,ndo->bno", y, put_on(m, p["down"]))).sum(1)

    leaves = {"up": Leaf((n, i, d), (1,)), "down": Leaf((n, d, o), (1,), (0,))}
    return Layer(f"experts{worn}", leaves, apply)


def conv(rng, i, o):
    n = rng.choice([1, 1, 2])
    groups = rng.choice([g for g in range(1, i + 1) if i % g == 0 == o % g])
    spec = "".join(rng.sample("OI" + "AB"[:n], n + 2))
    sizes = {"O": o, "I": i // groups, "A": 2, "B": 3}
    strides = rng.choice([(1, 1), (2, 1), (1, 2)])  # with both of 2, parts of a kernel might meet nothing but zeros
    options = (strides[0], rng.choice([(0, 0), (1, 0), (1, 1)]), strides[1], rng.choice([1, 1, 2]))
    worn, put_on = dress(rng)

    def apply(m, p, h):
        # The image is flat but for a factor. Of the output, its mean over positions is tapped, so that it does not
        # matter at which of them a part of the kernel is over the border.
        image = h[(slice(None), *[None] * n)] * generic((7,) * n + (1,), 4).astype(np.float32)
        y = m.conv(image, put_on(m, p["w"]), spec, (*options, groups))
        return m.tap(y.mean(tuple(range(1, n + 1))))

    leaf = Leaf(tuple(sizes[c] for c in spec), tuple(k for k, c in enumerate(spec) if c != "O"), ())
    return Layer(f"conv {spec} {options} groups {groups}{worn}", {"w": leaf}, apply)


def rnn(rng, i, o):
    """Unrolled from a state of zeros."""
    how = rng.choice(["vanilla", "gru", "joint"])
    n, worn = rng.choice([2, 3]), dress(rng)

    def apply(m, p, h):
        state = m.zeros((len(h), o))
        for t in range(n):
            x = h * (1 + t)
            if how == "joint":
                state = m.np.tanh(m.tap(m.np.concatenate([x, state], 1) @ worn[1](m, p["w"])))
                continue
            wx, wh = worn[1](m, p["wx"]), p["wh"]
            if how == "vanilla":
                state = m.np.tanh(m.tap(x @ wx + state @ wh))
                continue
            reset, update, new = m.np.split(m.tap(x @ wx), 3, 1)
            a, b = m.np.split(m.tap(state @ wh[:, : 2 * o]), 2, 1)
            new = m.np.tanh(new + m.tap((m.np.tanh(reset + a) * state) @ wh[:, 2 * o :]))
            state = state + m.np.tanh(update + b) * new
        return state

    width = 3 * o if how == "gru" else o
    leaves = {"wx": Leaf((i, width), (0,), ()), "wh": Leaf((o, width), (0,), ())}
    leaves = {"w": Leaf((i + o, o), (0,), ())} if how == "joint" else leaves
    return Layer(f"rnn {how}{worn[0]}", leaves, apply)


def twice(rng, i, o):
    """Uses that agree, or one use with data and one without, or under stop_gradient."""
    how = rng.choice(["data", "constant", "zeros", "learned", "stopped", "stopped first", "stopped data"])
    worn, put_on = dress(rng)

    def apply(m, p, h):
        w = put_on(m, p["w"])
        other = {"constant": np.ones((2, i), np.float32), "zeros": m.zeros((1, i))}
        other |= {"learned": p.get("query"), "data": 2 * h + 1}
        other |= {"stopped data": m.stop(h)}
        if how in other:
            return m.tap(h @ w) + m.np.tanh(m.tap(other[how] @ w)).mean(0)
        first, second = (w, m.stop(w)) if how == "stopped" else (put_on(m, m.stop(p["w"])), w)
        return m.tap(h @ first) * m.np.tanh(m.tap((1.1 * h - 0.21) @ second))

    leaves = {"w": Leaf((i, o), (0,), ())} | ({"query": never(1, i)} if how == "learned" else {})
    return Layer(f"twice, {how}{worn}", leaves, apply)


def pooled(rng, i, o):
    """Attention by a learned query; and a table that comes from constant coordinates."""

    def apply(m, p, h):
        tokens = m.np.stack([h, m.np.tanh(h), 0.37 - 0.8 * h], 1)
        query = m.tap(m.np.tile(p["probe"], (len(h), 1, 1)) @ p["query"])
        key, value = m.tap(tokens @ p["key"]), m.tap(tokens @ p["value"])
        weights = m.np.exp(m.np.tanh(m.np.einsum("bqd,btd->bqt", query, key)))
        table = m.tap(np.linspace(-1, 1, 3, dtype=np.float32)[:, None] @ p["table"])
        return m.np.einsum("bqt,bto->bo", weights, value + table)

    may = {"query": Leaf((i, 3), (0,), (), "may"), "table": Leaf((1, o), (0,), (), "may")}
    must = {"key": Leaf((i, 3), (0,), ()), "value": Leaf((i, o), (0,), ())}
    return Layer("pooled by a learned query", {"probe": never(1, 1, i)} | may | must, apply)


def frozen(rng, i, o):
    """Under stop_gradient at every use; beside it a weight."""
    how, (worn, put_on) = rng.choice(["first", "last", "twice"]), dress(rng)

    def apply(m, p, h):
        w = m.stop(put_on(m, p["frozen"])) if how == "last" else put_on(m, m.stop(p["frozen"]))
        y = m.np.sin(m.tap(h @ w))
        y = y + m.tap((0.37 - 0.8 * h) @ m.stop(p["frozen"])) if how == "twice" else y
        return m.tap(y @ p["w"])

    return Layer(f"frozen {how}{worn}", {"frozen": never(i, o), "w": Leaf((o, o), (0,), ())}, apply)


def dead(rng, i, o):
    """Uses whose results nobody takes."""
    how = rng.choice(["plain", "jit", "remat", "scan", "cond", "carry"])
    what = rng.choice(["penalty", "transposed", "gathered"])

    def inner(m, p, h):
        def unused():
            w = p["w"]
            uses = {
                "penalty": lambda: (w**2).sum(),
                "transposed": lambda: (w @ w.T).sum(),
                "gathered": lambda: w[np.array([0, 0])].sum(),
            }
            return uses[what]() + (h @ p["unused"]).sum()

        return m.tap(h @ p["w"]), m.dead(unused)

    def apply(m, p, h):
        if how == "plain":
            return inner(m, p, h)[0]
        if how == "scan":
            return m.scan(lambda carry, x: (carry + 1, inner(m, p, x)), 0.0, m.np.stack([h, 0.37 - 0.8 * h]))[1][0].sum(
                0
            )
        if how == "carry":

            def trip(carry, x):
                unused = m.dead(lambda: carry[1] + (p["w"] @ p["unused"].T).sum())
                return (carry[0] + inner(m, p, x)[0], unused), None

            first = (m.np.zeros((len(h), o)), m.dead(lambda: 0.0))
            return m.scan(trip, first, m.np.stack([h, 2 - h]))[0][0]
        if how == "cond":
            fns = [lambda p, h: inner(m, p, h), lambda p, h: inner(m, p, 0.37 - 0.8 * h)]
            return m.cond(h.sum() > 0, fns, p, h)[0]
        return m.call(how, lambda p, h: inner(m, p, h), p, h)[0]

    return Layer(f"dead {what} in {how}", {"w": Leaf((i, o), (0,), ()), "unused": never(i, o)}, apply)
