"""Saving states and coming back to them: in the background, atomic, and checked against damage.

Orbax writes each checkpoint to a folder, which gets its name when it is complete, and of several processes each writes
what its devices hold. Beside the arrays lies a checksum of each, since a damaged file may still be readable.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from experiments import processes
from experiments.errors import RunError

# Orbax tells of every step of a save, and asyncio of each array that could not be written; what fails, Orbax raises.
for _name in ("absl", "asyncio"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)

CHECKPOINTS = "checkpoints"
"""The name of their folder in the run folder."""

_WAIT = 300  # seconds that a process waits for what the others have to write
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a checkpoint that is being written
_LEFT = ".left-"  # how the name of such a one begins once it is out of the way
_PAUSES = (0.0, 0.1, 0.4, 1.5)  # seconds before each try to remove it


class Checkpoints:
    """The checkpoints of a run, by step; the newest `keep` of them are kept."""

    def __init__(self, path: Path, keep: int) -> None:
        _hush()
        self.path = path.absolute()
        waiting = ocp.AsyncOptions(timeout_secs=_WAIT)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, async_options=waiting)
        self._arrays = ocp.PyTreeCheckpointHandler()
        with processes.together():  # before any of them writes here
            if processes.first():
                _clear(self.path)
        with self._errors("cannot be opened"):
            self._manager = ocp.CheckpointManager(self.path, options=options)

    def steps(self) -> list[int]:
        """The steps of what is saved, the newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def last(self) -> Path | None:
        """The newest, once all that is being saved is there."""
        with self._errors("cannot be written"):
            self._manager.wait_until_finished()
        return self.path / str(self.steps()[0]) if self.steps() else None

    def save(self, step: int, tree: Any) -> None:
        """Save a tree of arrays that nobody will change, in the background.

        Raises:
            RunError: it cannot be written, or the one before could not.
        """
        arrays = _named(tree)
        contents = ocp.args.Composite(
            state=ocp.args.PyTreeSave(arrays), about=ocp.args.JsonSave({"step": step, "checksums": _checksums(arrays)})
        )
        with self._errors("cannot be written"):
            self._manager.save(step, args=contents)

    def restore(self, like: Any, accept: Callable[[int], str | None]) -> tuple[int | None, Any, list[str]]:
        """The newest checkpoint that is whole.

        Arguments:
            like: a tree of the same structure, with shapes, dtypes and shardings, which may be on other devices.
            accept: says of a step why it cannot be gone on from, or None.

        Returns:
            Its step and tree, None and None where none was ever made; and what to tell the user of those that were
            passed over, whose folders got names that begin with "damaged".

        Raises:
            RunError: there are some, and none of them can be gone on from. They are left as they are.
        """
        passed: list[tuple[int, str]] = []
        for step in self.steps():
            try:
                with processes.together():
                    if (reason := accept(step)) is not None:
                        raise ValueError(reason)
                    arrays, checksums = self._read(step, like)
                if _checksums(arrays) != checksums:
                    raise ValueError("it is damaged: its arrays are not those that were saved")
                tree = jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in _named(like)])
            except Exception as error:  # a damaged file leads to whatever Orbax and its libraries happen to raise
                if processes.lost_peer(error):
                    raise
                cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                passed.append((step, cause[:200]))
                continue
            for damaged, _ in passed:
                self._put_aside(damaged)
            return step, tree, [f"the checkpoint at step {at} was put aside: {cause}" for at, cause in passed]
        if passed:
            causes = "; ".join(f"step {at}: {cause}" for at, cause in passed)
            raise RunError(
                f"{self.path}: none of the checkpoints can be gone on from ({causes}). Nothing was changed. Other "
                "versions than those of environment.json may save other arrays; to begin anew, choose another --out"
            )
        return None, None, []

    def close(self) -> None:
        """Wait for what is being saved.

        Raises:
            RunError: it could not be written.
        """
        with self._errors("cannot be written"), contextlib.closing(self._manager):
            self._manager.wait_until_finished()

    def _read(self, step: int, like: Any) -> tuple[dict[str, jax.Array], dict[str, int]]:
        """The arrays of a checkpoint, and their checksums.

        Raises:
            ValueError: it holds none, or other arrays; and whatever Orbax raises where a file is damaged.
        """
        # Without the manager, which waits for the other processes to have read.
        names = _named(like)
        folder: Any = self.path / str(step)  # Orbax's types ask for a path of etils, and its code takes any
        about = ocp.JsonCheckpointHandler().restore(folder / "about", args=ocp.args.JsonRestore())
        if "checksums" not in about:
            raise ValueError("it was saved by an older version of this code")
        # Before it was noted, the folder's name was all that told the step.
        if (saved_at := about.get("step", step)) != step:
            raise ValueError(f"its folder was renamed: it was saved at step {saved_at}")
        saved = self._arrays.metadata(folder / "state").tree
        shapes = {name: (tuple(array.shape), array.dtype) for name, array in saved.items()}
        if shapes != {name: (array.shape, array.dtype) for name, array in names.items()}:
            raise ValueError("it holds other arrays than this code trains")
        placed = {
            name: ocp.ArrayRestoreArgs(sharding=array.sharding, global_shape=array.shape, dtype=array.dtype)
            for name, array in names.items()
        }
        arrays = self._arrays.restore(folder / "state", args=ocp.args.PyTreeRestore(restore_args=placed))
        return arrays, about["checksums"]

    def _put_aside(self, step: int) -> None:
        names = (self.path / f"damaged-{step}-{number}" for number in itertools.count())
        with self._errors("cannot be put aside"):
            with processes.together():
                if processes.first():
                    (self.path / str(step)).rename(next(name for name in names if not name.exists()))
            self._manager.reload()

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of the file system, in the words of whichever library met it
            if processes.lost_peer(error):
                raise
            raise RunError(
                f"{self.path}: a checkpoint {what}: {error}; make room or change permissions, and go on with --resume"
            ) from error


@functools.cache
def _hush() -> None:
    """Leave out what TensorStore's threads say of each array of a save that has failed; its cause is raised.

    They report to an event loop that Orbax has closed by then, which Python prints as a traceback for each of them.
    """
    before = sys.unraisablehook

    def hook(found: Any) -> None:
        if not (isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == "Event loop is closed"):
            before(found)

    sys.unraisablehook = hook


def _clear(path: Path) -> None:
    """Remove the checkpoints that were never finished.

    Threads and hosts of a run that failed may go on writing for a while, and file systems keep what somebody has open.
    So each is first moved out of the way of new ones. What cannot be removed then is left to the next run.
    """
    for pause in _PAUSES:
        time.sleep(pause)
        with contextlib.suppress(OSError):
            found = [each for each in path.iterdir() if _UNFINISHED in each.name or each.name.startswith(_LEFT)]
            if not found:
                return
            for each in found:
                _remove(each)


def _remove(unfinished: Path) -> None:
    with contextlib.suppress(OSError):  # another try follows
        if not unfinished.name.startswith(_LEFT):
            unfinished = unfinished.rename(unfinished.with_name(f"{_LEFT}{secrets.token_hex(4)}"))
        shutil.rmtree(unfinished)


def _named(tree: Any) -> dict[str, Any]:
    """The leaves by their paths, in the tree's order: what others can read without this code."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _checksums(arrays: dict[str, jax.Array]) -> dict[str, int]:
    return {name: int(checksum) for name, checksum in jax.device_get(_all_checksums(arrays)).items()}


@jax.jit
def _all_checksums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _checksum(array) for name, array in arrays.items()}


def _checksum(array: jax.Array) -> jax.Array:
    """A sum of the bits, each number times an odd one of its own: the same on any mesh, another if a number changes."""
    if array.dtype == bool:
        array = array.astype(jnp.uint8)
    words = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(array, words).astype(jnp.uint32)  # of eight bytes, an axis of two more
    strides = [math.prod(bits.shape[axis + 1 :]) for axis in range(bits.ndim)]
    counts = [jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) for axis in range(bits.ndim)]
    position = sum((count * jnp.uint32(stride) for count, stride in zip(counts, strides, strict=True)), jnp.uint32(0))
    return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)
