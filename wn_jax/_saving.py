"""`save` and `load`: parameter trees as `.safetensors` files, with the axes of their nodes.

A file holds each array under its path, `g` and `v` of a node as `.../kernel/g` and `.../kernel/v`, so that any reader
of safetensors can open it. Its metadata says which paths are nodes, and over which axes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wn_jax import _nnx_functional
from wn_jax._boxes import rebox, unbox
from wn_jax._node import WeightNorm, is_node
from wn_jax._safetensors import Content, read, write
from wn_jax._transform import flatten_with_keys, leaf_path


def save(path: str | os.PathLike[str], params: Any) -> None:
    """Write the arrays of a parameter tree, with nodes or without, to a `.safetensors` file.

    The file appears whole or not at all: it is written under another name (that begins with a dot) and renamed, so
    that a process that is killed leaves what was there before, and perhaps that other file.

    Arguments:
        path: the file. An existing one is replaced; its folder must exist.
        params: any pytree, or an NNX module. Leaves that are no arrays (the functions and numbers in an Equinox tree)
            are not saved; random keys are.

    Raises:
        ValueError: there is nothing to save; two leaves have one path; an array is abstract, traced, partly on
            devices of other processes (use Orbax), or of a dtype that the format does not hold.
        OSError: the file cannot be written.

    >>> import tempfile
    >>> params = {"kernel": WeightNorm.from_weight(jnp.array([[3.0], [4.0]]), -2)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/params.safetensors", params)
    ...     load(f"{folder}/params.safetensors")["kernel"]
    WeightNorm(g=Array([[5.]], dtype=float32), v=Array([[3.],
           [4.]], dtype=float32), axes=(-2,))
    """
    if isinstance(params, nnx.Module):
        _, params = _nnx_functional.split(params)
    content = Content()
    for keys, leaf in flatten_with_keys(params)[0]:
        names = [leaf_path((key,)) for key in keys]
        name = leaf_path(keys)
        for part, value in _parts(name, leaf):
            if part in content.arrays:
                raise ValueError(f"two leaves have the path {part!r}; rename one of the keys that contain '/'")
            content.arrays[part] = _to_numpy(part, value, content.keys)
            content.paths[name] = names
        if isinstance(leaf, WeightNorm):
            content.nodes[name] = leaf.axes
    if not content.arrays:
        raise ValueError("params hold no arrays, so there is nothing to save")
    write(Path(path), content)


def load(path: str | os.PathLike[str], target: Any = None) -> Any:
    """The tree that `save` wrote.

    Arguments:
        path: the file.
        target: a tree, or an NNX module, of the structure to return; its arrays may be abstract
            (`jax.eval_shape(lambda: wn_jax.reparameterize(model.init(key, x), axes))`). Arrays come back in the
            target's boxes and with its shardings, leaves that are no arrays come from the target, and all else must
            agree. Without a target, nested dicts come back, by the keys of the saved tree, without boxes.

    Returns:
        A new tree, with `WeightNorm` nodes where the saved one had them; of a module, a new module.

    Raises:
        ValueError: the file is cut off, was not written by `save`, or does not fit the target.
        OSError: the file cannot be read.
    """
    content = read(Path(path))
    if isinstance(target, nnx.Module):
        module = nnx.clone(target, graph=True)
        _nnx_functional.update(module, _into(_nnx_functional.split(target)[1], content, path))
        return module
    return _as_dicts(content) if target is None else _into(target, content, path)


def _parts(name: str, leaf: Any) -> list[tuple[str, Any]]:
    """The arrays of a leaf, by the names they have in a file: two of a node, none of a function or a number."""
    if isinstance(leaf, WeightNorm):
        parts = [(f"{name}/g", unbox(leaf.g)), (f"{name}/v", unbox(leaf.v))]
        if not all(_is_array(value) for _, value in parts):
            raise ValueError(f"{name!r} is a node that holds no arrays (labels, specs or masks), or another node")
        return parts
    if is_node(leaf):
        raise ValueError(f"{name!r} is a {type(leaf).__name__}; of nodes, a file can hold WeightNorm only")
    value = unbox(leaf)
    if value is not leaf and not _is_array(value):
        raise ValueError(
            f"{name!r} is a {type(leaf).__name__} around a {type(value).__name__}, and not around an array"
        )
    return [(name, value)] if _is_array(value) else []


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


def _to_numpy(name: str, value: Any, keys: dict[str, str]) -> np.ndarray:
    """The numbers of an array; of random keys their data, noting in `keys` of which kind they are."""
    if isinstance(value, (jax.ShapeDtypeStruct, jax.core.Tracer)):
        raise ValueError(f"{name!r} is abstract and holds no numbers; save outside of jit and eval_shape")
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        raise ValueError(
            f"{name!r} is partly on devices of other processes; save it with Orbax, which writes from each"
        )
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        keys[name] = str(jax.random.key_impl(value))
        value = jax.random.key_data(value)
    return np.asarray(value, order="C")


def _to_jax(name: str, content: Content, sharding: Any = None) -> jax.Array:
    value = content.arrays[name]
    if jax.dtypes.canonicalize_dtype(value.dtype) != value.dtype:
        raise ValueError(
            f"{name!r} is {value.dtype}, which JAX has with jax.config.update('jax_enable_x64', True) only"
        )
    array = jnp.asarray(value)
    if name in content.keys:
        array = jax.random.wrap_key_data(array, impl=content.keys[name])
    return array if sharding is None else jax.device_put(array, sharding)


def _as_dicts(content: Content) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, keys in content.paths.items():
        inner = tree
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
        if name in content.nodes:
            g, v = (_to_jax(f"{name}/{part}", content) for part in "gv")
            leaf: Any = WeightNorm(g, v, content.nodes[name])
        else:
            leaf = _to_jax(name, content)
        if not keys:
            return leaf
        inner[keys[-1]] = leaf
    return tree


def _into(target: Any, content: Content, path: Any) -> Any:
    pairs, treedef = flatten_with_keys(target)
    leaves = {leaf_path(keys): leaf for keys, leaf in pairs}
    if len(leaves) < len(pairs):
        raise ValueError("two leaves of the target have one path; rename one of the keys that contain '/'")
    problems = _problems(leaves, content)
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"{path} does not fit the target: {'; '.join(problems[:5])}{more}. Without a target, load(path) returns "
            "what the file holds, for you to adapt"
        )
    return jax.tree_util.tree_unflatten(treedef, [_filled(name, leaf, content) for name, leaf in leaves.items()])


def _problems(leaves: dict[str, Any], content: Content) -> list[str]:
    """What of the file does not fit the target, and the other way round."""
    problems, wanted = [], set()
    for name, leaf in leaves.items():
        axes = leaf.axes if isinstance(leaf, WeightNorm) else None
        parts = _parts(name, leaf)
        wanted |= {name for name, _ in parts}
        if (name in content.nodes) != (axes is not None) and (name in content.nodes or name in content.arrays):
            file, ours = ("a node", "a plain weight") if axes is None else ("a plain weight", "a node")
            remedy = "reparameterize the target" if axes is None else "load into the plain tree, then reparameterize"
            problems.append(f"{name!r} is {file} in the file and {ours} in the target ({remedy})")
            wanted |= {name, f"{name}/g", f"{name}/v"}
            continue
        if axes is not None and content.nodes.get(name, axes) != axes:
            saved = content.nodes[name]
            problems.append(f"the node {name!r} reduces over axes {saved} in the file and {axes} in the target")
        for part, value in parts:
            problems += _problem(part, value, content)
    superfluous = sorted(set(content.arrays) - wanted)
    return problems + [f"{name!r} is in the file, but not in the target" for name in superfluous]


def _problem(name: str, value: Any, content: Content) -> list[str]:
    if name not in content.arrays:
        return [f"{name!r} is in the target, but not in the file"]
    saved = content.arrays[name]
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        impl = content.keys.get(name, f"{saved.dtype} numbers")
        want, have = (str(value.dtype), value.shape), (f"key<{impl}>", saved.shape[:-1])
        return [] if want[1] == have[1] and name in content.keys else [f"{name!r} is {have} in the file, not {want}"]
    if saved.shape != value.shape:
        return [f"{name!r} has shape {saved.shape} in the file and {value.shape} in the target"]
    if saved.dtype != value.dtype or name in content.keys:
        kind = "random keys" if name in content.keys else saved.dtype
        return [f"{name!r} is {kind} in the file and {value.dtype} in the target"]
    return []


def _filled(name: str, leaf: Any, content: Content) -> Any:
    """A leaf of the target with the file's arrays."""
    if isinstance(leaf, WeightNorm):
        g, v = (_filled(f"{name}/{part}", child, content) for part, child in (("g", leaf.g), ("v", leaf.v)))
        return WeightNorm(g, v, leaf.axes)
    value = unbox(leaf)
    if not _is_array(value):
        return leaf
    # An array that sits where JAX put it, and was put nowhere, stays free to move.
    placed = getattr(value, "committed", True)
    return rebox(leaf, _to_jax(name, content, getattr(value, "sharding", None) if placed else None))
