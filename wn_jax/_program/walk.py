"""The walk: follows each parameter through a program, and notes every place where it is used.

Each variable carries the views of parameters that it is, and whether data flows into it. Without the latter a LayerNorm
gain would ride an activation into the next matmul and look contracted. This file notes; `reading` and `_uses` draw the
conclusions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence

from wn_jax._program import jaxpr
from wn_jax._program.jaxpr import Body, Equation, Scan, Site, While, primitive
from wn_jax._program.moves import MOVES, is_scaling, move
from wn_jax._program.notes import Around, Bias, Notes, Problem, Reason, Use
from wn_jax._program.views import Contraction, View, contractions


@dataclasses.dataclass(frozen=True)
class Value:
    """All that the walk knows of a variable."""

    data: bool = False
    """Whether data flows into it."""
    views: tuple[View, ...] = ()
    """The views of parameters that it is; several where parameters were concatenated."""
    output: View | None = None
    """The output of a contraction that it is a view of. The site of the contraction is the view's source."""

    def without_output(self) -> Value:
        """The same, for a loop or a branch: what is added in there is no bias of a contraction outside."""
        return Value(self.data, self.views)


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
                # To hand a parameter on as it is says nothing against it: it may be contracted besides.
                notes.returned.add(view.source)
            else:
                notes.uses.setdefault(view.source, []).append(Problem(Reason.RETURNED, "return"))
    return notes


class _Walk:
    """One walk: a rule for each kind of equation. Each gives the values of the results, and notes uses on its way."""

    def __init__(self, notes: Notes, data_in_consts: bool) -> None:
        self.notes = notes
        self.const = Value(data=data_in_consts)

    def run(self, body: Body, values: Sequence[Value], site: Site, around: Around) -> list[Value]:
        """The results of a program, or of a body within it."""
        return jaxpr.interpret(
            body,
            values,
            lambda eqn, operands, site: self.step(eqn, operands, site, around),
            site,
            literal=lambda _: Value(),
            const=lambda _: self.const,
        )

    def step(self, eqn: Equation, values: list[Value], site: Site, around: Around) -> list[Value]:
        """The results of one equation: those of its bodies, if it has any that are understood."""
        if (body := jaxpr.call(eqn)) is not None:
            # Contractions in such a body are seen all the same: they tell the axes, if not where a scale may go.
            custom = around.custom_rule or jaxpr.is_custom_rule(eqn)
            return self.run(body, values, site, dataclasses.replace(around, custom_rule=custom))
        if (scan := jaxpr.scan(eqn)) is not None:
            return self.scan(scan, values, site, around)
        if (loop := jaxpr.while_loop(eqn)) is not None:
            return self.while_loop(loop, values, site, around)
        if (branches := jaxpr.branches(eqn)) is not None:
            return self.cond(branches, values, site, around)
        return [self.result(eqn, values, site, around)] * len(eqn.outvars)

    def result(self, eqn: Equation, values: list[Value], site: Site, around: Around) -> Value:
        """The result of an equation without a body. Each of several results is taken for the same."""
        for contraction in contractions(eqn):
            if values[contraction.operand].views and values[1 - contraction.operand].data:
                self.contract(eqn, values, contraction, site, around)
                return Value(data=True, output=View.of(site, jaxpr.outputs(eqn)[0].shape))
        data = any(value.data for value in values)
        views = self.moved(eqn, values, data)
        self.bias(eqn, values, site)
        # An output is followed through reshapes and the like, to where its bias is added.
        output = move(eqn, values[0].output, 0) if len(values) == 1 and values[0].output else None
        return Value(data, views, output)

    def contract(
        self, eqn: Equation, values: list[Value], contraction: Contraction, site: Site, around: Around
    ) -> None:
        """Notes a contraction of parameters with data."""
        out, dtype = jaxpr.outputs(eqn)[0], jaxpr.dtypes(eqn)[contraction.operand]
        for view in values[contraction.operand].views:
            self.note(view, Use(site, str(eqn.primitive), view, contraction, out.shape, out.dtype, dtype, around))

    def moved(self, eqn: Equation, values: list[Value], data: bool) -> tuple[View, ...]:
        """The views of an equation's result. A view that ends here is noted as a problem."""
        kept: list[View] = []
        for i, value in enumerate(values):
            for view in value.views:
                if is_scaling(eqn, i) and not values[1 - i].data and not _is_scalar_of_two(eqn, values):
                    result: View | None = dataclasses.replace(view, scaled=True)
                else:
                    # With data among the operands the result is data, however it came about: an index that data
                    # chooses, or an array that a parameter is concatenated with.
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
                # The first addition counts.
                self.notes.biases.setdefault(output.source, Bias(site, operand, views[0], output))

    def note(self, view: View, use: Use | Problem) -> None:
        """Notes a use of the parameter that this is a view of."""
        self.notes.uses.setdefault(view.source, []).append(use)

    def stop(self, value: Value, reason: Reason, by: str) -> Value:
        """The value without its views, which end here."""
        for view in value.views:
            self.note(view, Problem(reason, by))
        return Value(value.data)

    def scan(self, scan: Scan, values: list[Value], site: Site, around: Around) -> list[Value]:
        """The results of a `scan`. One walk through its body stands for all trips, as each does the same."""
        consts, carry, xs = scan.grouped([value.without_output() for value in values])
        slices = [dataclasses.replace(value, views=tuple(view.sliced(site) for view in value.views)) for value in xs]
        inside = dataclasses.replace(around, trips=around.trips * scan.length, loops=around.loops + 1)

        def trip(walk: _Walk, carry: list[Value]) -> list[Value]:
            return walk.run(scan.body, [*consts, *carry, *slices], site, inside)

        carry = self.settle(carry, scan.invariant(), trip)
        results = trip(self, carry)
        ys = [
            Value(value.data, tuple(view.stacked(site, scan.length) for view in value.views))
            for value in results[scan.num_carry :]
        ]
        return [*self.handed_on(carry, scan.invariant(), results[: scan.num_carry]), *ys]

    def while_loop(self, loop: While, values: list[Value], site: Site, around: Around) -> list[Value]:
        """The results of a `while_loop`. How often it runs is not known: as often as can be."""
        condition_consts, consts, carry = loop.grouped([value.without_output() for value in values])
        inside = dataclasses.replace(around, trips=math.inf, loops=around.loops + 1)

        def trip(walk: _Walk, carry: list[Value]) -> list[Value]:
            return walk.run(loop.body, [*consts, *carry], (*site, 1), inside)

        carry = self.settle(carry, loop.invariant(), trip)
        self.run(loop.condition, [*condition_consts, *carry], (*site, 0), inside)
        return self.handed_on(carry, loop.invariant(), trip(self, carry))

    def settle(
        self, carry: list[Value], invariant: list[bool], trip: Callable[[_Walk, list[Value]], list[Value]]
    ) -> list[Value]:
        """The carries of a loop, after as many trips as it takes until no more of them hold data.

        Data may come into a carry in the first trip, and from there into another in the second. The trips are those of
        walks whose notes nobody reads, so that each use is noted once. Each adds a carry, or is the last.
        """
        carry = [
            value if same else self.stop(value, Reason.CARRIED, "loop")
            for value, same in zip(carry, invariant, strict=True)
        ]
        while True:
            after = trip(_Walk(Notes(), self.const.data), carry)[: len(carry)]
            grown = [
                dataclasses.replace(value, data=value.data or out.data) for value, out in zip(carry, after, strict=True)
            ]
            if grown == carry:
                return carry
            carry = grown

    def handed_on(self, carry: list[Value], invariant: list[bool], results: list[Value]) -> list[Value]:
        """The carries after a loop: those that it does not change keep their views."""
        return [
            before if same else self.stop(after, Reason.CARRIED, "loop")
            for before, after, same in zip(carry, results, invariant, strict=True)
        ]

    def cond(self, branches: list[Body], values: list[Value], site: Site, around: Around) -> list[Value]:
        """The results of a `cond` or `switch`. All branches are walked through, as any may run."""
        index, *operands = [value.without_output() for value in values]
        inside = dataclasses.replace(around, branch=True)
        results = [self.run(branch, operands, (*site, i), inside) for i, branch in enumerate(branches)]
        return [self.join(index, values) for values in zip(*results, strict=True)]

    def join(self, index: Value, values: Sequence[Value]) -> Value:
        """One result of a `cond`, from what its branches give."""
        # Where data chooses among branches, the result is data, even of parameters alone.
        data = index.data or any(value.data for value in values)
        if not data and all(value.views == values[0].views for value in values):
            return Value(data, values[0].views)
        for value in values:
            self.stop(value, Reason.BRANCH, "cond")
        return Value(data)


def _is_scalar_of_two(eqn: Equation, values: list[Value]) -> bool:
    """Whether each of two parameters could be said to scale the other. Then neither is said to."""
    return all(value.views for value in values) and math.prod(jaxpr.outputs(eqn)[0].shape) == 1


def _reason(eqn: Equation, values: list[Value], operand: int) -> Reason:
    """Why a view ends in this equation. For people; nothing is decided by it."""
    output = jaxpr.outputs(eqn)[0]
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
