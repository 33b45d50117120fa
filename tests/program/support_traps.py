"""Uses of arrays that are no plain contraction with data: what must not be taken, and what may be left alone.

Layers as those of `support_layers`. Where a leaf "may" be taken, its axes must be right.
"""

import numpy as np

from tests.program.support_layers import Layer, Leaf, never

_IDS = np.array([1, 0, 1])


def may(*shape):
    return Leaf(shape, (0,), None, "may")


def _other(h):
    return 0.37 - 0.8 * h


def _standardized(m, w):
    w = w - w.mean(0)
    return w / m.np.sqrt((w**2).mean(0) + 0.1)


def _toeplitz(m, w):
    i = np.arange(len(w) // 2)
    return w[i[:, None] - i[None] + len(i)]


def _tied(m, p, h):
    w = p["w"]  # an embedding, and by its transpose the last layer
    return h * m.tap(w[_IDS]).mean(0) + m.tap(h @ w.T).mean()


def _both_ways(m, p, h):
    return m.tap(m.np.tanh(m.tap(h @ p["w"])) @ p["w"].T)


def _penalty(m, p, h):
    return m.tap(h @ p["w"]) + m.tap((p["w"] ** 2).sum())


def _halves(m, p, h):
    n = h.shape[1]
    return m.tap(m.np.einsum("bi,kio->bko", h, p["w"].reshape(2, n, n))).sum(1)


def _summed_heads(m, p, h):
    n = h.shape[1]
    return m.tap(m.np.einsum("bid,idh->bh", h[..., None] * np.ones(2, np.float32), p["w"].reshape(n, 2, n)))


def _rows_in_a_loop(m, p, h):
    def trip(y, row):
        column, w = row
        return y + column[:, None] @ w[None], 0.0

    return m.tap(m.scan(trip, m.np.zeros(h.shape), (h.T, p["w"]))[0])


def _split_inputs(m, p, h):
    first, *rest = m.np.split(p["w"], [1])
    return m.tap(h[:, :1] @ first) * m.tap(h[:, 1:] @ rest[0])


def _unstacked_inputs(m, p, h):
    rows = m.unstack(p["w"])
    return sum(m.np.tanh(m.tap(h[:, k : k + 1] @ row[None])) for k, row in enumerate(rows))


def _norm(m, p, h):
    return h * m.tap(m.np.sqrt((p["w"] ** 2).sum()))


def _parts_of_a_sum(m, p, h):
    return m.tap(h[:, :1] @ p["w"][:1]) * m.tap(h[:, 1:] @ p["w"][1:])


def _rows_and_columns(m, p, h):
    return m.tap(h @ p["w"]) + m.tap(p["w"] @ m.np.tanh(h[0]))


def _routed(m, p, h):
    which = (h.sum(1) > 0).astype(np.int32)
    return m.tap(m.np.einsum("bi,bio->bo", h, p["w"][which]))


def _carried(m, p, h):
    def trip(carry, x):
        h, w = carry
        return (m.np.tanh(m.tap(h @ w)), w * 0.9), x

    return m.scan(trip, (h, p["w"]), np.ones(2, np.float32))[0][0]


def _hyper(m, p, h):
    w = m.tap(h.mean(0) @ p["w"]).reshape(h.shape[1], -1)  # a weight that a network gives is data
    return h @ w


def _lookup(m, p, h):
    return h + m.tap(p["w"][_IDS]).mean(0)


def _kron(m, p, h):
    y = m.np.concatenate([h, _other(h)], 1) @ m.np.kron(p["a"], p["w"])
    return m.tap(y)[:, : h.shape[1]]


def _stacked_vectors(m, p, h):
    return m.tap(h[:, :2] @ m.np.stack([p["a"], p["w"]]))


def _stacked_and_summed(m, p, h):
    inputs = m.np.stack([h, _other(h)], 1)
    return m.tap(m.np.einsum("bki,kio->bo", inputs, m.np.stack([p["a"], p["w"]])))


def _heads_of_the_input(m, p, h):
    inputs = m.np.stack([h, _other(h)], 1)
    return m.tap(m.np.einsum("bki,kio->bo", inputs, p["w"].reshape(2, -1, h.shape[1])))


def _masked_copies(m, p, h):
    n = h.shape[1]
    return m.tap(m.np.einsum("bi,kio->bko", h, p["w"] * m.mask((2, n, n), "constant"))).sum(1)


def _masked_column(m, p, h):
    return m.tap(h @ (p["w"][:, None] * m.mask((h.shape[1], h.shape[1]), "constant")))


def _beside_data(m, p, h):
    return m.tap(h @ m.np.concatenate([p["w"], h.T], 1))[:, : h.shape[1]]


def _modulated(m, p, h):
    return m.tap(h @ (p["w"] * m.np.tanh(h[0])[:, None]))


def _times_zero(m, p, h):
    return m.tap(h @ p["w"]) + m.tap(0.0 * (p["w"] ** 2).sum())


def _chosen(m, p, h):
    return m.tap(h @ m.cond(h.sum() > 0, [lambda a, b: a, lambda a, b: b], p["a"], p["w"]))


def _chosen_index(m, p, h):
    return m.tap(h @ m.at(p["w"], (h.sum() > 0).astype(np.int32)))


# Matrices that the input is multiplied with, made of one array. Of the outputs, the first i are taken.
_NEVER_MADE = {
    "mixed reshape": (lambda i: (i, i + 1), lambda m, w: w.reshape(w.shape[::-1]).T),
    "toeplitz": (lambda i: (2 * i,), _toeplitz),
    "standardized": (lambda i: (i, i), _standardized),
    "tanh": (lambda i: (i, i), lambda m, w: m.np.tanh(w)),
    "squared": (lambda i: (i, i), lambda m, w: w**2),
    "its own square": (lambda i: (i, i), lambda m, w: w @ w),
    "cumsum over outputs": (lambda i: (i, i), lambda m, w: m.np.cumsum(w, 1)),
    "sorted": (lambda i: (i, i), lambda m, w: m.np.sort(w, 1)),
    "where positive": (lambda i: (i, i), lambda m, w: m.np.where(w > 0, w, 0.1 * w)),
    "frozen row": (lambda i: (i, i), lambda m, w: m.np.concatenate([m.stop(w[:1]), w[1:]])),
    "masked vector": (lambda i: (i,), lambda m, w: w * m.mask((len(w), len(w)), "constant")),
    "repeated vector": (lambda i: (i,), lambda m, w: m.np.broadcast_to(w, (len(w), len(w)))),
}
_MAY_MADE = {
    "rolled": lambda m, w: m.np.roll(w, 1, 0),
    "rolled outputs": lambda m, w: m.np.roll(w, 1, 1),
    "cumsum over inputs": lambda m, w: m.np.cumsum(w, 0),
    "permuted rows": lambda m, w: w[np.arange(len(w))[::-1]],
    "repeated": lambda m, w: m.np.repeat(w, 2, 1),
    "padded": lambda m, w: m.np.pad(w, [(0, 0), (0, 2)]),
    "frozen column": lambda m, w: m.np.concatenate([m.stop(w[:, :1]), w[:, 1:]], 1),
    "straight through": lambda m, w: w + m.stop(m.np.sign(w) - w),
    "where ones": lambda m, w: m.np.where(m.mask(w.shape, "constant") != 0, w, 1.0),
}
# Such matrices for an input that is twice as long.
_DOUBLED = {
    "tiled inputs": lambda m, w: m.np.tile(w, (2, 1)),
    "tiled and mixed": lambda m, w: m.np.tile(w, (1, 2)).reshape(-1, w.shape[1]),
    "repeated inputs": lambda m, w: m.np.repeat(w, 2, 0),
    "above a constant": lambda m, w: m.np.concatenate([w, m.mask(w.shape, "constant")]),
}
# Of two arrays.
_OF_TWO = {
    "low rank": (lambda i: {"a": never(i, 2), "w": never(2, i)}, lambda m, p: p["a"] @ p["w"]),
    "blended": (
        lambda i: {"a": never(2), "w": never(2, i * i)},
        lambda m, p: (m.np.tanh(p["a"]) @ p["w"]).reshape(round(p["w"].shape[1] ** 0.5), -1),
    ),
    "gained": (lambda i: {"a": never(i), "w": may(i, i)}, lambda m, p: p["a"][:, None] * p["w"]),
    "mask in the tree": (lambda i: {"a": never(i, i), "w": may(i, i)}, lambda m, p: p["w"] * m.stop(p["a"])),
    "learned scale": (lambda i: {"a": never(1, 1), "w": may(i, i)}, lambda m, p: p["a"] * p["w"]),
    "of two terms": (lambda i: {"a": may(i, i), "w": may(i, i)}, lambda m, p: p["a"] + p["w"]),
}
_OTHERS = {
    "tied": (lambda i: {"w": never(3, i)}, _tied),
    "both ways": (lambda i: {"w": never(i, i)}, _both_ways),
    "rows and columns": (lambda i: {"w": never(i, i)}, _rows_and_columns),
    "penalty": (lambda i: {"w": never(i, i)}, _penalty),
    "norm": (lambda i: {"w": never(i, i)}, _norm),
    "diagonal added": (lambda i: {"w": never(i)}, lambda m, p, h: m.tap(h * p["w"] + p["w"])),
    "parts of a sum": (lambda i: {"w": never(i, i)}, _parts_of_a_sum),
    "halves": (lambda i: {"w": never(2 * i, i)}, _halves),
    "summed heads": (lambda i: {"w": never(i, 2 * i)}, _summed_heads),
    "split inputs": (lambda i: {"w": never(i, i)}, _split_inputs),
    "unstacked inputs": (lambda i: {"w": never(i, i)}, _unstacked_inputs),
    "stacked vectors": (lambda i: {"a": never(i), "w": never(i)}, _stacked_vectors),
    "kron": (lambda i: {"a": never(2, 2), "w": never(i, i)}, _kron),
    "lookup": (lambda i: {"w": never(3, i)}, _lookup),
    "stacked and summed": (lambda i: {"a": may(i, i), "w": may(i, i)}, _stacked_and_summed),
    "heads of the input": (lambda i: {"w": may(2 * i, i)}, _heads_of_the_input),
    "masked copies": (lambda i: {"w": may(i, i)}, _masked_copies),
    "masked column": (lambda i: {"w": may(i)}, _masked_column),
    "beside data": (lambda i: {"w": may(i, i)}, _beside_data),
    "modulated by data": (lambda i: {"w": may(i, i)}, _modulated),
    "times zero": (lambda i: {"w": may(i, i)}, _times_zero),
    "rows in a loop": (lambda i: {"w": may(i, i)}, _rows_in_a_loop),
    "carried": (lambda i: {"w": may(i, i)}, _carried),
    "hypernetwork": (lambda i: {"w": may(i, i * i)}, _hyper),
    "chosen": (lambda i: {"a": may(i, i), "w": may(i, i)}, _chosen),
    "chosen index": (lambda i: {"w": Leaf((2, i, i), (1,), None, "may")}, _chosen_index),
    "routed": (lambda i: {"w": Leaf((2, i, i), (1,), None, "may")}, _routed),
}


def trap(rng, i):
    """Maps (B, i) to (B, i)."""
    kind = rng.choice([*_NEVER_MADE, *_MAY_MADE, *_DOUBLED, *_OF_TWO, *_OTHERS])
    if kind in _OTHERS:
        leaves, apply = _OTHERS[kind]
        return Layer(kind, leaves(i), apply)
    if kind in _OF_TWO:
        leaves, make = _OF_TWO[kind]
        return Layer(kind, leaves(i), lambda m, p, h: m.tap(h @ make(m, p)))
    if kind in _DOUBLED:
        make = _DOUBLED[kind]
        return Layer(
            kind, {"w": may(i, i)}, lambda m, p, h: m.tap(m.np.concatenate([h, _other(h)], 1) @ make(m, p["w"]))
        )
    shape, make = _NEVER_MADE.get(kind) or (None, _MAY_MADE[kind])
    leaf = never(*shape(i)) if shape else may(i, i)
    return Layer(kind, {"w": leaf}, lambda m, p, h: m.tap(h @ make(m, p["w"]))[:, :i])
