"""Dead code: what `jit` drops from a program, as nobody takes its result.

Liveness, from the outputs backwards: an equation lives where one of its results is taken, or where it has effects. This
file says what lives; `walk` leaves out the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeVar

from wn_jax._program import jaxpr
from wn_jax._program.jaxpr import Body, Equation, Scan, Site, While

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Live:
    """The parts of a program that have a bearing on its outputs."""

    operands: Mapping[Site, frozenset[int] | None]
    """By the site of an equation that lives: the operands that it takes, as loops and calls leave some; `None`: all."""
    results: Mapping[Site, frozenset[int]]
    """By the site of a body that runs: the results that are taken."""

    def is_dead(self, site: Site) -> bool:
        """Whether an equation is dropped."""
        return site not in self.operands

    def taken(self, site: Site, operands: list[Value], nothing: Value) -> list[Value]:
        """The operands of an equation that lives, `nothing` in the place of those that it does not take."""
        taken = self.operands[site]
        return operands if taken is None else _only(taken, operands, nothing)

    def given(self, site: Site, results: list[Value], nothing: Value) -> list[Value]:
        """The results of a body, `nothing` in the place of those that nobody takes."""
        return _only(self.results[site], results, nothing)


def live(body: Body) -> Live:
    """The parts of a program that live, where all its outputs are taken."""
    search = _Search()
    search.body(body, (), frozenset(range(len(body.outputs))))
    return Live(search.operands, search.results)


class _Search:
    """The search for what lives. What is found only grows, so that a body is read anew only for further results."""

    def __init__(self) -> None:
        self.operands: dict[Site, frozenset[int] | None] = {}
        self.results: dict[Site, frozenset[int]] = {}
        self.inputs: dict[Site, frozenset[int]] = {}
        """By the site of a body: the inputs that it takes."""

    def body(self, body: Body, site: Site, taken: frozenset[int]) -> frozenset[int]:
        """The inputs that a body takes, where these of its results are taken."""
        before = self.results.get(site)
        if before is None or not taken <= before:
            self.results[site] = taken = taken | (before or frozenset())
            self.inputs[site] = jaxpr.backwards(body, taken, self.equation, site)
        return self.inputs[site]

    def equation(self, eqn: Equation, results: Sequence[int], site: Site) -> frozenset[int] | None:
        """The operands that an equation takes, where these of its results are taken."""
        self.operands[site] = operands = self.inside(eqn, frozenset(results), site) if jaxpr.has_body(eqn) else None
        return operands

    def inside(self, eqn: Equation, taken: frozenset[int], site: Site) -> frozenset[int] | None:
        """Of one with bodies: what these take."""
        if (body := jaxpr.call(eqn)) is not None:
            return self.body(body, site, taken)
        if (branches := jaxpr.branches(eqn)) is not None:
            inputs = [self.body(branch, (*site, i), taken) for i, branch in enumerate(branches)]
            return frozenset([0, *(1 + i for i in frozenset().union(*inputs))])
        if (scan := jaxpr.scan(eqn)) is not None:
            return self.scan(scan, taken, site)
        loop = jaxpr.while_loop(eqn)
        return None if loop is None else self.while_loop(loop, taken, site)

    def scan(self, scan: Scan, taken: frozenset[int], site: Site) -> frozenset[int]:
        """The operands that a `scan` takes."""
        first = scan.num_consts
        taken, inputs = self.settle(scan.body, site, taken, range(first, first + scan.num_carry))
        return inputs | {first + i for i in taken if i < scan.num_carry}

    def while_loop(self, loop: While, taken: frozenset[int], site: Site) -> frozenset[int]:
        """The operands that a `while_loop` takes. Its condition decides how often it runs, and so is always taken."""
        asked = self.body(loop.condition, (*site, 0), frozenset([0]))
        taken |= {i - loop.condition_consts for i in asked if i >= loop.condition_consts}
        carries = range(loop.body_consts, len(loop.body.inputs))
        taken, inputs = self.settle(loop.body, (*site, 1), taken, carries)
        condition = {i for i in asked if i < loop.condition_consts}
        consts = {loop.condition_consts + i for i in inputs if i < loop.body_consts}
        return frozenset(condition | consts | {loop.condition_consts + loop.body_consts + i for i in taken})

    def settle(
        self, body: Body, site: Site, taken: frozenset[int], carries: range
    ) -> tuple[frozenset[int], frozenset[int]]:
        """The results and inputs of a loop's body that are taken, after as many trips as it takes to find all.

        What a trip takes of a carry, the trip before has to give.
        """
        while True:
            inputs = self.body(body, site, taken)
            grown = taken | {carries.index(i) for i in inputs if i in carries}
            if grown == taken:
                return taken, inputs
            taken = grown


def _only(which: frozenset[int], values: Sequence[Value], nothing: Value) -> list[Value]:
    return [value if i in which else nothing for i, value in enumerate(values)]
