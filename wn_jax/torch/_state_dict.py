"""State dicts of PyTorch as nested trees with nodes, and back: the two key schemes of weight normalization.

`torch.nn.utils.weight_norm` (old) keeps `weight_g` and `weight_v`, `torch.nn.utils.parametrizations.weight_norm` (new)
`parametrizations.weight.original0` and `.original1`. Nothing but the shape of `g` says over which axes the norm runs.

This file owns whole state dicts and their nesting. Trees stay in PyTorch's layout here; Flax's is `_flax`'s.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from wn_jax._boxes import unbox
from wn_jax._node import WeightNorm, check_shapes, is_node
from wn_jax._tree import check_has_numbers, flatten_with_keys, is_array, leaf_path
from wn_jax._types import Leaf, Params
from wn_jax.torch._arrays import ArrayOrNode, arrays_of, cast, native
from wn_jax.torch._pairs import Dims, Pair, Scheme, check_known, find_pairs, half_names, node_of
from wn_jax.torch._spectral import find_spectral_norms, folded


def from_state_dict(
    state: Mapping[str, Leaf] | str | os.PathLike[str],
    dim: Dims | None = None,
    plain: Collection[str] = (),
    fold_spectral: bool = False,
) -> dict[str, Params]:
    """A state dict as a tree, nested at the dots of its names, with a `WeightNorm` node for each normalized weight.

    Nothing is lost: weights keep PyTorch's layout, and `to_state_dict` returns the same numbers under the same names.
    Both schemes are understood, and any mixture. Of names in the old scheme, `x_g` and `x_v` make a pair only where
    both are there (VITS has `emb_rel_v` alone).

    Arguments:
        state: a mapping from names to torch tensors, NumPy or JAX arrays; or the path of a `.safetensors` file, of the
            index of a checkpoint in parts (`model.safetensors.index.json`), or of a folder that holds one of these.
        dim: PyTorch's `dim` (the axis that `g` is for) of weights for which the shape of `g` leaves it open, as where
            a convolution has one input and one output: one for all of them, or a dict from the weight's name
            (`'decoder.conv.weight'`). It is not needed, as the weight is the same for each. For spectral norms of
            square weights it is.
        plain: names of weights whose halves stay two plain arrays, as they only look like a pair.
        fold_spectral: whether weights under PyTorch's spectral norm, in either scheme, become plain weights: those that
            PyTorch computes in evaluation. Else their three arrays stay, under their names.

    Returns:
        Nested dicts of NumPy arrays. They share memory with the tensors, where those are on the CPU: training the
        PyTorch model further changes them. (`to_flax` and `to_state_dict` make copies.)

    Raises:
        ValueError: half of a pair is missing, or of a spectral norm that is to be folded; a weight is there twice, in
            two schemes or also folded; `g` fits no `dim`, or a spectral norm several; a half is no floating-point
            array, has NaN or infinity, or another dtype than the other; a file is cut off, or of another kind, which is
            named; parts and their index do not have the same arrays; a value is no array.
        TypeError: `state` is neither a mapping of names nor a path; `dim` or `plain` is of a wrong type.
        OSError: a file cannot be read, or a part is missing; a folder holds no checkpoint, or several.

    >>> state = {"conv.weight_g": np.ones((6, 1, 1)), "conv.weight_v": np.ones((6, 4, 3)), "conv.bias": np.zeros(6)}
    >>> tree = from_state_dict(state)
    >>> tree["conv"]["weight"].axes, tree["conv"]["bias"].shape
    ((-2, -1), (6,))
    >>> list(to_state_dict(tree))
    ['conv.bias', 'conv.parametrizations.weight.original0', 'conv.parametrizations.weight.original1']
    """
    arrays = arrays_of(state)
    if not isinstance(dim, Mapping | int | None):
        raise TypeError(f"dim is an int, or a dict from names to ints; got {dim!r}")
    norms = find_spectral_norms(arrays, complete=True) if fold_spectral else []
    if norms:
        arrays = folded(arrays, norms, dim)
    pairs = find_pairs(arrays, plain)
    check_known(dim if isinstance(dim, Mapping) else (), {*pairs, *(norm.weight for norm in norms)})
    return nested(_with_nodes(arrays, pairs.values(), dim))


def to_state_dict(tree: Params, scheme: Scheme | Callable[[str], Scheme] = "new") -> dict[str, np.ndarray]:
    """The state dict of a tree in PyTorch's layout: what `from_state_dict` or `from_flax` returned, trained or not.

    Arguments:
        tree: nested dicts, or another pytree whose paths are PyTorch's names. Of `wn_jax.reconstruct(tree)`, one gets
            the state dict of a model without weight normalization.
        scheme: the names of a node's halves: `"new"` for modules of `torch.nn.utils.parametrizations.weight_norm`
            (PyTorch 2.0), `"old"` for those of `torch.nn.utils.weight_norm`, or a function of the weight's name that
            returns one of them. Modules of the new style load both.

    Returns:
        NumPy arrays of their own, for `torch.from_numpy` or `safetensors.numpy.save_file`; PyTorch reads bfloat16 and
        float8 from such a file only (`safetensors.torch.load_file`). `g` is rounded to the dtype of `v`, as PyTorch
        keeps both in one.

    Raises:
        ValueError: a node keeps other axes than one or none (PyTorch's `dim`), its shapes do not fit, or `g` is too
            large for the dtype of `v`; two leaves get one name; a leaf is abstract, or no array of numbers.
    """
    state: dict[str, np.ndarray] = {}
    for name, leaf in leaves_by_name(tree).items():
        for half, value in _halves(name, as_numpy(name, leaf), scheme).items():
            if half in state:
                raise ValueError(f"two leaves of the tree get the name {half!r}; rename one of them")
            state[half] = np.array(value, order="C")
    return state


def leaves_by_name(tree: Params) -> dict[str, Leaf]:
    """The leaves of a tree by their names in a state dict: their keys with dots between."""
    leaves: dict[str, Leaf] = {}
    for keys, leaf in flatten_with_keys(tree)[0]:
        name = ".".join(leaf_path((key,)) for key in keys)
        if name in leaves:
            raise ValueError(f"two leaves of the tree get the name {name!r}; rename one of them")
        leaves[name] = leaf
    return leaves


def as_numpy(name: str, leaf: Leaf) -> ArrayOrNode:
    """A leaf, an array or a node, with NumPy arrays in it, which may share memory with it."""
    if isinstance(leaf, WeightNorm):
        node = dataclasses.replace(leaf, g=as_numpy(f"{name}/g", leaf.g), v=as_numpy(f"{name}/v", leaf.v))
        try:
            check_shapes(node.g.shape, node.v.shape, node.axes)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from None
        return node
    value = unbox(leaf)
    if is_node(value) or not is_array(value) or jnp.issubdtype(value.dtype, jax.dtypes.extended):
        kind = value.dtype if is_array(value) else type(value).__name__
        raise ValueError(f"{name!r} is of type {kind}, not an array of numbers; leave it out")
    check_has_numbers(name, value)
    return native(np.asarray(value))


def nested(leaves: Mapping[str, ArrayOrNode]) -> dict[str, Params]:
    """Dicts in dicts, of leaves whose names have dots."""
    tree: dict[str, Params] = {}
    for name, leaf in leaves.items():
        *modules, last = name.split(".")
        inner = tree
        for module in modules:
            inner = inner.setdefault(module, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{name!r} is inside of another leaf of the state dict; rename one of them")
        if last in inner:
            raise ValueError(f"{name!r} is a leaf, and other leaves of the state dict are inside of it; rename it")
        inner[last] = leaf
    return tree


def _with_nodes(arrays: Mapping[str, np.ndarray], pairs: Collection[Pair], dim: Dims | None) -> dict[str, ArrayOrNode]:
    """The arrays, with a node by the weight's name in the place of each pair."""
    leaves: dict[str, ArrayOrNode] = dict(arrays)
    for pair in pairs:
        del leaves[pair.g], leaves[pair.v]
        if pair.weight in leaves:
            raise ValueError(
                f"{pair.weight!r} is in the state dict, and so are its halves {pair.g!r} and {pair.v!r}; leave out the "
                f"one or the others, or take the halves as plain arrays: plain=[{pair.weight!r}]"
            )
        leaves[pair.weight] = node_of(pair, arrays[pair.g], arrays[pair.v], dim)
    return leaves


def _halves(name: str, leaf: ArrayOrNode, scheme: Scheme | Callable[[str], Scheme]) -> dict[str, np.ndarray]:
    """The arrays of a leaf by their names in a state dict."""
    if not isinstance(leaf, WeightNorm):
        return {name: leaf}
    g, v = leaf.g, leaf.v
    kept = [axis for axis in range(v.ndim) if axis - v.ndim not in leaf.axes]
    if sum(g.shape[axis] > 1 for axis in kept) > 1:  # axes of size 1 leave PyTorch's dim open, and the weight the same
        raise ValueError(
            f"{name!r} has a norm for each place along the axes {kept} of its shape {v.shape}; PyTorch's weight norm "
            "keeps one axis (dim), or none. wn_jax.reconstruct the tree to export weights"
        )
    names = half_names(name, scheme(name) if callable(scheme) else scheme)
    try:
        g = cast(g, v.dtype).reshape(g.shape if kept else ())
    except ValueError as error:
        raise ValueError(f"{name!r}: g {error}, the dtype of v; PyTorch keeps both in one") from None
    return dict(zip(names, (g, v), strict=True))
