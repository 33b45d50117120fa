"""Where the arrays of PyTorch's layers are in Flax's, and in what order their axes: data of a name map.

A layout is written in the notation of einops, PyTorch's axes on the left: `"o i ... -> ... i o"` makes `(out, in,
spatial)` of a convolution Flax's `(spatial, in, out)`. Read from right to left, it leads back.

This file owns one array and its layout, and the layers that people have. How names match is `_names`'s.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import einops
import numpy as np

from wn_jax._node import WeightNorm
from wn_jax._types import Shape
from wn_jax.torch._arrays import ArrayOrNode

_FOLD = "wn_jax.reconstruct the tree first, and take the weight as it is"
# In PyTorch's order, by Flax's names.
_LSTM_GATES, _GRU_GATES = "ifgo", "rzn"


@dataclasses.dataclass(frozen=True)
class Array:
    """The place of one array of a state dict in a tree of parameters, and its layout there.

    Arguments:
        path: the path of the leaf, as `wn_jax.reparameterize` takes it (`"params/conv/kernel"`). A tuple of paths
            shares the array out along the first axis that the layout gives it, as the gates of an LSTM are.
        layout: the order of the axes, PyTorch's on the left, as `einops.rearrange` takes it; by default the same.
        sizes: the sizes of axes that the layout splits, by name: `{"heads": 8}` for `"(heads d) i -> i heads d"`.
        flip: whether the spatial axes (PyTorch's third and further) are reversed, as a transposed convolution needs.
        add: whether it is added to the other arrays that go to the same leaf, as PyTorch's LSTM has two biases where
            Flax has one. On the way back the first of them gets the sum, and the others get zeros.
    """

    path: str | tuple[str, ...]
    layout: str | None = None
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    flip: bool = False
    add: bool = False

    def __post_init__(self) -> None:
        if not self.paths or len(set(self.paths)) < len(self.paths):
            raise ValueError(f"the paths {self.path!r} must be one or several, and each another")
        if self.layout is not None and self.layout.count("->") != 1:
            raise ValueError(f"the layout {self.layout!r} has no '->' in it, once; write it as in 'o i -> i o'")
        if self.layout is not None and re.search(r"\([^)]*\.\.\.", self.layout):
            raise ValueError(f"the layout {self.layout!r} has '...' in parentheses; name the axes that it merges")

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of the leaves: one, or those that share the array."""
        return (self.path,) if isinstance(self.path, str) else tuple(self.path)

    def to_flax(self, leaf: ArrayOrNode) -> list[ArrayOrNode]:
        """The array, or node, as it is at each of `paths`.

        Raises:
            ValueError: the layout does not fit the shape; the norm of a node is not one over axes of the new layout.
        """
        whole = self._rearranged(_reversed(leaf) if self.flip else leaf, self._sides())
        if isinstance(self.path, str):
            return [whole]
        shape = (whole.v if isinstance(whole, WeightNorm) else whole).shape
        if shape[:1] != (len(self.paths),):
            raise ValueError(f"is in Flax's layout of shape {shape}, and not {len(self.paths)} arrays, one a leaf")
        if isinstance(whole, WeightNorm) and -whole.v.ndim in whole.axes:
            raise ValueError(f"has one norm for the {len(self.paths)} arrays that it is taken apart into; {_FOLD}")
        return [_map(lambda array, i=i: array[i], whole) for i in range(len(self.paths))]

    def to_torch(self, leaves: Sequence[ArrayOrNode]) -> ArrayOrNode:
        """The array, or node, of PyTorch, from what is at each of `paths`.

        Raises:
            ValueError: as `to_flax`; or the leaves that make one array differ in shape or axes.
        """
        whole = leaves[0] if isinstance(self.path, str) else self._stacked(leaves)
        whole = self._rearranged(whole, self._sides()[::-1])
        return _reversed(whole) if self.flip else whole

    def _stacked(self, leaves: Sequence[ArrayOrNode]) -> ArrayOrNode:
        """Leaves that share an array as one, along a new first axis."""
        kinds = {kind_of(leaf) for leaf in leaves}
        if len(kinds) > 1:
            differing = " and ".join(sorted(map(str, kinds)))
            raise ValueError(f"one array is made of {', '.join(self.paths)}, which differ: {differing}")
        return _map(lambda *arrays: np.stack(arrays), *leaves)

    def _sides(self) -> tuple[str, ...]:
        """PyTorch's side of the layout, and Flax's; none where the order stays."""
        return tuple(side.strip() for side in self.layout.split("->")) if self.layout else ()

    def _rearranged(self, leaf: ArrayOrNode, sides: tuple[str, ...]) -> ArrayOrNode:
        """The leaf with its axes moved from the first side of a layout to the second."""
        if not sides:
            return leaf
        if not isinstance(leaf, WeightNorm):
            return self._array_rearranged(leaf, sides)
        v = self._array_rearranged(leaf.v, sides)
        axes = self._moved_axes(leaf, sides, v.ndim)
        # The layout speaks of v's axes, so g moves at v's size. Along its reduced axes it is the same everywhere, and
        # may be cut back to one place after the move.
        g = self._array_rearranged(np.broadcast_to(leaf.g, leaf.v.shape), sides)
        one_place = tuple(slice(1 if i - v.ndim in axes else None) for i in range(v.ndim))
        return WeightNorm(g[one_place], v, axes)

    def _moved_axes(self, leaf: WeightNorm, sides: tuple[str, ...], ndim: int) -> tuple[int, ...]:
        """The reduction axes of a node whose axes are moved to an array of `ndim`.

        Raises:
            ValueError: the layout merges an axis that the norm runs over with one that it does not, or none is left.
        """
        shape = leaf.v.shape
        before, after = (_axis_names(side, rank) for side, rank in zip(sides, (len(shape), ndim), strict=True))
        sizes = self._axis_sizes(before, shape)
        kept = {name for i, names in enumerate(before) if i - len(shape) not in leaf.axes for name in names}
        kept = {name for name in kept if sizes[name] > 1} or kept  # a size of 1 counts only where there is no other
        reduced = tuple(i - ndim for i, names in enumerate(after) if kept.isdisjoint(names))
        # Where an axis that keeps its norms is merged with a reduced one, each norm would be for a part of an axis.
        others = [{*names} - kept for names in after if not kept.isdisjoint(names)]
        mixed = any(sizes[name] > 1 for names in others for name in names)
        if mixed or not reduced:
            raise ValueError(
                f"has a norm over the axes {leaf.axes} of {shape}, which is no norm over axes in the layout "
                f"{sides[1]!r}; {_FOLD}"
            )
        return reduced

    def _axis_sizes(self, axes: list[list[str]], shape: Shape) -> dict[str, int]:
        """The size of each name, from the shape of an array whose axes are made of these."""
        sizes = dict(self.sizes)
        for names, size in zip(axes, shape, strict=True):
            for name in [name for name in names if name not in sizes]:  # einops saw to it that there is at most one
                sizes[name] = size // math.prod(sizes[other] for other in names if other != name)
        return sizes

    def _array_rearranged(self, array: np.ndarray, sides: tuple[str, ...]) -> np.ndarray:
        layout = " -> ".join(sides)
        try:
            return einops.rearrange(array, layout, **self.sizes)
        except einops.EinopsError as error:
            reason = str(error).strip().splitlines()[-1].strip()  # the lines before it repeat the call
            raise ValueError(
                f"has the shape {array.shape}, which the layout {layout!r} does not fit: {reason}"
            ) from None


def kind_of(leaf: ArrayOrNode) -> tuple[str | Shape, ...]:
    """The kind, the shape and the axes of a leaf, which two must share to make one array."""
    return ("node", leaf.v.shape, leaf.axes) if isinstance(leaf, WeightNorm) else ("array", leaf.shape)


Layer: TypeAlias = dict[str, Array | None]
"""The places of a layer's arrays, by their names in PyTorch's; `None` for one that is left out."""


def linear(path: str) -> Layer:
    """`torch.nn.Linear` as `nn.Dense` (or `nnx.Linear`) at `path`."""
    return {"weight": Array(_in(path, "kernel"), "o i -> i o"), "bias": Array(_in(path, "bias"))}


def conv(path: str) -> Layer:
    """`torch.nn.Conv1d`, `Conv2d` or `Conv3d`, with groups or without, as `nn.Conv` at `path`.

    Flax's padding is `"SAME"` by default; give it PyTorch's, in numbers: `nn.Conv(..., padding=[(p, p)])`.
    """
    return {"weight": Array(_in(path, "kernel"), "o i ... -> ... i o"), "bias": Array(_in(path, "bias"))}


def conv_transpose(path: str, transpose_kernel: bool = False, groups: int = 1) -> Layer:
    """`torch.nn.ConvTranspose1d`, `2d` or `3d` as `nn.ConvTranspose` at `path`; with groups, as `nn.Conv`.

    The norm stays over the axes that it has in PyTorch (all but the first, of the *inputs*, with the default `dim=0`),
    so that the weight is equal. PyTorch's padding `p`, for a kernel of `k` with dilation `d`, is `padding=[(q, q)]`,
    where `q = d * (k - 1) - p`; its `output_padding` is added to the second `q`.

    Arguments:
        path: of the Flax layer.
        transpose_kernel: as the Flax layer has it.
        groups: PyTorch's. `nn.ConvTranspose` has none: from 2 on, the layer at `path` is an
            `nn.Conv(..., strides=1, input_dilation=s, feature_group_count=groups)` for PyTorch's stride `s`. Where a
            group has several outputs, PyTorch's norm of an input is none over axes of that kernel: `to_flax` says so.
    """
    if groups > 1:
        kernel = Array(_in(path, "kernel"), "(groups i) o ... -> ... i (groups o)", {"groups": groups}, flip=True)
    elif transpose_kernel:
        kernel = Array(_in(path, "kernel"), "i o ... -> ... o i")
    else:
        kernel = Array(_in(path, "kernel"), "i o ... -> ... i o", flip=True)
    return {"weight": kernel, "bias": Array(_in(path, "bias"))}


def embedding(path: str) -> Layer:
    """`torch.nn.Embedding` as `nn.Embed` at `path`."""
    return {"weight": Array(_in(path, "embedding"))}


def norm(path: str) -> Layer:
    """`torch.nn.LayerNorm`, `GroupNorm` or `RMSNorm` as Flax's at `path`."""
    return {"weight": Array(_in(path, "scale")), "bias": Array(_in(path, "bias"))}


def batch_norm(path: str, stats: str) -> Layer:
    """`torch.nn.BatchNorm1d`, `2d` or `3d` as `nn.BatchNorm`: its parameters at `path`, its statistics at `stats`.

    `num_batches_tracked` has no place in Flax and is left out.
    """
    return {
        **norm(path),
        "running_mean": Array(_in(stats, "mean")),
        "running_var": Array(_in(stats, "var")),
        "num_batches_tracked": None,
    }


def lstm(path: str, layer: int = 0, reverse: bool = False) -> Layer:
    """One layer and direction of a `torch.nn.LSTM` as an `nn.LSTMCell` or `nn.OptimizedLSTMCell` at `path`.

    Of a deeper LSTM, `lstm("params/cell_0") | lstm("params/cell_1", layer=1)`. The gates are apart in Flax, and the
    two biases of PyTorch are one.
    """
    return _lstm_cell(path, _end(layer, reverse))


def lstm_cell(path: str) -> Layer:
    """A `torch.nn.LSTMCell` as an `nn.LSTMCell` or `nn.OptimizedLSTMCell` at `path`; as `lstm`."""
    return _lstm_cell(path, "")


def gru(path: str, layer: int = 0, reverse: bool = False) -> Layer:
    """One layer and direction of a `torch.nn.GRU` as an `nn.GRUCell` at `path`.

    Of a deeper GRU, `gru("params/cell_0") | gru("params/cell_1", layer=1)`. The gates are apart in Flax. Two of them
    have one bias there, the sum of PyTorch's; the third has both, as one of these is inside of a product.
    """
    return _gru_cell(path, _end(layer, reverse))


def gru_cell(path: str) -> Layer:
    """A `torch.nn.GRUCell` as an `nn.GRUCell` at `path`; as `gru`."""
    return _gru_cell(path, "")


def _end(layer: int, reverse: bool) -> str:
    """The end of the names in a recurrent module of PyTorch, where a cell has none."""
    return f"_l{layer}" + ("_reverse" if reverse else "")


def _lstm_cell(path: str, end: str) -> Layer:
    bias = [f"h{gate}" for gate in _LSTM_GATES]
    return _cell(path, end, _LSTM_GATES, bias, bias)


def _gru_cell(path: str, end: str) -> Layer:
    return _cell(path, end, _GRU_GATES, ["ir", "iz", "in"], ["ir", "iz", "hn"])


def _cell(path: str, end: str, gates: str, bias_ih: list[str], bias_hh: list[str]) -> Layer:
    """The arrays of a cell, each of which is shared out among the gates; and the layers that have the biases."""

    def shared(layers: Iterable[str], leaf: str, layout: str, add: bool = False) -> Array:
        return Array(tuple(_in(path, f"{layer}/{leaf}") for layer in layers), layout, {"gate": len(gates)}, add=add)

    return {
        f"weight_ih{end}": shared([f"i{gate}" for gate in gates], "kernel", "(gate o) i -> gate i o"),
        f"weight_hh{end}": shared([f"h{gate}" for gate in gates], "kernel", "(gate o) i -> gate i o"),
        f"bias_ih{end}": shared(bias_ih, "bias", "(gate o) -> gate o", add=True),
        f"bias_hh{end}": shared(bias_hh, "bias", "(gate o) -> gate o", add=True),
    }


def _in(path: str, name: str) -> str:
    """The path of a leaf of a layer, which may be the whole tree, at `""`."""
    return f"{path}/{name}" if path else name


def _axis_names(side: str, ndim: int) -> list[list[str]]:
    """The names that each axis of an array has in a side of a layout."""
    parts = re.findall(r"\([^)]*\)|\S+", side)
    dots = [[f"... {i}"] for i in range(ndim - len(parts) + 1)]
    names = [dots if part == "..." else [part.strip("()").split()] for part in parts]
    return [name for group in names for name in group]


def _reversed(leaf: ArrayOrNode) -> ArrayOrNode:
    """An array or node whose spatial axes run the other way."""
    return _map(lambda array: np.flip(array, tuple(range(2, array.ndim))), leaf)


def _map(fn: Callable[..., np.ndarray], *leaves: ArrayOrNode) -> ArrayOrNode:
    """A function of arrays on arrays, or on `g` and on `v` of nodes of the same axes."""
    nodes = [leaf for leaf in leaves if isinstance(leaf, WeightNorm)]
    if not nodes:
        return fn(*leaves)
    assert len(nodes) == len(leaves), "nodes and arrays are told apart by those who call this"
    return WeightNorm(fn(*(node.g for node in nodes)), fn(*(node.v for node in nodes)), nodes[0].axes)
