"""wn_jax, on the networks in Flax Linen: as its guides recommend, and in the other ways that it has."""

from __future__ import annotations

from typing import Any, Literal

import jax
import optax

import wn_jax as wn
from experiments.bench.arms import Arm
from experiments.bench.libraries import carried, linen
from experiments.bench.libraries.jax_steps import LEARNING_RATE, Apply, accumulated_once, arm, inputs
from experiments.bench.rows import Row
from wn_jax.optim import project_directions

_PLAIN = "linen plain"


def arms(row: Row) -> list[Arm]:
    """The plain model twice, and wn_jax in its ways; the second plain one shows what of a ratio is noise."""
    apply, params, nodes = build(row)
    x = inputs(row)
    plain = [arm(name, _PLAIN, row, apply, params, x) for name in (_PLAIN, "control")]

    def ours(name: str, scale: Literal["auto", "weight", "output"] = "auto", **options: Any) -> Arm:
        return arm(name, _PLAIN, row, wn.wrap(apply, scale=scale), nodes, x, **options)

    if row.large:
        return [*plain, ours("wn_jax")]
    if row.work == "serve":
        return [*plain, ours("wn_jax"), arm("folded", _PLAIN, row, apply, wn.reconstruct(nodes), x)]
    if row.work == "accumulate":
        return [*plain, ours("wn_jax", gradient=accumulated_once(apply, wn.reconstruct)), ours("each time")]
    ways = [ours("wn_jax"), ours("on weights", "weight"), ours("on outputs", "output"), _projected(row)]
    if row.network.startswith("mlp"):  # where the norm is much of the cost
        ways += [_carried(row, measured) for measured in (True, False)]
    return [*plain, *ways]


def build(row: Row) -> tuple[Apply, Any, Any]:
    """A function of plain parameters, these, and the same with nodes."""
    apply, params = linen.build(row)
    x = inputs(row)
    axes = wn.infer_axes(apply)(params, x[0] if row.work == "accumulate" else x)
    return apply, params, wn.reparameterize(params, axes)


def carry(nodes: Any, measured: bool) -> Any:
    """The tree with nodes that are told their norms."""

    def told(leaf: Any) -> Any:
        return carried.Carried.of(leaf, measured) if isinstance(leaf, wn.WeightNorm) else leaf

    return jax.tree.map(told, nodes, is_leaf=lambda leaf: isinstance(leaf, wn.WeightNorm))


def _carried(row: Row, measured: bool) -> Arm:
    """The arm with norms that the update before measured; or with those of the start, as if norms cost nothing."""
    apply, _, nodes = build(row)
    name = "carried" if measured else "norm for free"
    return arm(name, _PLAIN, row, wn.wrap(apply), carry(nodes, measured), inputs(row), update=carried.update)


def _projected(row: Row) -> Arm:
    """The arm with `project_directions`, whose state goes from step to step, too."""
    apply, _, nodes = build(row)
    apply = wn.wrap(apply)
    optimizer = optax.chain(optax.sgd(LEARNING_RATE), project_directions())

    def update(state: Any, gradient: Any) -> Any:
        params, opt_state = state
        updates, opt_state = optimizer.update(gradient[0], opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    state = (nodes, optimizer.init(nodes))
    return arm("projected", _PLAIN, row, lambda state, x: apply(state[0], x), state, inputs(row), update=update)
