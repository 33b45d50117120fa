"""What a training step, or serving, costs with weight normalization, over the plain model's.

All arms of a model run in one process, in turn, so that whatever else the machine does falls on all of them: each
round runs every arm for the same number of steps, in a random order, and a ratio is taken within a round. The median
over rounds is reported.

On Linux, run it with the C library told to keep its memory: `MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0
MALLOC_TRIM_THRESHOLD_=17179869184`. It otherwise gives temporary buffers back to the system after each step, and the
page faults of getting them again cost more than what is measured here.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import rich.box
from rich.table import Table

import wn_jax as wn
from experiments.environment import environment
from experiments.errors import ConfigError
from experiments.tables import unknown
from experiments.timed_models import CASES, SERVING, Apply, Case

RATIOS = ("auto", "weight", "output", "flax", "equinox")
_REFERENCES = {"equinox": "plain equinox"}  # an arm is compared with the plain model of its own framework
_SECONDS_PER_TURN = 0.02  # of one arm in one round; much less, and the clock and the dispatch would be in it
_LEARNING_RATE = 1e-3

Step = Callable[[Any, jax.Array], tuple[Any, Any]]
"""From parameters and a batch to parameters and a result."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One model's figures. `milliseconds` holds, by arm, the time of a step in each round."""

    case: str
    target: float | None
    milliseconds: dict[str, list[float]]

    def plain(self) -> float:
        """The median time of a plain step."""
        return statistics.median(self.milliseconds["plain"])

    def ratio(self, arm: str) -> float | None:
        """The median over rounds of the arm's time over that of its plain model. None: it was not measured."""
        if arm not in self.milliseconds:
            return None
        reference = self.milliseconds[_REFERENCES.get(arm, "plain")]
        return statistics.median(a / b for a, b in zip(self.milliseconds[arm], reference, strict=True))


def choose(names: Iterable[str], serving: bool = False) -> list[Case]:
    """The cases of these names, or all: of training, or of serving one input at a time.

    Raises:
        ConfigError: there is no such case.
    """
    cases = SERVING if serving else CASES
    chosen = list(dict.fromkeys(names)) or list(cases)
    for name in chosen:
        if name not in cases:
            raise ConfigError(unknown("case", name, cases))
    return [cases[name] for name in chosen]


def measure(case: Case, rounds: int, on_round: Callable[[], None] = lambda: None) -> Row:
    """Time the case's arms side by side; `on_round` is called before each round."""
    x = jax.random.normal(jax.random.key(0), case.input_shape)
    build = _forward if case.serving else _step
    arms = {name: (build(apply), params) for name, (apply, params) in _arms(case, x).items()}
    # A step gives up its parameters to the next, and arms may share arrays: each gets its own.
    states = {name: jax.tree.map(jnp.array, params) for name, (_, params) in arms.items()}

    def turn(name: str, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            states[name], result = arms[name][0](states[name], x)
        jax.block_until_ready((states[name], result))
        return (time.perf_counter() - start) / steps

    for name in arms:
        turn(name, 2)  # compiles, and warms up
    steps = max(1, math.ceil(_SECONDS_PER_TURN / turn("plain", 1)))
    names, milliseconds = list(arms), {name: [0.0] * rounds for name in arms}
    shuffle = random.Random(0).shuffle  # whoever follows the same arm each time finds the same caches
    for round_ in range(rounds):
        on_round()
        shuffle(names)
        for name in names:
            milliseconds[name][round_] = 1e3 * turn(name, steps)
    return Row(case.name, case.target, milliseconds)


def table(rows: list[Row]) -> Table:
    """The table for the terminal."""
    rounds = len(rows[0].milliseconds["plain"])
    targets = any(row.target for row in rows)
    caption = f"time over that of the plain model: median over {rounds} rounds"
    caption += "; target: the most for auto" if targets else "; plain: with the folded weights"
    view = Table(caption=caption, box=rich.box.SIMPLE_HEAD, show_edge=False, collapse_padding=True)
    for column in ("model", "plain ms", "auto", *(["target"] if targets else []), *RATIOS[1:]):
        view.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for row in rows:
        auto, *others = ("-" if (ratio := row.ratio(arm)) is None else f"{ratio:.2f}" for arm in RATIOS)
        view.add_row(row.case, f"{row.plain():.2f}", auto, *([f"{row.target:.2f}"] if row.target else []), *others)
    return view


def machine() -> str:
    """Where this is measured, in one line."""
    facts = environment()
    return f"jax {facts['packages']['jax']}, {', '.join(facts['devices'])}, {facts['cpus']} CPU cores"


def write(rows: list[Row], path: Path) -> None:
    """Everything as JSON, and where it was measured.

    Raises:
        ConfigError: the file cannot be written.
    """
    cases = [
        {**dataclasses.asdict(row), "plain_ms": row.plain(), "ratios": {arm: row.ratio(arm) for arm in RATIOS}}
        for row in rows
    ]
    try:
        path.write_text(json.dumps({"environment": environment(), "cases": cases}, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error}; choose another with --json") from None


def _arms(case: Case, x: jax.Array) -> dict[str, tuple[Apply, Any]]:
    """A function and its parameters, by the arm's name."""
    model = case.build(lambda layer: layer)
    params = model.init(jax.random.key(1), x)
    nodes = wn.reparameterize(params, wn.infer_axes(model.apply)(params, x))
    arms: dict[str, tuple[Apply, Any]] = {"plain": (model.apply, params)}
    for scale in ("auto", "weight", "output"):
        arms[scale] = (wn.wrap(model.apply, scale=scale), nodes)
    if case.layers_wrap:
        peer = case.build(nn.WeightNorm)
        arms["flax"] = (peer.apply, peer.init(jax.random.key(1), x))
    if case.equinox and importlib.util.find_spec("equinox"):
        import equinox as eqx

        arms["plain equinox"] = case.equinox(lambda layer: layer)
        arms["equinox"] = case.equinox(eqx.nn.WeightNorm)
    return arms


def _step(apply: Apply) -> Step:
    """A training step: the mean square of the output, its gradient, and SGD in place."""

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(apply(params, x)))

    def step(params: Any, x: jax.Array) -> tuple[Any, Any]:
        return jax.tree.map(lambda p, grad: p - _LEARNING_RATE * grad, params, jax.grad(loss)(params, x)), None

    return jax.jit(step, donate_argnums=0)


def _forward(apply: Apply) -> Step:
    """The output, for parameters that stay as they are."""
    forward = jax.jit(apply)
    return lambda params, x: (params, forward(params, x))
