"""Checkpoints in files: one `.safetensors` file, or several with an index, as Hugging Face writes large models.

This file owns which files make a checkpoint. How arrays are read from one is `_saving.file_format`'s.
"""

from __future__ import annotations

import collections
import json
import re
from pathlib import Path

import numpy as np

from wn_jax._saving.file_format import read_arrays
from wn_jax._saving.files import check_regular
from wn_jax._saving.kinds import is_index
from wn_jax._tree import listed

# A checkpoint in parts comes before its parts, also where it is a variant (diffusers' `.safetensors.index.fp16.json`).
_CHECKPOINTS = (re.compile(r".*\.safetensors\.index(\..+)?\.json"), re.compile(r".*\.safetensors"))
_LONGEST = 255  # bytes of a name, on the usual file systems


def read_checkpoint(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file, of all parts that an index names, or of the one checkpoint in a folder.

    Raises:
        ValueError: a file is cut off or something else; an index is none, names a part outside of its folder, or other
            arrays than its parts hold.
        OSError: a file cannot be read, or a part is missing; a folder holds no checkpoint, or several.
    """
    if path.is_dir():
        path = _checkpoint_in(path)
    check_regular(path)
    return _of_parts(path) if is_index(path) else read_arrays(path)


def _checkpoint_in(folder: Path) -> Path:
    """The one index in a folder, or its one file of arrays."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    for pattern in _CHECKPOINTS:
        found = [name for name in names if pattern.fullmatch(name)]
        if len(found) == 1:
            return folder / found[0]
        if found:
            raise IsADirectoryError(f"{folder} is a folder with several checkpoints in it; name one: {listed(found)}")
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    remedy = f"; {listed(pickles)} are pickles: {_OF_PICKLES}" if pickles else ""
    raise IsADirectoryError(f"{folder} is a folder without a .safetensors file in it; name the file{remedy}")


_OF_PICKLES = "load them with torch.load(path, weights_only=True), and pass the dict of tensors that is in them"


def _of_parts(index: Path) -> dict[str, np.ndarray]:
    """The arrays of all parts, which are read one after the other."""
    parts: dict[str, set[str]] = collections.defaultdict(set)
    for name, part in _weight_map(index).items():
        parts[part].add(name)
    arrays: dict[str, np.ndarray] = {}
    for part, names in sorted(parts.items()):
        file = index.parent / part
        if not file.exists():
            raise FileNotFoundError(
                f"{str(file)!r} is missing: {index} is the index of a checkpoint in parts, and names it"
            )
        found = read_arrays(file)
        if wrong := sorted(names ^ found.keys()):
            where = "index" if wrong[0] in names else "part"
            raise ValueError(
                f"{index}, the index of a checkpoint, and its part {part} do not have the same arrays: {wrong[0]!r} is "
                f"in the {where} only. Are they of one download?"
            )
        arrays |= found
    return arrays


def _weight_map(index: Path) -> dict[str, str]:
    """The part in which each array is, as an index says."""
    try:
        found = json.loads(index.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{index} is no index of a checkpoint in parts, but broken: {reason[:300]}") from None
    parts = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(parts, dict) or not parts or not all(isinstance(part, str) for part in parts.values()):
        raise ValueError(f"{index} is no index of a checkpoint in parts: it has no 'weight_map' from arrays to files")
    for part in set(parts.values()):
        if Path(part).name != part or part in ("", ".", "..") or "\0" in part or len(part) > _LONGEST:
            raise ValueError(f"{index}, the index of a checkpoint, names a part that is not beside it: {part[:300]!r}")
        if part.endswith(".bin"):
            raise ValueError(f"{index} is the index of parts that are pickles of PyTorch: {_OF_PICKLES}")
    return parts
