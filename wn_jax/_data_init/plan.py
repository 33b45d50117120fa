"""The plan of data-dependent initialization: which nodes it sets, where, with which bias, and why not the others.

This file decides, from what was read of a program; `initialize` runs it. How the numbers of an output become those of
a node, `grid` says.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Hashable, Sequence

import numpy as np

from wn_jax._by_path import ByPath, values_by_path
from wn_jax._data_init.grid import BiasTarget, Target, places_in_source, refined
from wn_jax._node import WeightNorm
from wn_jax._program.jaxpr import Site
from wn_jax._program.notes import Bias, Met, Reason, Use
from wn_jax._program.reading import ParameterLeaf, Reading
from wn_jax._program.views import View


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a run is to set."""

    targets: dict[Site, list[Target]]
    """The nodes, or parts of one, by the site of their contraction, in the order of the program."""
    biases: dict[Site, BiasTarget]
    """By the site of the addition."""
    scales: dict[str, float]
    """By the path of a node: the deviation that its outputs get."""
    left: str
    """The nodes and biases that stay as they are, and why: a warning, or nothing."""


def plan(reading: Reading, init_scale: ByPath[float]) -> Plan:
    """The nodes and biases to initialize.

    Raises:
        ValueError: there are no nodes, or one gets a single sample; `init_scale` names what is no node, or has no
            positive number for one.
    """
    nodes = [leaf for leaf in reading.leaves if leaf.node is not None]
    if not nodes:
        raise ValueError(
            "the parameters hold no nodes, so there is no g to initialize; "
            "call wn_jax.reparameterize(params, wn_jax.infer_axes(fn)(params, ...)) first"
        )
    scales = _scales(reading.leaves, init_scale)
    kept = {leaf.path: why for leaf in nodes if (why := _why_not(leaf))}
    targets: dict[Site, list[Target]] = collections.defaultdict(list)
    for leaf in nodes:
        if leaf.path not in kept:
            for use in leaf.uses:
                targets[use.site].append(_target(leaf, use))
    targets = dict(sorted(targets.items()))
    biases, left_biases = _biases(reading, targets)
    parts = [_listed(f"{len(kept)} of {len(nodes)} nodes", kept), _listed("biases", left_biases)]
    return Plan(targets, biases, scales, "\n".join(part for part in parts if part))


def _scales(leaves: Sequence[ParameterLeaf], init_scale: ByPath[float]) -> dict[str, float]:
    """The deviation that the outputs of each node get, by its path."""
    nodes = [leaf.path for leaf in leaves if leaf.node is not None]
    others = [leaf.path for leaf in leaves if leaf.node is None]
    scales = values_by_path("init_scale", init_scale, nodes, others, default=1.0)
    for path, scale in scales.items():
        check_init_scale(scale, f" for {path!r}")
    return scales


def check_init_scale(scale: object, where: str = "") -> None:
    """Raises where it is no deviation."""
    if not isinstance(scale, int | float | np.number) or not 0 < scale < math.inf:
        raise ValueError(
            f"init_scale must be a positive number, the deviation of pre-activations; got {scale!r}{where}"
        )


def _listed(what: str, why: dict[str, str]) -> str:
    """A part of the warning, or nothing."""
    lines = "".join(f"\n  {path}: {reason}" for path, reason in why.items())
    return f"init_from_data left {what} as they were:{lines}" if why else ""


# Nodes.


def _why_not(leaf: ParameterLeaf) -> str | None:
    """Why a node keeps its `g`; `None` where it does not."""
    if not isinstance(leaf.node, WeightNorm):
        return f"it is a {type(leaf.node).__name__}, which has no g that is known here"
    if leaf.problem:
        return leaf.problem.reason.explanation
    if why := next((why for use in leaf.uses if (why := _why_not_at(leaf, use))), None):
        return why
    if _overlap([places_in_source(use.view, use.reduction) for use in leaf.uses]):
        return f"the program uses it at {len(leaf.uses)} places"
    return None


def _why_not_at(leaf: ParameterLeaf, use: Use) -> str | None:
    """Why a use does not set the `g` of the node; `None` where it does."""
    assert isinstance(leaf.node, WeightNorm)
    if use.around.trips == math.inf:
        return "a while_loop uses it"
    if use.around.branch:
        return "a branch of a cond or switch uses it"
    if use.view.unplaced - use.reduction:
        return "the program uses parts of it that only a run chooses"
    if any(dim.is_beside_others for _, dim in use.view.slices):
        return "a loop slices it together with others"
    if not _is_sliced_by(use.view, use.around.loops):
        return "it is used at several steps of a loop"
    # Axes of size 1 may be in either: a sum over one number is that number.
    if leaf.axes(leaf.reduced or frozenset()) != leaf.axes(use.reduction | _of_size_1(leaf)):
        return f"its norm runs over {leaf.node.axes}, the program sums over {leaf.axes(use.reduction)}"
    if use.met is not Met.DATA and Target(leaf, use).sample_count < 2:
        return "it meets no data, but a single constant or learned vector"
    return None


def _is_sliced_by(view: View, loops: Sequence[Site]) -> bool:
    """Whether each trip of each of the loops gets a slice of its own."""
    sliced = {scan for scan, dim in view.slices if all(atom.axis is not None for atom in dim.atoms)}
    return sliced == set(loops)


def _of_size_1(leaf: ParameterLeaf) -> frozenset[int]:
    return frozenset(axis for axis, size in enumerate(leaf.aval.shape) if size == 1)


def _overlap(regions: Sequence[np.ndarray]) -> bool:
    """Whether a place is in two of these, or twice in one."""
    everything = np.concatenate(regions)
    return len(np.unique(everything)) < len(everything)


def _target(leaf: ParameterLeaf, use: Use) -> Target:
    """The target that a node is, in one of its uses."""
    target = Target(leaf, use)
    if target.sample_count < 2:
        raise ValueError(
            f"init_from_data has a single sample for each feature of {leaf.path!r}, whose output has shape "
            f"{use.output}: that has no standard deviation. Give it a larger batch."
        )
    return target


# Biases.


def _biases(reading: Reading, targets: dict[Site, list[Target]]) -> tuple[dict[Site, BiasTarget], dict[str, str]]:
    """The biases to set, by the site of their addition; and by path why others stay as they are."""
    leaves: dict[Hashable, ParameterLeaf] = {leaf.input: leaf for leaf in reading.leaves}
    found: dict[Site, BiasTarget] = {}
    left: dict[str, str] = {}
    for site in targets:
        for bias in reading.biases.get(site, []):
            leaf = leaves[bias.view.source]
            if leaf.node is not None:
                continue  # a weight that is added has a reason of its own
            target = _bias_target(leaf, bias, targets[site])
            if isinstance(target, str):
                left[leaf.path] = target
            elif bias.site in found:
                left[leaf.path] = "the program adds it to several outputs at once"
            else:
                found[bias.site] = target
    found = {site: bias for site, bias in found.items() if bias.leaf.path not in left}
    return _apart(found, left), left


def _apart(found: dict[Site, BiasTarget], left: dict[str, str]) -> dict[Site, BiasTarget]:
    """The same, less those of a parameter that several additions take, unless they take different parts of it."""
    additions = collections.defaultdict(list)
    for bias in found.values():
        additions[bias.leaf.path].append(bias)
    for path, biases in additions.items():
        if len(biases[0].leaf.notes) > len(biases) or biases[0].leaf.returned:
            left[path] = "the program uses it for something else, too"
        elif _overlap([places_in_source(bias.view, frozenset()) for bias in biases]):
            left[path] = f"the program adds it at {len(biases)} places"
    return {site: bias for site, bias in found.items() if bias.leaf.path not in left}


def _bias_target(leaf: ParameterLeaf, bias: Bias, targets: Sequence[Target]) -> BiasTarget | str:
    """A bias that can be set, or why it cannot."""
    if leaf.frozen or bias.view.frozen or (leaf.problem and leaf.problem.reason is Reason.DTYPE):
        return "it is frozen, or of no floating-point dtype"
    if bias.view.scaled or bias.view.masked:
        return "the program scales or masks it before it adds it"
    if bias.output.scaled or bias.output.masked:
        return "the program scales or masks the output before it adds it"
    if bias.view.unplaced or bias.output.unplaced:
        return "the program adds parts that only a run chooses"
    if not _is_sliced_by(bias.view, targets[0].use.around.loops):
        return "it is added at several steps of a loop"
    if targets[0].use.contraction.group is not None:
        return "the output's rows are of several groups"
    views = refined(bias)
    if views is None:
        return "a reshape or a concatenation mixes its axes with others"
    output, view = views
    features = frozenset[int]().union(*(target.features for target in targets))
    for of_output, of_bias in zip(output.dims, view.dims, strict=True):
        (first,), (second,) = of_output.atoms, of_bias.atoms
        if first.size > 1 and (first.axis in features) != (second.axis is not None):
            return "it is not one number a feature of that output"
    return BiasTarget(leaf, bias, output, view, features)
