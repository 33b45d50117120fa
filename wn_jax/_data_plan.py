"""The plan of data-dependent initialization: which nodes it sets, where, with which bias, and why not the others.

This file decides, from what was read of a program; `_data_init` runs it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp

from wn_jax._node import WeightNorm
from wn_jax._program.jaxpr import Site
from wn_jax._program.notes import Bias, Use
from wn_jax._program.reading import ParameterLeaf, Reading


@dataclasses.dataclass(frozen=True)
class Target:
    """A node that gets its `g`, and perhaps a bias, at one contraction."""

    leaf: ParameterLeaf
    """The node's leaf."""
    use: Use
    """Its one use."""
    samples: tuple[int, ...]
    """The output's dimensions over which statistics are taken."""
    bias: tuple[ParameterLeaf, Bias] | None
    """The leaf that gets the bias, and where the program adds it."""

    @property
    def node(self) -> WeightNorm:
        """The node itself. Others are no targets, as their `g` is not known."""
        return cast(WeightNorm, self.leaf.node)

    def g(self, gain: jax.Array) -> jax.Array:
        """Numbers of the output's features, laid out as the node's `g` (that of one layer, in a scanned stack)."""
        kept = [target for _, target in sorted(self.use.contraction.kept)]
        gain = gain.transpose([*kept, *(dim for dim in range(gain.ndim) if dim not in kept)])
        return self.use.view.to_source(gain, self.leaf.aval.ndim, self.use.reduction)


def plan(reading: Reading) -> tuple[dict[Site, Target], str]:
    """The nodes to initialize, by the site of their contraction, in the order of the program; and why not the others.

    Raises:
        ValueError: there are no nodes, or one gets a single sample.
    """
    nodes = [leaf for leaf in reading.leaves if leaf.node is not None]
    if not nodes:
        raise ValueError(
            "the parameters hold no nodes, so there is no g to initialize; "
            "call wn_jax.reparameterize(params, wn_jax.infer_axes(fn)(params, ...)) first"
        )
    kept = {leaf.path: why for leaf in nodes if (why := _why_not(leaf))}
    targets = {leaf.uses[0].site: _target(leaf, reading) for leaf in nodes if leaf.path not in kept}
    lines = "".join(f"\n  {path}: {why}" for path, why in kept.items())
    left = f"init_from_data left {len(kept)} of {len(nodes)} nodes as they were:{lines}" if kept else ""
    return dict(sorted(targets.items())), left


def _why_not(leaf: ParameterLeaf) -> str | None:
    """Why a node keeps its `g`; `None` where it does not."""
    if not isinstance(leaf.node, WeightNorm):
        return f"it is a {type(leaf.node).__name__}, which has no g that is known here"
    if leaf.problem:
        return leaf.problem.reason.explanation
    if len(leaf.uses) > 1:
        return f"the program uses it at {len(leaf.uses)} places"
    use = leaf.uses[0]
    if use.around.trips == math.inf:
        return "a while_loop uses it"
    if use.around.branch:
        return "a branch of a cond or switch uses it"
    if use.view.partial or use.view.shared or any(len(dim) > 1 for _, dim in use.view.slices):
        return "the program uses it in parts, or together with others"
    if len(use.view.slices) < use.around.loops or any(axis is None for _, dim in use.view.slices for axis, _ in dim):
        return "it is used at several steps of a loop"
    # An order that is reversed within the sum changes nothing, and its scale has no such axis.
    if use.view.flipped - use.reduction:
        return "the program reverses the order of its features or copies"
    # Axes of size 1 may be in either: a sum over one number is that number.
    if leaf.axes(leaf.reduced or frozenset()) != leaf.axes(use.reduction | _of_size_1(leaf)):
        return f"its norm runs over {leaf.node.axes}, the program sums over {leaf.axes(use.reduction)}"
    return None


def _of_size_1(leaf: ParameterLeaf) -> frozenset[int]:
    return frozenset(axis for axis, size in enumerate(leaf.aval.shape) if size == 1)


def _target(leaf: ParameterLeaf, reading: Reading) -> Target:
    """The target that a node is, in its only use."""
    use = leaf.uses[0]
    features = {target for dim, target in use.contraction.kept if use.view.axes([dim])}
    samples = tuple(dim for dim in range(len(use.output)) if dim not in features)
    if math.prod(use.output[dim] for dim in samples) < 2:
        raise ValueError(
            f"init_from_data has a single sample for each feature of {leaf.path!r}, whose output has shape "
            f"{use.output}: that has no standard deviation. Give it a larger batch."
        )
    return Target(leaf, use, samples, _bias(use, samples, reading))


def _bias(use: Use, samples: Sequence[int], reading: Reading) -> tuple[ParameterLeaf, Bias] | None:
    """The bias that the program adds to this output: one number a feature, used for nothing else."""
    bias = reading.biases.get(use.site)
    if bias is None:
        return None
    leaf = next(leaf for leaf in reading.leaves if leaf.input == bias.view.source)
    is_float = jnp.issubdtype(leaf.aval.dtype, jnp.floating)
    # The addition itself is its one note.
    if leaf.node is not None or len(leaf.notes) > 1 or leaf.returned or not is_float:
        return None
    if any(view.partial or view.shared or view.scaled or view.flipped for view in (bias.view, bias.output)):
        return None
    # In a loop, each trip must have a bias of its own, as it has a layer of its own.
    if len(bias.view.slices) < use.around.loops:
        return None
    if not all(len(dim) == 1 and axis is not None for _, dim in bias.view.slices for axis, _ in dim):
        return None
    return (leaf, bias) if _is_one_number_a_feature(bias, samples) else None


def _is_one_number_a_feature(bias: Bias, samples: Sequence[int]) -> bool:
    """Whether a bias varies as the features of the output do, and not along what statistics are taken over."""
    for dim, added in zip(bias.output.dims, bias.view.dims, strict=True):
        sampled = [axis in samples for axis, size in dim if size > 1]
        features = math.prod(size for axis, size in dim if axis not in samples)
        if len(set(sampled)) > 1 or features != math.prod(size for axis, size in added if axis is not None):
            return False
    return True
