"""Strictness: telling of the weights that are rebuilt although their scale should go to the outputs, and why.

Where a scale goes, `reading` and `run` decide. This file finds out what kept it from the outputs, for a person to read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax

from wn_jax._program import jaxpr
from wn_jax._program.contractions import Contraction, contractions
from wn_jax._program.dead_code import live
from wn_jax._program.factored import Factored, Operand
from wn_jax._program.jaxpr import Body, Equation, Scan, Site
from wn_jax._program.moves import MOVES
from wn_jax._program.reading import ParameterLeaf, Reading
from wn_jax._program.run import Runner


def check_places(reading: Reading, always: bool) -> None:
    """Raises for proved weights whose scale should go to the outputs, but cannot: all, or those with smaller outputs.

    Raises:
        ValueError: there are some. All of them are named, with what keeps them.
    """
    nodes = [leaf for leaf in reading.leaves if leaf.node is not None and leaf.problem is None]
    kept = [leaf for leaf in nodes if not leaf.goes_to_output(always=True) and (always or _has_smaller_outputs(leaf))]
    _refuse({leaf.path: _what_keeps(leaf) for leaf in kept})


class Strict(Runner):
    """A run that notes each weight that it has to rebuild on its way, though its scale is to go to the outputs."""

    def __init__(self, reading: Reading) -> None:
        super().__init__(reading.masks)
        self.live = live(reading.program.body)
        self.branches: set[Site] = set()
        self.rebuilds: dict[str, str] = {}
        """By the path of a weight: where it is rebuilt, and why."""

    def check(self) -> None:
        """Raises ValueError where weights were rebuilt."""
        _refuse(self.rebuilds)

    def note(self, value: Operand, why: str) -> None:
        """Notes that a value is rebuilt, if it is a weight that should not be."""
        if isinstance(value, Factored) and not value.rebuilt:
            self.rebuilds.setdefault(value.path, why)

    def rebuilt(self, eqn: Equation, values: list[Operand], site: Site) -> Sequence[Operand]:
        if not self.live.is_dead(site):
            for value in self.live.taken(site, values, 0.0):
                self.note(value, f"{eqn.primitive} gets the weight: {_why_not(eqn)}")
        return super().rebuilt(eqn, values, site)

    def contract(
        self, eqn: Equation, values: list[Operand], factored: Factored, contraction: Contraction, site: Site
    ) -> jax.Array | None:
        result = super().contract(eqn, values, factored, contraction, site)
        if result is not None and not self.live.is_dead(site):
            self.note(values[1 - contraction.operand], f"{eqn.primitive} multiplies it with another weight")
        return result

    def scanned(self, scan: Scan, values: list[Operand], site: Site) -> list[Operand]:
        if not self.live.is_dead(site):
            _, carry, _ = scan.grouped(self.live.taken(site, values, 0.0))
            for value in carry:
                self.note(value, "a loop carries it, and a carry is an array; let the loop's body close over it")
        return super().scanned(scan, values, site)

    def switched(self, branches: list[Body], values: list[Operand], site: Site) -> list[Operand]:
        self.branches |= {(*site, i) for i in range(len(branches))}
        return super().switched(branches, values, site)

    def run(self, body: Body, values: Sequence[Operand], site: Site = ()) -> list[Operand]:
        results = super().run(body, values, site)
        if site in self.branches and site in self.live.results:
            for value in self.live.given(site, results, 0.0):
                self.note(value, "a cond or switch returns it, and gives arrays; contract it inside")
        return results


def _has_smaller_outputs(leaf: ParameterLeaf) -> bool:
    """Whether the outputs hold fewer numbers than the weight. How often a `while_loop` runs is not known: once."""
    outputs = sum(math.prod(use.output) if use.around.trips == math.inf else use.output_size for use in leaf.uses)
    return outputs < leaf.aval.size


def _what_keeps(leaf: ParameterLeaf) -> str:
    """The cause for which the scale of a proved weight cannot go to the outputs, with its remedy."""
    if leaf.returned:
        return "the function returns it, too; return it from another function"
    for use in leaf.uses:
        if use.around.custom_rule:
            return f"{use.how} in a function with a derivative rule of its own; move the matmul out of that function"
        if use.around.trips == math.inf:
            return f"{use.how} in a while_loop; use scan, or fori_loop with a number of trips that is known"
        if use.contraction.group is not None:
            return f"{use.how}, whose rows take the matrices of their groups in turn; there is no other way yet"
        if leaf.reduced is not None and not use.reduction <= leaf.reduced:
            return (
                f"{use.how} sums over {leaf.axes(use.reduction)}, where its norm does not run; reparameterize it "
                "with the axes of wn_jax.infer_axes"
            )
    dtypes = sorted({str(leaf.aval.dtype), *(str(use.dtype) for use in leaf.uses)})
    return f"{leaf.uses[0].how} in {' and '.join(dtypes)}, too narrow for v in place of the weight; use a wider dtype"


def _why_not(eqn: Equation) -> str:
    """Why an equation that gets a `Factored` gives no result without its weight."""
    row = MOVES.get(eqn.primitive)
    if row is not None:
        return row.why_not or "the scale cannot be moved along here, as it mixes axes or rounds a second time"
    if any(True for _ in contractions(eqn)):
        if eqn.params.get("out_sharding") is not None:
            return "it asks for a sharding of its output; constrain the output after it instead"
        return "the scale varies along what is summed over, or the dtype is too narrow"
    if jaxpr.has_body(eqn):
        return "it is a call with options of its own, which is not entered; call the function without them"
    return "no rule takes the scale through it"


def _refuse(rebuilds: dict[str, str]) -> None:
    """Raises where there are weights that are rebuilt."""
    if rebuilds:
        lines = "".join(f"\n  {path}: {why}" for path, why in rebuilds.items())
        raise ValueError(
            f"wrap(strict=True): the scale of these weights should go to the outputs, but they are rebuilt:{lines}\n"
            "Change that, or wrap without strict=True"
        )
