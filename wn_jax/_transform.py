"""The four verbs on a parameter tree: `reparameterize`, `reconstruct`, `kernel_axes`, `labels`.

This file owns the choice of leaves and the errors about it. Paths and leaves are `_tree`'s; what a node computes is
`_node`'s.
"""

from __future__ import annotations

import collections
import dataclasses
import warnings
from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.core
import jax.numpy as jnp

from wn_jax._boxes import unbox
from wn_jax._foreign import hints
from wn_jax._node import WeightNorm, is_node
from wn_jax._tree import abstract_weight, check_is_leaf, filled, flatten, has_nodes, listed, rebuild, unknown_paths
from wn_jax._types import Axes, AxesRule, Leaf, Params, PyTree

Tree = TypeVar("Tree")


def reparameterize(params: Params, axes: AxesRule) -> Params:
    """A copy of `params` in which the chosen weights are `WeightNorm` nodes, of the same function.

    Arguments:
        params: any pytree of arrays, such as Flax variables, an `nnx.State`, an Equinox module, a `TrainState`.
            Leaves may be boxed (`nn.Partitioned`, `nnx.Param`): the box moves inside, around `g` and around `v`.
        axes: which leaves, and over which axes their norm runs: a dict from leaf path to axes (`kernel_axes` makes
            one), or a function `(path, leaf) -> axes or None` that is asked about every leaf, boxes removed. A path
            is what `jax.tree_util.keystr(path, simple=True, separator="/")` writes, `"params/Dense_0/kernel"`,
            without the key of a box. `None` leaves a weight alone.

    Returns:
        A new tree. It goes through `jax.tree`, optax, Orbax and `flax.serialization` as any other; models need
        `wrap(model.apply)` or `reconstruct` to see weights in it.

    Warns:
        UserWarning: float16 weights with vectors of zeros (a LoRA's B, a head that starts at zero), or of a single
            number. The gradient of such a `v` is exactly 0, and the default `eps` of Adam and its like, 1e-8, is 0 in
            float16: the first step divides 0 by 0. Give `eps=1e-4`, or keep parameters in float32 and compute in
            float16. In `jit`, where numbers are not known, there is no warning.

    Raises:
        ValueError: nothing matches; a path is unknown or names two leaves; an axis is out of range; a leaf is an
            integer or complex array, not an array, or already a node.
        TypeError: `axes` is neither a mapping nor a function; a leaf is an object around an array, as Keras has.

    >>> import jax.numpy as jnp
    >>> params = {"Dense_0": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
    >>> nodes = reparameterize(params, {"Dense_0/kernel": -2})
    >>> nodes["Dense_0"]["kernel"].g.shape
    (1, 2)
    """
    paths, leaves, treedef = flatten(params)
    _check_is_tree(params, paths)
    chosen = _choose(axes, paths, leaves)
    if not chosen:
        raise ValueError(
            f"axes match no leaf of params, so nothing would be reparameterized. Its leaves are {listed(paths)}. "
            "wn_jax.kernel_axes(params) finds those named 'kernel'; for others give a dict {path: axes} or a function. "
            "wn_jax.weight_uses(fn)(params, ...) says why infer_axes left a leaf alone."
            + "".join(f" {hint}" for hint in hints(params))
        )
    duplicates = [path for path, count in collections.Counter(paths).items() if count > 1 and path in chosen]
    if duplicates:
        raise ValueError(
            f"two leaves of params have the path {duplicates[0]!r}; rename one of the keys that contain '/'"
        )
    nodes = {
        path: _node_of(path, leaf, chosen[path]) for path, leaf in zip(paths, leaves, strict=True) if path in chosen
    }
    _warn_of_adam([path for path, node in nodes.items() if _gives_adam_nan(node)])
    return treedef.unflatten(nodes.get(path, leaf) for path, leaf in zip(paths, leaves, strict=True))


def reconstruct(tree: Tree) -> Tree:
    """The plain tree: every node replaced by its weight, innermost first. Inside or outside `jit`.

    Fold a trained model with it once, for serving or export; `wrap` does it in each call. A tree without nodes
    comes back as it is. On gradients, optimizer moments or other trees of the same structure the result is
    meaningless: `g` and `v` are then no magnitude and direction. (`wn_jax.optim.transfer_state` converts moments.)

    Raises:
        ValueError: from a node whose shapes do not fit.
        TypeError: from a node that holds no arrays.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.ones((3, 2))}
    >>> reconstruct(reparameterize(params, kernel_axes(params)))["kernel"].shape
    (3, 2)
    """
    if not has_nodes(tree):
        return tree  # itself, with containers that JAX would make anew
    return jax.tree.map(rebuild, tree, is_leaf=is_node)


def kernel_axes(params: Params) -> dict[str, tuple[int, ...]]:
    """Axes by Flax's naming: each leaf named `kernel` with two axes or more, reduced over all of them but the last.

    Right for `nn.Dense` and `nn.Conv`, and a guess from a name. It is wrong for attention projections
    (`nn.MultiHeadDotProductAttention` has query kernels of `(features, heads, head_features)`, which reduce over
    the first axis only), for `nn.ConvTranspose(transpose_kernel=True)` (the output features are the last axis but
    one), and for layers stacked by `nn.scan` or `nn.vmap` (the leading axis counts copies, each with a norm of its
    own). Edit the dict for those: `axes[path] = (-3,)`.

    >>> import jax.numpy as jnp
    >>> kernel_axes({"Conv_0": {"kernel": jnp.ones((3, 3, 16, 32)), "bias": jnp.zeros(32)}})
    {'Conv_0/kernel': (-4, -3, -2)}
    """
    paths, leaves, _ = flatten(params)
    kernels = [(path, leaf) for path, leaf in zip(paths, leaves, strict=True) if _is_kernel(path, leaf)]
    ranks = {path: jnp.ndim(_array_of(leaf)) for path, leaf in kernels}
    return {path: tuple(range(-rank, -1)) for path, rank in ranks.items() if rank >= 2}


def labels(params: PyTree) -> PyTree:
    """The structure of `params` with `'g'`, `'v'` or `'other'` at each leaf, for `optax.partition` and masks.

    Works on every tree of that structure, gradients and shapes included.

    >>> import jax.numpy as jnp
    >>> labels({"kernel": WeightNorm(jnp.ones((1, 2)), jnp.ones((3, 2)), (-2,)), "bias": jnp.zeros(2)})
    {'bias': 'other', 'kernel': WeightNorm(g='g', v='v', axes=(-2,))}
    """

    def label(x: Leaf) -> Leaf:
        if isinstance(x, WeightNorm):
            return dataclasses.replace(x, g=filled(x.g, "g"), v=filled(x.v, "v"))  # a half may be in a box
        return "other"

    return jax.tree.map(label, params, is_leaf=lambda x: isinstance(x, WeightNorm))


def _gives_adam_nan(node: WeightNorm) -> bool:
    """Whether 1e-8, which Adam adds to a root, is 0 in the dtype of `v`, and some gradients of `v` are exactly 0."""
    g, v = unbox(node.g), unbox(node.v)
    if isinstance(v, jax.core.Tracer) or jnp.asarray(1e-8, v.dtype) != 0:
        return False
    # A vector of one number has no direction to change but its sign.
    return g.size == v.size or bool(jnp.any(g == 0))


def _warn_of_adam(paths: list[str]) -> None:
    if paths:
        warnings.warn(
            f"{listed(paths)}: vectors of zeros (or of one number) in a dtype in which 1e-8 is 0, such as float16. The "
            "gradient of their v is exactly 0, and Adam and its like, with the default eps=1e-8, divide 0 by 0 in "
            "the first step. Give eps=1e-4 (optax.adam(rate, eps=1e-4)), or keep the parameters in float32 and compute "
            "in float16. SGD and Lion are not concerned.",
            UserWarning,
            stacklevel=3,
        )


def _check_is_tree(params: Params, paths: list[str]) -> None:
    """Raises where the parameters are one leaf that is no array: a Linen module, or a function."""
    array = unbox(params)
    if paths == [""] and not is_node(params) and not hasattr(array, "shape"):
        raise ValueError(
            f"params is a {type(array).__name__}, and no tree of arrays. Of a Flax or Haiku model, pass the parameters "
            "that model.init(key, x) returns: reparameterize(params, axes)"
        )


def _choose(axes: AxesRule, paths: list[str], leaves: list[Leaf]) -> dict[str, Axes]:
    """The axes of each leaf that was chosen."""
    if isinstance(axes, Mapping):
        unknown = [path for path in axes if path not in paths]
        if unknown:
            raise ValueError(unknown_paths("axes name", unknown, paths))
        answers = list(axes.items())
    elif axes is kernel_axes:
        raise TypeError("axes is the function kernel_axes; call it: reparameterize(params, kernel_axes(params))")
    elif callable(axes):
        answers = [(path, axes(path, _array_of(leaf))) for path, leaf in zip(paths, leaves, strict=True)]
    else:
        raise TypeError(
            "axes must be a dict from leaf path to axes, or a function (path, leaf) -> axes or None; got "
            f"{type(axes).__name__}"
        )
    return {path: answer for path, answer in answers if answer is not None}


def _array_of(leaf: Leaf) -> Leaf:
    """The leaf as a rule over leaves sees it: the value in a box; of a node the shape and dtype of its weight."""
    if isinstance(leaf, WeightNorm):
        return _array_of(leaf.v)
    return unbox(abstract_weight(leaf)[0]) if is_node(leaf) else unbox(leaf)


def _is_kernel(path: str, leaf: Leaf) -> bool:
    return path.rsplit("/", 1)[-1] == "kernel" and hasattr(_array_of(leaf), "shape")


def _node_of(path: str, leaf: Leaf, axes: Axes) -> WeightNorm:
    """The node for one leaf, or an error that says which leaf is meant."""
    array = unbox(leaf)
    check_is_leaf(path, leaf)
    if is_node(leaf):
        raise ValueError(
            f"{path!r} is already a {type(leaf).__name__} node; leave it out of axes, or reconstruct(params) first"
        )
    if not (hasattr(array, "shape") and hasattr(array, "dtype")):
        raise ValueError(f"{path!r} is a {type(array).__name__}, not an array, and has no norm; leave it out of axes")
    if not getattr(array.dtype, "isnative", True):  # random keys have dtypes of JAX's own
        raise ValueError(
            f"{path!r} is in another byte order ({array.dtype.str}) than JAX takes; cast it: x.astype(x.dtype.name)"
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"{path!r} has shape {array.shape} and dtype {array.dtype}, but weight normalization needs real "
            "floating-point numbers; leave it out of axes"
        )
    try:
        return WeightNorm.from_weight(leaf, axes)
    except (ValueError, TypeError) as error:
        if isinstance(array, jax.ShapeDtypeStruct):
            raise ValueError(
                f"{path!r} is abstract; use jax.eval_shape(lambda p: reparameterize(p, axes), params)"
            ) from error
        raise ValueError(f"{path!r} cannot be reparameterized: {error}") from error
