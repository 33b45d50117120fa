"""`save` and `load`: parameter trees as `.safetensors` files, with the axes of their nodes.

A file holds each array under its path, `g` and `v` of a node as `.../kernel/g` and `.../kernel/v`, so that any reader
of safetensors can open it. Its metadata says which paths are nodes, and over which axes.

This file owns which leaves go into a file, how they come out of it, and whether it fits a target. The parts of one leaf
are `_saved_nodes`'s; how a file is written and read is `_safetensors`'s.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding

from wn_jax._node import Node, WeightNorm
from wn_jax._safetensors import File, opened, write
from wn_jax._saved_facts import Facts, Other, as_dicts, of_node
from wn_jax._saved_nodes import Number, Value, filled, is_number, nodes_of, note_nodes, other_of, parts_of
from wn_jax._tree import check_has_numbers, flatten_with_keys, is_array, leaf_path, sharding_of
from wn_jax._types import Leaf, Params


def save(path: str | os.PathLike[str], params: Params) -> None:
    """Write the arrays of a parameter tree, with nodes or without, to a `.safetensors` file.

    The file appears whole or not at all: it is written in a folder beside it (whose name begins with a dot) and then
    moved. A process that is killed leaves what was there before, and perhaps that folder, which the next `save` to the
    same path removes.

    Arguments:
        path: the file. An existing one is replaced; its folder must exist.
        params: any pytree, or an NNX module. Arrays, random keys and the numbers of Python are saved, in nodes of any
            type and in nodes within nodes, too. Other leaves (the functions in an Equinox tree) are not.

    Raises:
        ValueError: there is nothing to save; two leaves have one path; an array is abstract, traced, partly on
            devices of other processes (use Orbax), or of a dtype that the format does not hold.
        TypeError: `path` is no path.
        OSError: the file cannot be written, or `path` is a device, a FIFO, a socket or a folder, which stays as it is.

    >>> import tempfile
    >>> params = {"kernel": WeightNorm.from_weight(jnp.array([[3.0], [4.0]]), -2)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/params.safetensors", params)
    ...     load(f"{folder}/params.safetensors")["kernel"]
    WeightNorm(g=Array([[5.]], dtype=float32), v=Array([[3.],
           [4.]], dtype=float32), axes=(-2,))
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"the first argument is the path of the file; got a {type(path).__name__}: save(path, params)")
    if isinstance(params, nnx.Module):
        _, params = _for_modules().split(params)
    write(Path(path), *_content_of(params))


def load(path: str | os.PathLike[str], target: Params = None) -> Params:
    """The tree that `save` wrote.

    With a target, paths, types of nodes, axes, shapes and dtypes must agree with it. Arrays come back in its boxes and
    with its shardings, and leaves that are neither arrays nor numbers come from it. Without a target, nested dicts come
    back, by the keys of the saved tree, without boxes. Arrays are read one by one, so that it takes the memory of the
    tree and of one array more.

    Arguments:
        path: the file.
        target: a tree, or an NNX module, of the structure to return; its arrays may be abstract
            (`jax.eval_shape(lambda: wn_jax.reparameterize(model.init(key, x), axes))`).

    Returns:
        A new tree, with `WeightNorm` nodes where the saved one had them; of a module, a new module. Nodes of other
        types come back into a target only.

    Raises:
        ValueError: the file is cut off, was not written by `save`, or does not fit the target; there is no target, and
            the file has a node of another type than `WeightNorm`, which is named.
        OSError: the file cannot be read, or is no regular file.
    """
    with opened(Path(path)) as file:
        if target is None:
            return as_dicts((keys, _leaf(name, file)) for name, keys in file.facts.paths.items())
        if not isinstance(target, nnx.Module):
            return _into(target, file, path)
        _, state = _for_modules().split(target)
        filled = _into(state, file, path)
    module = nnx.clone(target, graph=True)
    _for_modules().update(module, filled)
    return module


def _for_modules() -> ModuleType:
    """The functions that take nodes out of NNX modules and put them back."""
    # Imported when it is touched, as in `wn_jax` itself: who saves other trees does not wait for it.
    from wn_jax import nnx as functions

    return functions


# Into a file: the leaves of a tree as named arrays and numbers.


def _content_of(params: Params) -> tuple[Facts, dict[str, np.ndarray]]:
    """The facts and arrays that a file holds of these parameters."""
    facts, arrays, taken = Facts(), {}, set()
    for keys, leaf in flatten_with_keys(params)[0]:
        name = leaf_path(keys)
        values = parts_of(name, leaf)
        names = {name, *values, *nodes_of(name, leaf)}
        if names & taken:
            raise ValueError(f"two leaves have the path {name!r}; rename one of the keys that contain '/'")
        if values:
            facts.paths[name] = [leaf_path((key,)) for key in keys]
            taken |= names
        note_nodes(name, leaf, values, facts)
        for part, value in values.items():
            if is_number(value):
                facts.numbers[part] = _checked_number(part, value)
            else:
                arrays[part] = _to_numpy(part, value, facts.keys)
    if not arrays:
        raise ValueError("params hold no arrays, so there is nothing to save")
    as_dicts((keys, None) for keys in facts.paths.values())  # raises where keys that differ have one name
    return facts, arrays


def _checked_number(name: str, number: Number) -> Number:
    """The number itself. Raises where it has more digits than Python reads."""
    try:
        str(number)
    except ValueError as error:
        raise ValueError(f"{name!r} is an int that no file can hold: {error}") from None
    return number


def _to_numpy(name: str, value: Value, keys: dict[str, str]) -> np.ndarray:
    """The numbers of an array; of random keys their data, noting in `keys` of which kind they are."""
    check_has_numbers(name, value)
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        keys[name] = str(jax.random.key_impl(value))
        value = jax.random.key_data(value)
    return np.asarray(value, order="C")


# Out of a file: as nested dicts, or in the places of a target's leaves.


def _leaf(name: str, file: File) -> Number | WeightNorm | jax.Array:
    """The number, node or array of this name.

    Raises:
        ValueError: it is a node of another type than `WeightNorm`.
    """
    if name in file.facts.numbers:
        return file.facts.numbers[name]
    if name in file.facts.nodes:
        g, v = (_leaf(part, file) for part in of_node(name))
        return WeightNorm(g, v, file.facts.nodes[name])
    if name in file.facts.others:
        raise ValueError(
            f"{name!r} is a node of the type {file.facts.others[name]}, which load cannot make without a target; give "
            "it a tree that has such a node there (jax.eval_shape makes one without numbers)"
        )
    return _to_jax(name, file)


def _to_jax(name: str, file: File, sharding: Sharding | None = None) -> jax.Array:
    """An array where it must go, or where JAX puts it."""
    dtype = file.shapes[name].dtype
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"{name!r} is {dtype}, which JAX has with jax.config.update('jax_enable_x64', True) only")
    value = file.read(name)
    if name in file.facts.keys:
        keys = jax.random.wrap_key_data(jnp.asarray(value), impl=file.facts.keys[name])
        return keys if sharding is None else jax.device_put(keys, sharding)
    # At once to where it must go, as one device may not have room for all of it; and `jnp.asarray` makes a copy more.
    array = jax.device_put(value, sharding)
    return array.block_until_ready()  # until then, what was read stays in memory, and the next would come beside it


def _into(target: Params, file: File, path: str | os.PathLike[str]) -> Params:
    """A tree like the target, with the numbers of the file."""
    pairs, treedef = flatten_with_keys(target)
    leaves = {leaf_path(keys): leaf for keys, leaf in pairs}
    if len(leaves) < len(pairs):
        raise ValueError("two leaves of the target have one path; rename one of the keys that contain '/'")
    _check_fits(path, leaves, file)
    return jax.tree.unflatten(treedef, [_filled(name, leaf, file) for name, leaf in leaves.items()])


def _filled(name: str, leaf: Leaf, file: File) -> Leaf:
    """A leaf of the target with what the file has."""
    return filled(leaf, {part: _placed(part, value, file) for part, value in parts_of(name, leaf).items()}, name)


def _placed(name: str, value: Value, file: File) -> jax.Array | np.ndarray | Number:
    """The number or array of this name, of the kind and in the place of the target's `value`."""
    if name in file.facts.numbers:
        number = file.facts.numbers[name]
        return jnp.asarray(number, value.dtype) if is_array(value) else number
    if is_number(value):
        return file.read(name).item()
    if isinstance(value, (np.ndarray, np.generic)):
        return file.read(name).astype(value.dtype, copy=False)  # in its byte order
    return _to_jax(name, file, sharding_of(value))


# Whether a file fits a target.


def _check_fits(path: str | os.PathLike[str], leaves: Mapping[str, Leaf], file: File) -> None:
    """Raises, naming the first few of all reasons, unless a file has just these leaves."""
    problems = [problem for name, leaf in leaves.items() for problem in _problems(name, leaf, file)]
    known = {name for name, leaf in leaves.items() if parts_of(name, leaf)}
    problems += [f"{name!r} is in the file, but not in the target" for name in sorted(set(file.facts.paths) - known)]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"{path} does not fit the target: {'; '.join(problems[:5])}{more}. Without a target, load(path) returns "
            "what the file holds, for you to adapt"
        )


def _problems(name: str, leaf: Leaf, file: File) -> list[str]:
    """In what a leaf of the target differs from the file's."""
    values = parts_of(name, leaf)
    if not values:
        return []
    if name not in file.facts.paths:
        return [f"{name!r} is in the target, but not in the file"]
    if problem := _node_problem(name, leaf, file.facts):
        return [problem]
    saved = file.facts.parts_of(name)
    if of_one := sorted(set(saved) ^ set(values)):
        return [f"{of_one[0]!r} is in the {'file' if of_one[0] in saved else 'target'} only"]
    differences = (_difference(part, value, file) for part, value in values.items())
    return [difference for difference in differences if difference]


def _node_problem(name: str, leaf: Leaf, facts: Facts) -> str | None:
    """In what the nodes at a leaf of the target differ from the file's, or None."""
    ours = {path: _kind_of(node) for path, node in nodes_of(name, leaf).items()}
    theirs = facts.kinds_at(name)
    if name in ours and name not in theirs:
        return (
            f"{name!r} is a plain weight in the file and a node in the target (load into the plain tree, then "
            "reparameterize)"
        )
    if name in theirs and name not in ours:
        return f"{name!r} is a node in the file and a plain weight in the target (reparameterize the target)"
    for path in sorted(ours.keys() | theirs.keys()):
        saved, wanted = theirs.get(path), ours.get(path)
        if isinstance(saved, tuple) and isinstance(wanted, tuple) and saved != wanted:
            return f"the node {path!r} reduces over axes {saved} in the file and {wanted} in the target"
        if saved != wanted:
            return f"{path!r} is {_described(saved)} in the file and {_described(wanted)} in the target"
    return None


def _kind_of(node: Node) -> tuple[int, ...] | Other:
    """The kind of a node, as `Facts.kinds_at` has it."""
    return node.axes if isinstance(node, WeightNorm) else other_of(node)


def _described(kind: tuple[int, ...] | Other | None) -> str:
    """A kind of node, for a message."""
    if kind is None:
        return "no node"
    return f"a WeightNorm over the axes {kind}" if isinstance(kind, tuple) else f"the node {kind}"


def _difference(name: str, value: Value, file: File) -> str | None:
    """In what an array or number of the target differs from the file's, or None."""
    ours, theirs = _saved_kind(name, file), _kind(value)
    first, second = sorted((ours, theirs))
    # `jit` makes an array without axes of a number.
    if ours != theirs and not (first == "a number" and second.endswith("[]") and not second.startswith("key<")):
        return f"{name!r} is {ours} in the file and {theirs} in the target"
    number = file.facts.numbers.get(name)
    if number is not None and is_array(value) and not _holds(value.dtype, number):
        return f"{name!r} is {number!r} in the file, which {theirs} of the target cannot hold"
    return None


def _holds(dtype: np.dtype, number: Number) -> bool:
    """Whether an array of this dtype can hold a number of Python. Rounding is allowed, and losing it is not."""
    if isinstance(number, float):
        return jnp.issubdtype(dtype, np.inexact)
    try:
        return bool(np.asarray(number, np.int64).astype(dtype) == number)
    except OverflowError:
        return False


def _kind(value: Value) -> str:
    # A dtype's name is the same in either byte order.
    return f"{value.dtype.name}{list(value.shape)}" if is_array(value) else "a number"


def _saved_kind(name: str, file: File) -> str:
    if name in file.facts.numbers:
        return "a number"
    array = file.shapes[name]
    if name not in file.facts.keys:
        return _kind(array)
    # The shape of keys is not that of their data, which has one axis more.
    return _kind(jax.eval_shape(lambda data: jax.random.wrap_key_data(data, impl=file.facts.keys[name]), array))
