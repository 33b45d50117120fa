"""The walk: follows each parameter through a program, and notes every place where it is used.

Each variable carries the views of parameters that it is, and whether data flows into it. Without the latter a LayerNorm
gain would ride an activation into the next matmul and look contracted. This file notes; `reading` and `_uses` draw the
conclusions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Hashable, Sequence

import jax.numpy as jnp

from wn_jax._program import facts, jaxpr, repeats
from wn_jax._program.contractions import Contraction, contractions
from wn_jax._program.dead_code import Live, live
from wn_jax._program.facts import Counter
from wn_jax._program.jaxpr import Body, Equation, Scan, Site, While, primitive
from wn_jax._program.moves import MOVES, move
from wn_jax._program.notes import Around, Bias, Met, Notes, Problem, Reason, Use
from wn_jax._program.products import is_scaling, mask_operands
from wn_jax._program.values import Value
from wn_jax._program.views import Place, View


def walk(
    body: Body, parameters: Sequence[Hashable | None], frozen: Collection[Hashable], data_in_consts: bool
) -> Notes:
    """Follows the inputs of a program to which `parameters` gives a name; data flows in by the others.

    Arguments:
        body: the program.
        parameters: a name for each input, or `None` for data.
        frozen: those of the names that are not trained.
        data_in_consts: whether arrays that the program closes over count as data, too.
    """
    notes = Notes()
    inputs = [
        Value(data=True) if name is None else Value.of_parameter(name, aval, name not in frozen)
        for name, aval in zip(parameters, body.inputs, strict=True)
    ]
    walk = _Walk(notes, data_in_consts, live(body))
    for value in walk.run(body, inputs, (), Around()):
        for view in value.views:
            if view.is_whole:
                # To hand a parameter on as it is says nothing against it: it may be contracted besides.
                notes.returned.add(view.source)
            else:
                walk.note(view, Problem(Reason.RETURNED, "return"))
        walk.doubt(value)
    return notes


class _Walk:
    """One walk: a rule for each kind of equation. Each gives the values of the results, and notes uses on its way."""

    def __init__(self, notes: Notes, data_in_consts: bool, live: Live) -> None:
        self.notes = notes
        self.live = live
        self.data_in_consts = data_in_consts

    def run(self, body: Body, values: Sequence[Value], site: Site, around: Around) -> list[Value]:
        """The results of a program, or of a body within it."""
        results = jaxpr.interpret(
            body,
            values,
            lambda eqn, operands, site: self.step(eqn, operands, site, around),
            site,
            literal=lambda number: Value(fact=facts.of_number(number)),
            const=lambda array: Value(closed_over=True, fact=facts.of_array(array)),
        )
        return self.live.given(site, results, Value())

    def step(self, eqn: Equation, values: list[Value], site: Site, around: Around) -> list[Value]:
        """The results of one equation: those of its bodies, if it has any that are understood."""
        if self.live.is_dead(site):
            return [Value()] * len(eqn.outvars)
        values = self.live.taken(site, values, Value())
        if jaxpr.is_backward(eqn):
            around = dataclasses.replace(around, backward=True)
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
        return self.results(eqn, values, site, around)

    def results(self, eqn: Equation, values: list[Value], site: Site, around: Around) -> list[Value]:
        """The results of an equation without a body."""
        sides = list(contractions(eqn))
        if sides and _are_of_different_sources(values[:2]):
            return [self.contracted(eqn, values, sides, site, around)]
        if eqn.primitive is primitive.select_n_p and (same := _one_of_the_same(values[1:])):
            return [same]
        if any(value.data for value in values) and eqn.primitive not in _SUMS:
            self.doubt(*values)
        common = Value.joined(values, facts.of_result(eqn, [value.fact for value in values]))
        common = dataclasses.replace(common, repeats=repeats.of_result(eqn, [value.repeats for value in values]))
        views, outputs = self.views(eqn, values, site, common.data), self.outputs(eqn, values)
        self.bias(eqn, values, site)
        return [dataclasses.replace(common, views=views[i], outputs=outputs[i]) for i in range(len(eqn.outvars))]

    def is_data(self, value: Value) -> bool:
        """Whether data flows into a value."""
        return value.data or (value.closed_over and self.data_in_consts and not value.views)

    def contracted(
        self, eqn: Equation, values: list[Value], sides: list[Contraction], site: Site, around: Around
    ) -> Value:
        """The output of a contraction. Those of parameters are noted."""
        out, how = jaxpr.outputs(eqn)[0], str(eqn.primitive)
        data, pending = any(map(self.is_data, values)), frozenset[tuple[Hashable, Use]]()
        for side in sides:
            met = self.met(values, sides, side)
            for view in values[side.operand].views:
                dtype = jaxpr.dtypes(eqn)[side.operand]
                use = Use(site, how, view, side, out.shape, out.dtype, dtype, around, met)
                self.note(view, use)
                pending |= {(view.source, use)}
        for operand in {0, 1} - {side.operand for side in sides}:
            self.stop(values[operand], Reason.OPAQUE, how)
        result = Value.joined(values, None)
        if not data:
            pending |= result.pending
            again = repeats.of_result(eqn, [value.repeats for value in values])
            return dataclasses.replace(result, outputs=(View.of(site, out.shape),), pending=pending, repeats=again)
        batches = {side.operand: side.batch for side in sides}
        for operand, value in enumerate(values):
            if not self.is_data(value):
                self.give_up(value, not value.repeats.isdisjoint(batches.get(operand, ())))
        return Value(data=True, outputs=(View.of(site, out.shape),))

    def met(self, values: list[Value], sides: list[Contraction], side: Contraction) -> Met:
        """The kind of operand that this side's parameters are contracted with."""
        own, other = values[side.operand], values[1 - side.operand]
        if self.is_data(other):
            return Met.DATA
        if not other.views or not other.trains:
            return Met.CLOSED_OVER if other.closed_over else Met.CONSTANT
        kept = [dim for against in sides if against.operand != side.operand for dim, _ in against.kept]
        is_repeated = all(view.broadcasts(kept) for view in other.views)
        own_is_repeated = any(view.broadcasts(range(len(view.dims))) for view in own.views)
        return Met.REPEATED if is_repeated and not own_is_repeated else Met.PARAMETER

    def give_up(self, value: Value, is_repeated: bool = False) -> None:
        """Notes that the products without data of which this is made serve as weights: they tell nothing of axes.

        `is_repeated`: whether each sample of the data meets the same numbers, as those of a learned query that is
        repeated over a batch. They serve as data then.
        """
        for source, use in value.pending:
            if not (is_repeated and use.tells):
                self.replace(source, use, Problem(use.why_not, use.how))

    def doubt(self, *values: Value) -> None:
        """Notes that products without data, of which these are made, meet data in a way that tells nothing of axes."""
        for source, use in {pair for value in values for pair in value.pending}:
            if use.tells:
                self.replace(source, use, dataclasses.replace(use, met=Met.ELSEWHERE))

    def replace(self, source: Hashable, use: Use, by: Use | Problem) -> None:
        """Takes back a note of a use, which may be in doubt by now."""
        notes = self.notes.uses.get(source, [])
        self.notes.uses[source] = [by if isinstance(note, Use) and note.is_at(use) else note for note in notes]

    def views(self, eqn: Equation, values: list[Value], site: Site, data: bool) -> list[tuple[View, ...]]:
        """The views of each of an equation's results. A view that ends here is noted as a problem."""
        kept: list[list[View]] = [[] for _ in eqn.outvars]
        for i, value in enumerate(values):
            for view in value.views:
                # With data among the operands the result is data, however it came about: an index that data chooses,
                # or an array that a parameter is concatenated with.
                results = [None] if data else self.passed(eqn, values, site, view, i)
                if None in results:
                    self.note(view, Problem(_reason(eqn, i), str(eqn.primitive)))
                    continue
                for into, result in zip(kept, results, strict=True):
                    if result is not None and not result.is_empty:
                        into.append(result)
        return [tuple(views) for views in kept]

    def passed(self, eqn: Equation, values: list[Value], site: Site, view: View, operand: int) -> list[View | None]:
        """The view of an operand in each of the results, or `None` in one where it ends."""
        if is_scaling(eqn, operand) and not _is_scalar_of_two(eqn, values):
            return [dataclasses.replace(view, scaled=True)]
        if _is_masked(eqn, values, operand) and not view.broadcasts(range(len(view.dims))):
            self.notes.masks.add(site)
            return [dataclasses.replace(view, masked=True)]
        known = [value.fact for value in values]
        return [move(eqn, view, Place(operand, output, known)) for output in range(len(eqn.outvars))]

    def outputs(self, eqn: Equation, values: list[Value]) -> list[tuple[View, ...]]:
        """The outputs of contractions, followed through reshapes and the like to where their biases are added."""
        followed: list[list[View]] = [[] for _ in eqn.outvars]
        for i, value in enumerate(values):
            scaling = is_scaling(eqn, i) or _is_masked(eqn, values, i)
            for output in value.outputs:
                for j, into in enumerate(followed):
                    result = dataclasses.replace(output, scaled=True) if scaling else move(eqn, output, Place(i, j))
                    if result is not None and not result.is_empty:
                        into.append(result)
        return [tuple(outputs) for outputs in followed]

    def bias(self, eqn: Equation, values: list[Value], site: Site) -> None:
        """Notes a parameter that is added to the output of a contraction, or one that is subtracted from the other."""
        subtracted = eqn.primitive is primitive.sub_p
        if eqn.primitive is not primitive.add_p and not subtracted:
            return
        for operand in (0, 1):
            for view in values[operand].views:
                for output in values[1 - operand].outputs:
                    found = self.notes.biases.setdefault(output.source, [])
                    found.append(Bias(site, operand, subtracted, view, output))

    def note(self, view: View, use: Use | Problem) -> None:
        """Notes a use of the parameter that this is a view of."""
        self.notes.uses.setdefault(view.source, []).append(use)

    def stop(self, value: Value, reason: Reason, by: str) -> Value:
        """The value without its views, which end here."""
        for view in value.views:
            self.note(view, Problem(reason, by))
        return dataclasses.replace(value, views=(), outputs=())

    def scan(self, scan: Scan, values: list[Value], site: Site, around: Around) -> list[Value]:
        """The results of a `scan`. One walk through its body stands for all trips, as each does the same."""
        consts, carry, xs = scan.grouped([value.without_outputs() for value in values])
        slices = [value.sliced(site, scan.length) for value in xs]
        inside = dataclasses.replace(around, trips=around.trips * scan.length, loops=(*around.loops, site))

        def trip(walk: _Walk, carry: list[Value]) -> list[Value]:
            return walk.run(scan.body, [*consts, *carry, *slices], site, inside)

        counter = None if scan.reverse else Counter(site, scan.length)
        carry = self.settle(carry, scan.invariant(), trip, counter)
        results = trip(self, carry)
        ys = [value.stacked(site, scan.length) for value in results[scan.num_carry :]]
        return [*self.handed_on(carry, scan.invariant(), results[: scan.num_carry]), *ys]

    def while_loop(self, loop: While, values: list[Value], site: Site, around: Around) -> list[Value]:
        """The results of a `while_loop`. How often it runs is not known: as often as can be."""
        condition_consts, consts, carry = loop.grouped([value.without_outputs() for value in values])
        inside = dataclasses.replace(around, trips=math.inf, loops=(*around.loops, site))

        def trip(walk: _Walk, carry: list[Value]) -> list[Value]:
            return walk.run(loop.body, [*consts, *carry], (*site, 1), inside)

        carry = self.settle(carry, loop.invariant(), trip, None)
        self.run(loop.condition, [*condition_consts, *carry], (*site, 0), inside)
        return self.handed_on(carry, loop.invariant(), trip(self, carry))

    def settle(
        self,
        carry: list[Value],
        invariant: list[bool],
        trip: Callable[[_Walk, list[Value]], list[Value]],
        counter: Counter | None,
    ) -> list[Value]:
        """The carries of a loop, after as many trips as it takes until no more of them hold data.

        Data may come into a carry in the first trip, and from there into another in the second. The trips are those of
        walks whose notes nobody reads, so that each use is noted once. Each adds to a carry, or is the last. A carry
        that starts at 0 is taken for the loop's counter until a trip does something else to it than to add 1.
        """
        carry = [
            value if same else self.stop(value, Reason.CARRIED, "loop").counting(counter)
            for value, same in zip(carry, invariant, strict=True)
        ]
        while True:
            after = trip(_Walk(Notes(), self.data_in_consts, self.live), carry)[: len(carry)]
            grown = [
                value if same else value.grown(out) for value, out, same in zip(carry, after, invariant, strict=True)
            ]
            if grown == carry:
                return carry
            self.doubt(*(before for before, after in zip(carry, grown, strict=True) if after.data))
            carry = grown

    def handed_on(self, carry: list[Value], invariant: list[bool], results: list[Value]) -> list[Value]:
        """The carries after a loop: those that it does not change keep their views."""
        return [
            before if same else dataclasses.replace(self.stop(after, Reason.CARRIED, "loop"), fact=None)
            for before, after, same in zip(carry, results, invariant, strict=True)
        ]

    def cond(self, branches: list[Body], values: list[Value], site: Site, around: Around) -> list[Value]:
        """The results of a `cond` or `switch`. All branches are walked through, as any may run."""
        index, *operands = [value.without_outputs() for value in values]
        inside = dataclasses.replace(around, branch=True)
        results = [self.run(branch, operands, (*site, i), inside) for i, branch in enumerate(branches)]
        return [self.join(index, values) for values in zip(*results, strict=True)]

    def join(self, index: Value, values: Sequence[Value]) -> Value:
        """One result of a `cond`, from what its branches give."""
        # Where data chooses among branches, the result is data, even of parameters alone.
        common = Value.joined([index, *values], None)
        if not common.data and all(value.views == values[0].views for value in values):
            return dataclasses.replace(common, views=values[0].views)
        for value in values:
            self.stop(value, Reason.BRANCH, "cond")
        return common


def _are_of_different_sources(values: Sequence[Value]) -> bool:
    """Whether no parameter is contracted with itself, as by a penalty."""
    first, second = ({view.source for view in value.views} for value in values)
    return not first & second


def _one_of_the_same(values: Sequence[Value]) -> Value | None:
    """A choice among values that are one parameter's numbers at the same places, if they are: whatever chooses.

    `vmap` makes such a choice of a `cond`, between a parameter and the same under `stop_gradient`.
    """
    views = [tuple(dataclasses.replace(view, frozen=False) for view in value.views) for value in values]
    if not views[0] or any(other != views[0] for other in views):
        return None
    return dataclasses.replace(
        values[0], views=next((v.views for v in values if v.trains), values[0].views), outputs=()
    )


def _is_masked(eqn: Equation, values: Sequence[Value], operand: int) -> bool:
    """Whether the equation multiplies this operand by constants, or puts zeros in places that constants name."""
    roles = mask_operands(eqn, operand)
    if roles is None:
        return False
    constants, zeros = roles
    return not any(values[i].data or values[i].trains for i in constants) and all(values[i].fact == 0 for i in zeros)


def _is_scalar_of_two(eqn: Equation, values: list[Value]) -> bool:
    """Whether each of two parameters could be said to scale the other. Then neither is said to."""
    return all(value.views for value in values) and math.prod(jaxpr.outputs(eqn)[0].shape) == 1


def _reason(eqn: Equation, operand: int) -> Reason:
    """Why a view ends in this equation. For people; nothing is decided by it."""
    output = jaxpr.outputs(eqn)[0]
    if eqn.primitive in (primitive.gather_p, primitive.dynamic_slice_p):
        return Reason.INDEXED if operand == 0 else Reason.OPAQUE
    if any(contractions(eqn)):
        return Reason.PENALTY if output.size == 1 else Reason.PRODUCT
    squares = eqn.primitive in (primitive.square_p, primitive.integer_pow_p)
    if squares or (len(eqn.invars) == 2 and eqn.invars[0] is eqn.invars[1]):
        return Reason.PENALTY
    if eqn.primitive in _REDUCTIONS:
        return Reason.PENALTY
    if eqn.primitive is primitive.convert_element_type_p and not jnp.issubdtype(output.dtype, jnp.floating):
        return Reason.DTYPE
    if eqn.primitive in MOVES and eqn.primitive is not primitive.concatenate_p:
        return Reason.RESHAPED
    return Reason.ELEMENTWISE if eqn.primitive in _ELEMENTWISE else Reason.OPAQUE


_SUMS = frozenset(
    {primitive.add_p, primitive.sub_p, primitive.select_n_p, primitive.concatenate_p, jaxpr.stack_p, primitive.max_p}
)
"""The operations that set data beside a value, or add the two."""
_REDUCTIONS = frozenset({primitive.reduce_sum_p, primitive.reduce_max_p, primitive.reduce_min_p})
_ELEMENTWISE = frozenset(
    getattr(primitive, f"{name}_p")
    for name in (
        *("abs", "add", "clamp", "cos", "div", "exp", "exp2", "expm1", "log", "log1p", "logistic", "max", "min", "mul"),
        *("pow", "rem", "round", "rsqrt", "select_n", "sign", "sin", "sqrt", "sub", "tanh"),
    )
)
