"""A program whose parameters were followed: what was noted of each leaf, and where its scale goes.

This file brings a user's function and its trees to the walk, with an abstract weight in the place of each node. The
conclusions that others share are here; those that users read are `_uses`'s.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from flax import nnx

from wn_jax._boxes import is_box
from wn_jax._calls import check_position, note_on_parameters
from wn_jax._node import Node, is_node
from wn_jax._program.factored import can_hold_directions
from wn_jax._program.jaxpr import Program, Site, is_input, trace
from wn_jax._program.notes import Bias, Notes, Problem, Reason, Use
from wn_jax._program.walk import walk
from wn_jax._tree import abstract_weight, check_is_leaf, flatten_with_keys, leaf_path
from wn_jax._types import KeyPath, Leaf, Params, PyTree


@dataclasses.dataclass(frozen=True)
class ParameterLeaf:
    """A parameter leaf in a program, and what the walk noted of it."""

    path: str
    """Its path in its tree. Arrays in one box share it."""
    position: int
    """Which leaf of its tree it is."""
    input: int
    """Which input of the program it is."""
    aval: jax.core.ShapedArray
    """Its shape and dtype; of a node, those of its weight."""
    node: Node | None
    """The node that stands there, if one does."""
    reduced: frozenset[int] | None
    """The axes, counted from 0, along which that node's scale does not vary."""
    notes: tuple[Use | Problem, ...]
    """Its uses, in the order of the program."""
    returned: bool
    """Whether the program returns it as it is."""
    frozen: str = ""
    """The class of Variable, or the collection, by which its tree says that it is not trained; or nothing."""

    @property
    def uses(self) -> list[Use]:
        """Its contractions."""
        return [note for note in self.notes if isinstance(note, Use)]

    @property
    def problem(self) -> Problem | None:
        """The first thing that speaks against its being a weight."""
        if self.misuse is None and (self.frozen or all(use.view.frozen for use in self.uses)):
            return Problem(Reason.FROZEN, self.frozen or "stop_gradient")
        return self.misuse

    @property
    def misuse(self) -> Problem | None:
        """The first of these that lies in the program. To be frozen says nothing about where a scale may go."""
        if not jnp.issubdtype(self.aval.dtype, jnp.floating):
            return Problem(Reason.DTYPE, str(self.aval.dtype))
        for note in self.notes:
            if isinstance(note, Problem):
                return note
            if note.problem:
                return Problem(note.problem, note.how)
        uses = self.uses
        # To be returned besides is no problem: a scale stays on the weight then (`_can_scale_outputs`).
        if not uses:
            return Problem(Reason.RETURNED if self.returned else Reason.UNUSED, "")
        if any(use.around.backward for use in uses):
            return Problem(Reason.DIFFERENTIATED, "")
        if len({use.reduction for use in uses}) > 1:
            return Problem(Reason.DISAGREE, "")
        return None if any(use.tells for use in uses) else Problem(uses[0].why_not, uses[0].how)

    def axes(self, axes: frozenset[int]) -> tuple[int, ...]:
        """Axes that are counted from 0, counted from the end."""
        return tuple(sorted(axis - self.aval.ndim for axis in axes))

    @property
    def sliced(self) -> bool:
        """Whether each of its uses is in a loop that gives every trip a slice of its own: a stack of layers."""
        return self.misuse is None and not self.returned and all(use.view.slices for use in self.uses)

    def goes_to_output(self, always: bool = False) -> bool:
        """Whether the scale goes to the outputs of this weight's contractions.

        It does where the outputs, each counted as often as loops compute it, hold fewer numbers than the weight; with
        `always`, wherever it can. All uses of a weight go the same way, as a rebuilt weight is paid for once.
        """
        if not self._can_scale_outputs:
            return False
        outputs = sum(use.output_size for use in self.uses)
        # Where jax.export leaves a dimension open this is no int, and the weight's side costs the same for all sizes.
        return always or (isinstance(outputs, int) and outputs < self.aval.size)

    @property
    def _can_scale_outputs(self) -> bool:
        """Whether the outputs of the contractions of `v`, times the scale, are those of the weight, in every use."""
        if self.misuse or self.returned:
            return False
        return all(
            use.summed <= (use.reduction if self.reduced is None else self.reduced)
            and can_hold_directions(self.aval.dtype, use.operand_dtype, use.dtype)
            and not use.around.custom_rule  # the rule is the weight's: it must not be differentiated by v
            and use.around.trips != math.inf  # how often a while_loop runs, and so what it costs, is not known
            for use in self.uses
        )

    @property
    def copies(self) -> frozenset[int]:
        """The axes that are batch dimensions of a matmul in all uses."""
        return frozenset.intersection(*(use.view.axes(use.contraction.batch) for use in self.uses))


@dataclasses.dataclass(frozen=True)
class Reading:
    """A program whose parameters were followed."""

    program: Program
    leaves: list[ParameterLeaf]
    """The parameters, in the order of the program's inputs."""
    biases: Mapping[Hashable, list[Bias]]
    """By the site of the contraction to whose output they are added. The source of their view is an input's number."""
    masks: frozenset[Site]
    """The equations that mask a parameter."""


def read(
    fn: Callable[..., PyTree],
    argnums: Sequence[int],
    args: Sequence[PyTree],
    kwargs: dict[str, Any],
    purpose: str,
    data_in_consts: bool = False,
) -> Reading:
    """Traces `fn`, with an abstract weight in place of each node, and follows the parameters in `argnums`.

    `purpose` completes the note on an error of `fn`. `data_in_consts`: whether arrays that `fn` closes over count as
    data; where no argument but the parameters is an array, or only random keys are, they do in any case.
    """
    check_position(argnums, args, kwargs)
    plain = list(args)
    by_input: dict[int, _Parameter] = {}
    for argnum in sorted(argnums):
        parameters, plain[argnum] = _parameters(args[argnum])
        first = _count_inputs(plain[:argnum])
        for parameter in parameters:
            inputs = range(first, first + _count_inputs(parameter.plain))
            by_input.update(dict.fromkeys(inputs, parameter))
            first = inputs.stop
    try:
        traced = trace(fn, plain, kwargs, purpose)
    except Exception as error:
        note_on_parameters(error, [args[i] for i in argnums])
        raise
    names = [i if i in by_input else None for i in range(len(traced.arrays))]
    frozen = {number for number, parameter in by_input.items() if parameter.frozen}
    avals = traced.body.inputs
    others = [aval for name, aval in zip(names, avals, strict=True) if name is None]
    notes = walk(traced.body, names, frozen, data_in_consts or all(map(_is_random_key, others)))
    leaves = [_leaf(i, parameter, avals[i], notes) for i, parameter in by_input.items()]
    return Reading(traced, leaves, notes.biases, frozenset(notes.masks))


@dataclasses.dataclass(frozen=True)
class _Parameter:
    """A leaf of a parameter tree, before its program is traced."""

    path: str
    position: int
    """Which leaf of its tree it is."""
    plain: PyTree
    """The tree that is traced: of a node, its abstract weight. A box may hold several inputs; a number is none."""
    node: Node | None
    """The node that stands there, if one does."""
    reduced: frozenset[int] | None
    """The axes along which the node's scale does not vary."""
    frozen: str
    """The class of Variable, or the collection, by which the tree says that it is not trained; or nothing."""


def _parameters(tree: Params) -> tuple[list[_Parameter], Params]:
    """The leaves of a parameter tree, and the tree with abstract weights in place of its nodes."""
    pairs, treedef = flatten_with_keys(tree)
    parameters = []
    for position, (keys, leaf) in enumerate(pairs):
        path, frozen = leaf_path(keys), _not_a_param(leaf) or _beside_params(tree, keys)
        if is_node(leaf):
            plain, scale = abstract_weight(leaf)
            reduced = frozenset(axis for axis, size in enumerate(scale.shape) if size == 1)
            parameters.append(_Parameter(path, position, plain, leaf, reduced, frozen))
        else:
            check_is_leaf(path, leaf)
            parameters.append(_Parameter(path, position, leaf, None, None, frozen))
    return parameters, jax.tree.unflatten(treedef, [parameter.plain for parameter in parameters])


def _not_a_param(leaf: Leaf) -> str:
    """The class of a leaf's NNX Variable (of a node's, if it holds several), where there is no `nnx.Param`."""
    boxes = jax.tree.leaves(leaf, is_leaf=is_box) if is_node(leaf) else [leaf]
    variables = [box for box in boxes if isinstance(box, nnx.Variable)]
    trained = any(isinstance(variable, nnx.Param) for variable in variables)
    return type(variables[-1]).__name__ if variables and not trained else ""


def _beside_params(tree: Params, keys: KeyPath) -> str:
    """The collection that a leaf is in, where the tree has collections, as Linen's variables, and this is not `params`.

    An `nnx.State` has attributes of the model there; and an array that is called params is no collection.
    """
    if not isinstance(tree, Mapping) or isinstance(tree, nnx.State) or "params" not in tree:
        return ""
    if jax.tree_util.all_leaves([tree["params"]]) or is_box(tree["params"]) or is_node(tree["params"]):
        return ""
    collection = leaf_path(keys[:1])
    return "" if collection == "params" else collection


def _count_inputs(tree: PyTree) -> int:
    """How many inputs of a program a tree is."""
    return sum(map(is_input, jax.tree.leaves(tree)))


def _is_random_key(aval: jax.core.ShapedArray) -> bool:
    """Whether an input is a random key or several, of the new kind or of the old, which is a pair of words."""
    raw = aval.dtype == jnp.uint32 and aval.shape[-1:] == (2,)
    return raw or jnp.issubdtype(aval.dtype, jax.dtypes.prng_key)


def _leaf(number: int, parameter: _Parameter, aval: jax.core.ShapedArray, notes: Notes) -> ParameterLeaf:
    """A parameter that is an input of a program, with what was noted of it."""
    return ParameterLeaf(
        path=parameter.path,
        position=parameter.position,
        input=number,
        aval=aval,
        node=parameter.node,
        reduced=parameter.reduced,
        notes=tuple(notes.uses.get(number, ())),
        returned=number in notes.returned,
        frozen=parameter.frozen,
    )
