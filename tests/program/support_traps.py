"""Uses of arrays that are no plain contraction with data: what must not be taken, and what may be left alone.

Layers as those of `support_layers`. Where a leaf "may" be taken, its axes must be right.
"""

import numpy as np

from tests.program.support_layers import Layer, Leaf, never

_IDS = np.array([1, 0, 1])


def may(*shape):
    return Leaf(shape, (0,), None, "may")


def _tied(m, p, h):
    w = p["w"]  # an embedding, and by its transpose the last layer
    return h * m.tap(w[_IDS]).mean(0) + m.tap(h @ w.T).mean()


def _both_ways(m, p, h):
    return m.tap(m.np.tanh(m.tap(h @ p["w"])) @ p["w"].T)


def _outer_shape(m, p, h):
    y = m.np.concatenate([h, 0.37 - 0.8 * h], 1) @ m.np.kron(p["a"], p["w"])
    return m.tap(y)[:, : p["w"].shape[1]]


def _blended(m, p, h):
    return m.tap(h @ (m.np.tanh(p["code"]) @ p["w"]).reshape(h.shape[1], -1))


def _mixed_reshape(m, p, h):
    w = p["w"]
    return m.tap(h @ w.reshape(w.shape[::-1]).T)[:, : h.shape[1]]


def _toeplitz(m, p, h):
    i = np.arange(h.shape[1])
    return m.tap(h @ p["w"][i[:, None] - i[None] + len(i) - 1])


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


def _frozen_row(m, p, h):
    return m.tap(h @ m.np.concatenate([m.stop(p["w"][:1]), p["w"][1:]]))


def _frozen_column(m, p, h):
    return m.tap(h @ m.np.concatenate([m.stop(p["w"][:, :1]), p["w"][:, 1:]], 1))


def _masked_vector(m, p, h):
    return m.tap(h @ (p["w"] * m.mask((h.shape[1], h.shape[1]), "constant")))


def _masked_copies(m, p, h):
    n = h.shape[1]
    return m.tap(m.np.einsum("bi,kio->bko", h, p["w"] * m.mask((2, n, n), "constant"))).sum(1)


def _where_ones(m, p, h):
    return m.tap(h @ m.np.where(m.mask(p["w"].shape, "constant") != 0, p["w"], 1.0))


def _where_positive(m, p, h):
    return m.tap(h @ m.np.where(p["w"] > 0, p["w"], 0.1 * p["w"]))


def _chosen(m, p, h):
    return m.tap(h @ m.cond(h.sum() > 0, [lambda a, b: a, lambda a, b: b], p["a"], p["w"]))


def _chosen_index(m, p, h):
    return m.tap(h @ m.at(p["w"], (h.sum() > 0).astype(np.int32)))


def _split_inputs(m, p, h):
    first, *rest = m.np.split(p["w"], [1])
    return m.tap(h[:, :1] @ first) * m.tap(h[:, 1:] @ rest[0])


def _unstacked_inputs(m, p, h):
    rows = m.unstack(p["w"])
    return sum(m.np.tanh(m.tap(h[:, k : k + 1] @ row[None])) for k, row in enumerate(rows))


def _norm(m, p, h):
    return h * m.tap(m.np.sqrt((p["w"] ** 2).sum()))


def _standardized(m, p, h):
    w = p["w"] - p["w"].mean(0)
    return m.tap(h @ (w / m.np.sqrt((w**2).mean(0) + 0.1)))


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


TRAPS = {
    "tied": (lambda i: {"w": never(3, i)}, _tied),
    "both ways": (lambda i: {"w": never(i, i)}, _both_ways),
    "rows and columns": (lambda i: {"w": never(i, i)}, _rows_and_columns),
    "kron": (lambda i: {"a": never(2, 2), "w": never(i, i)}, _outer_shape),
    "low rank": (lambda i: {"a": never(i, 2), "b": never(2, i)}, lambda m, p, h: m.tap(h @ (p["a"] @ p["b"]))),
    "blended": (lambda i: {"code": never(2), "w": never(2, i * i)}, _blended),
    "mixed reshape": (lambda i: {"w": never(i, i + 1)}, _mixed_reshape),
    "toeplitz": (lambda i: {"w": never(2 * i - 1)}, _toeplitz),
    "penalty": (lambda i: {"w": never(i, i)}, _penalty),
    "norm": (lambda i: {"w": never(i, i)}, _norm),
    "standardized": (lambda i: {"w": never(i, i)}, _standardized),
    "tanh": (lambda i: {"w": never(i, i)}, lambda m, p, h: m.tap(h @ m.np.tanh(p["w"]))),
    "squared": (lambda i: {"w": never(i, i)}, lambda m, p, h: m.tap(h @ p["w"] ** 2)),
    "its own square": (lambda i: {"w": never(i, i)}, lambda m, p, h: m.tap(h @ (p["w"] @ p["w"]))),
    "cumsum over outputs": (lambda i: {"w": never(i, i)}, lambda m, p, h: m.tap(h @ m.np.cumsum(p["w"], 1))),
    "sorted": (lambda i: {"w": never(i, i)}, lambda m, p, h: m.tap(h @ m.np.sort(p["w"], 1))),
    "diagonal added": (lambda i: {"w": never(i)}, lambda m, p, h: m.tap(h * p["w"] + p["w"])),
    "parts of a sum": (lambda i: {"w": never(i, i)}, _parts_of_a_sum),
    "halves": (lambda i: {"w": never(2 * i, i)}, _halves),
    "summed heads": (lambda i: {"w": never(i, 2 * i)}, _summed_heads),
    "split inputs": (lambda i: {"w": never(i, i)}, _split_inputs),
    "unstacked inputs": (lambda i: {"w": never(i, i)}, _unstacked_inputs),
    "frozen row": (lambda i: {"w": never(i, i)}, _frozen_row),
    "masked vector": (lambda i: {"w": never(i)}, _masked_vector),
    "repeated vector": (
        lambda i: {"w": never(i)},
        lambda m, p, h: m.tap(h @ m.np.broadcast_to(p["w"], (h.shape[1],) * 2)),
    ),
    "where positive": (lambda i: {"w": never(i, i)}, _where_positive),
    "stacked vectors": (
        lambda i: {"a": never(i), "w": never(i)},
        lambda m, p, h: m.tap(h[:, :2] @ m.np.stack([p["a"], p["w"]])),
    ),
    "lookup": (lambda i: {"w": never(3, i)}, _lookup),
    "gained": (
        lambda i: {"s": never(i), "w": may(i, i)},
        lambda m, p, h: m.tap(h @ (p["s"][:, None] * p["w"])),
    ),
    "of two terms": (lambda i: {"a": may(i, i), "w": may(i, i)}, lambda m, p, h: m.tap(h @ (p["a"] + p["w"]))),
    "rolled": (lambda i: {"w": may(i, i)}, lambda m, p, h: m.tap(h @ m.np.roll(p["w"], 1, 0))),
    "rolled outputs": (lambda i: {"w": may(i, i)}, lambda m, p, h: m.tap(h @ m.np.roll(p["w"], 1, 1))),
    "cumsum over inputs": (lambda i: {"w": may(i, i)}, lambda m, p, h: m.tap(h @ m.np.cumsum(p["w"], 0))),
    "permuted rows": (lambda i: {"w": may(i, i)}, lambda m, p, h: m.tap(h @ p["w"][np.arange(len(p["w"]))[::-1]])),
    "repeated": (lambda i: {"w": may(i, i)}, lambda m, p, h: m.tap(h @ m.np.repeat(p["w"], 2, 1))[:, : h.shape[1]]),
    "padded": (
        lambda i: {"w": may(i, i)},
        lambda m, p, h: m.tap(h @ m.np.pad(p["w"], [(0, 0), (0, 2)]))[:, : h.shape[1]],
    ),
    "modulated by data": (lambda i: {"w": may(i, i)}, lambda m, p, h: m.tap(h @ (p["w"] * m.np.tanh(h[0])[:, None]))),
    "tiled inputs": (
        lambda i: {"w": may(i, i)},
        lambda m, p, h: m.tap(m.np.concatenate([h, 0.37 - 0.8 * h], 1) @ m.np.tile(p["w"], (2, 1))),
    ),
    "joined inputs": (
        lambda i: {"a": may(i, i), "b": may(i, i)},
        lambda m, p, h: m.tap(m.np.concatenate([h, 0.37 - 0.8 * h], 1) @ m.np.concatenate([p["a"], p["b"]])),
    ),
    "heads of the input": (
        lambda i: {"w": Leaf((2 * i, i), (0,), None, "may")},
        lambda m, p, h: m.tap(
            m.np.einsum("bki,kio->bo", m.np.stack([h, 0.37 - 0.8 * h], 1), p["w"].reshape(2, -1, h.shape[1]))
        ),
    ),
    "stacked and summed": (
        lambda i: {"a": may(i, i), "w": may(i, i)},
        lambda m, p, h: m.tap(m.np.einsum("bki,kio->bo", m.np.stack([h, 0.37 - 0.8 * h], 1), m.np.stack([p["a"], p["w"]]))),
    ),
    "tiled and mixed": (
        lambda i: {"w": may(i, i)},
        lambda m, p, h: m.tap(m.np.repeat(h, 2, 1) @ m.np.tile(p["w"], (1, 2)).reshape(-1, h.shape[1])),
    ),
    "masked column": (
        lambda i: {"w": may(i)},
        lambda m, p, h: m.tap(h @ (p["w"][:, None] * m.mask((h.shape[1],) * 2, "constant"))),
    ),
    "mask in the tree": (
        lambda i: {"mask": never(i, i), "w": may(i, i)},
        lambda m, p, h: m.tap(h @ (p["w"] * m.stop(p["mask"]))),
    ),
    "straight through": (
        lambda i: {"w": may(i, i)},
        lambda m, p, h: m.tap(h @ (p["w"] + m.stop(m.np.sign(p["w"]) - p["w"]))),
    ),
    "times zero": (lambda i: {"w": may(i, i)}, lambda m, p, h: m.tap(h @ p["w"]) + m.tap(0.0 * (p["w"] ** 2).sum())),
    "broadcast and summed": (
        lambda i: {"w": may(i, i)},
        lambda m, p, h: m.tap(
            m.np.einsum(
                "bki,kio->bo", m.np.stack([h, 0.37 - 0.8 * h], 1), m.np.broadcast_to(p["w"], (2, h.shape[1], h.shape[1]))
            )
        ),
    ),
    "beside data": (
        lambda i: {"w": may(i, i)},
        lambda m, p, h: m.tap(h @ m.np.concatenate([p["w"], h.T], 1))[:, : h.shape[1]],
    ),
    "above data": (
        lambda i: {"w": may(i, i)},
        lambda m, p, h: m.tap(m.np.concatenate([h, 0.37 - 0.8 * h], 1) @ m.np.concatenate([p["w"], m.np.outer(h[0], h[0])])),
    ),
    "rows in a loop": (lambda i: {"w": may(i, i)}, _rows_in_a_loop),
    "frozen column": (lambda i: {"w": may(i, i)}, _frozen_column),
    "masked copies": (lambda i: {"w": may(i, i)}, _masked_copies),
    "where ones": (lambda i: {"w": may(i, i)}, _where_ones),
    "chosen": (lambda i: {"a": may(i, i), "w": may(i, i)}, _chosen),
    "chosen index": (lambda i: {"w": Leaf((2, i, i), (1,), None, "may")}, _chosen_index),
    "routed": (lambda i: {"w": Leaf((2, i, i), (1,), None, "may")}, _routed),
    "carried": (lambda i: {"w": may(i, i)}, _carried),
    "hypernetwork": (lambda i: {"w": Leaf((i, i * i), (0,), (), "may")}, _hyper),
}


def trap(rng, i):
    """Maps (B, i) to (B, i)."""
    kind = rng.choice([*TRAPS])
    leaves, apply = TRAPS[kind]
    return Layer(kind, leaves(i), apply)
