"""The walk: follows each parameter through a program, and notes every place where it is used.

Each variable carries the views of parameters that it is, and whether data flows into it. Without the latter a LayerNorm
gain would ride an activation into the next matmul and look contracted. This file notes; `_uses` draws the conclusions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import Any

from wn_jax._program import jaxpr as program
from wn_jax._program.jaxpr import Body, Equation, Site, primitive
from wn_jax._program.notes import Around, Bias, Notes, Problem, Reason, Use
from wn_jax._program.views import MOVES, Contraction, View, contractions, is_scaling, move


@dataclasses.dataclass(frozen=True)
class Value:
    """What the walk knows of a variable."""

    data: bool = False
    views: tuple[View, ...] = ()
    output: View | None = None
    """The output of a contraction, whose site is the view's source."""


def walk(body: Body, parameters: Sequence[Hashable | None], data_in_consts: bool) -> Notes:
    """Follows the inputs of a program to which `parameters` gives a name; data flows in by the others.

    `data_in_consts`: whether arrays that the program closes over count as data, too.
    """
    notes = Notes()
    inputs = [
        Value(data=True) if name is None else Value(views=(View.of(name, aval.shape),))
        for name, aval in zip(parameters, body.inputs, strict=True)
    ]
    for value in _Walk(notes, data_in_consts).run(body, inputs, (), Around()):
        for view in value.views:
            whole = not view.partial and all(len(dim) == 1 and dim[0][0] == i for i, dim in enumerate(view.dims))
            if whole:
                notes.returned.add(view.source)
            else:
                notes.uses.setdefault(view.source, []).append(Problem(Reason.RETURNED, "return"))
    return notes


class _Walk:
    """One walk: the rules by kind of equation."""

    def __init__(self, notes: Notes, data_in_consts: bool):
        self.notes = notes
        self.const = Value(data=data_in_consts)

    def run(self, body: Body, values: Sequence[Value], site: Site, around: Around) -> list[Value]:
        return program.interpret(
            body,
            values,
            lambda eqn, operands, site: self.step(eqn, operands, site, around),
            site,
            literal=lambda _: Value(),
            const=lambda _: self.const,
        )

    def step(self, eqn: Equation, values: list[Value], site: Site, around: Around) -> list[Value]:
        if (body := program.call(eqn)) is not None:
            custom = around.custom_rule or program.is_custom_rule(eqn)
            return self.run(body, values, site, dataclasses.replace(around, custom_rule=custom))
        if (scan := program.scan(eqn)) is not None:
            return self.scan(scan, values, site, around)
        if (loop := program.while_loop(eqn)) is not None:
            return self.while_loop(loop, values, site, around)
        if (branches := program.branches(eqn)) is not None:
            return self.cond(branches, values, site, around)
        return [self.output(eqn, values, site, around)] * len(eqn.outvars)

    def output(self, eqn: Equation, values: list[Value], site: Site, around: Around) -> Value:
        """What an equation without a body gives."""
        data = any(value.data for value in values)
        for contraction in contractions(eqn):
            if values[contraction.operand].views and values[1 - contraction.operand].data:
                self.contract(eqn, values, contraction, site, around)
                return Value(data=True, output=View.of(site, program.outputs(eqn)[0].shape))
        views = self.moved(eqn, values, data)
        self.bias(eqn, values, site)
        output = move(eqn, values[0].output, 0) if len(values) == 1 and values[0].output else None
        return Value(data, views, output)

    def contract(
        self, eqn: Equation, values: list[Value], contraction: Contraction, site: Site, around: Around
    ) -> None:
        out = program.outputs(eqn)[0]
        for view in values[contraction.operand].views:
            self.note(view, Use(site, str(eqn.primitive), view, contraction, out.shape, out.dtype, around))

    def moved(self, eqn: Equation, values: list[Value], data: bool) -> tuple[View, ...]:
        """The views of an equation's result. A view that ends here is noted as a problem."""
        kept: list[View] = []
        for i, value in enumerate(values):
            for view in value.views:
                if is_scaling(eqn, i) and not values[1 - i].data and not _is_scalar_of_two(eqn, values):
                    result: View | None = dataclasses.replace(view, scaled=True)
                else:
                    result = None if data else move(eqn, view, i)
                if result is None:
                    self.note(view, Problem(_reason(eqn, values, i), str(eqn.primitive)))
                else:
                    kept.append(result)
        return tuple(kept)

    def bias(self, eqn: Equation, values: list[Value], site: Site) -> None:
        """Notes a parameter that is added to the output of a contraction."""
        if eqn.primitive is not primitive.add_p:
            return
        for operand in (0, 1):
            output, views = values[1 - operand].output, values[operand].views
            if output and len(views) == 1 and len(views[0].dims) == len(output.dims):
                bias = Bias(site, operand, views[0], output)
                self.notes.biases.setdefault(output.source, bias)  # type: ignore[arg-type]

    def note(self, view: View, what: Use | Problem) -> None:
        self.notes.uses.setdefault(view.source, []).append(what)

    def stop(self, value: Value, reason: Reason, by: str) -> Value:
        """The value without its views, which end here."""
        for view in value.views:
            self.note(view, Problem(reason, by))
        return Value(value.data)

    def scan(self, scan: program.Scan, values: list[Value], site: Site, around: Around) -> list[Value]:
        consts, carry, xs = scan.split([Value(value.data, value.views) for value in values])
        slices = [dataclasses.replace(value, views=tuple(view.sliced(site) for view in value.views)) for value in xs]
        inside = dataclasses.replace(around, trips=around.trips * scan.length, loops=around.loops + 1)
        carry = self.settle(
            carry, scan.invariant(), lambda walk, carry: walk.run(scan.body, [*consts, *carry, *slices], site, inside)
        )
        results = self.run(scan.body, [*consts, *carry, *slices], site, inside)
        ys = [
            Value(value.data, tuple(view.stacked(site, scan.length) for view in value.views))
            for value in results[scan.num_carry :]
        ]
        return [*self.handed_on(carry, scan.invariant(), results), *ys]

    def while_loop(self, loop: program.While, values: list[Value], site: Site, around: Around) -> list[Value]:
        inside = dataclasses.replace(around, trips=math.inf, loops=around.loops + 1)
        first, second = loop.condition_consts, loop.condition_consts + loop.body_consts
        values = [Value(value.data, value.views) for value in values]
        condition_consts, consts, carry = values[:first], values[first:second], values[second:]
        carry = self.settle(
            carry, loop.invariant(), lambda walk, carry: walk.run(loop.body, [*consts, *carry], (*site, 1), inside)
        )
        self.run(loop.condition, [*condition_consts, *carry], (*site, 0), inside)
        results = self.run(loop.body, [*consts, *carry], (*site, 1), inside)
        return self.handed_on(carry, loop.invariant(), results)

    def settle(self, carry: list[Value], invariant: list[bool], trip: Any) -> list[Value]:
        """The carries of a loop, after as many trips as it takes until no more of them hold data."""
        carry = [
            value if same else self.stop(value, Reason.CARRIED, "loop")
            for value, same in zip(carry, invariant, strict=True)
        ]
        while True:
            after = trip(_Walk(Notes(), self.const.data), carry)
            grown = [
                dataclasses.replace(value, data=value.data or out.data)
                for value, out in zip(carry, after, strict=False)
            ]
            if grown == carry:
                return carry
            carry = grown

    def handed_on(self, carry: list[Value], invariant: list[bool], results: list[Value]) -> list[Value]:
        """The carries after a loop: those that it does not change keep their views."""
        return [
            before if same else self.stop(after, Reason.CARRIED, "loop")
            for before, after, same in zip(carry, results, invariant, strict=False)
        ]

    def cond(self, branches: list[Body], values: list[Value], site: Site, around: Around) -> list[Value]:
        index, *operands = [Value(value.data, value.views) for value in values]
        inside = dataclasses.replace(around, branch=True)
        results = [self.run(branch, operands, (*site, i), inside) for i, branch in enumerate(branches)]
        return [self.join(index, values) for values in zip(*results, strict=True)]

    def join(self, index: Value, values: Sequence[Value]) -> Value:
        """A result of a cond, of what its branches give."""
        data = index.data or any(value.data for value in values)
        if not data and all(value.views == values[0].views for value in values):
            return Value(data, values[0].views)
        for value in values:
            self.stop(value, Reason.BRANCH, "cond")
        return Value(data)


def _is_scalar_of_two(eqn: Equation, values: list[Value]) -> bool:
    """Whether each of two parameters could be said to scale the other."""
    return all(value.views for value in values) and math.prod(program.outputs(eqn)[0].shape) == 1


def _reason(eqn: Equation, values: list[Value], operand: int) -> Reason:
    """Why a view ends in this equation. For people; nothing is decided by it."""
    output = program.outputs(eqn)[0]
    if eqn.primitive in (primitive.gather_p, primitive.dynamic_slice_p):
        return Reason.INDEXED if operand == 0 else Reason.OPAQUE
    if eqn.primitive in (primitive.dot_general_p, primitive.conv_general_dilated_p):
        same = {view.source for view in values[0].views} & {view.source for view in values[1].views}
        if any(value.data for value in values):
            return Reason.OPAQUE
        return Reason.PENALTY if same and output.size == 1 else Reason.NO_DATA
    squares = eqn.primitive in (primitive.square_p, primitive.integer_pow_p)
    if squares or (len(eqn.invars) == 2 and eqn.invars[0] is eqn.invars[1]):
        return Reason.PENALTY
    if eqn.primitive in _REDUCTIONS:
        return Reason.PENALTY
    if eqn.primitive in MOVES and eqn.primitive is not primitive.concatenate_p:
        return Reason.RESHAPED
    return Reason.ELEMENTWISE if eqn.primitive in _ELEMENTWISE else Reason.OPAQUE


_REDUCTIONS = frozenset({primitive.reduce_sum_p, primitive.reduce_max_p, primitive.reduce_min_p})
_ELEMENTWISE = frozenset(
    getattr(primitive, f"{name}_p")
    for name in (
        *("abs", "add", "clamp", "cos", "div", "exp", "exp2", "expm1", "log", "log1p", "logistic", "max", "min", "mul"),
        *("pow", "rem", "round", "rsqrt", "select_n", "sign", "sin", "sqrt", "sub", "tanh"),
    )
)
