"""Turns: one thread at a time in a model, and in whatever it shares with others.

A model is in one of two states: nodes in its layers, or weights while its code runs. No second thread may meet the
first one's weights. This file owns who waits for whom; changing the state is `_nodes_in_place`'s work.

Why it is right:

- A turn covers every place where a node may stand and give way: all modules, lists and dicts that can be reached from
  the model. It takes them all at once or waits for all, so no thread waits with half of what it needs; models that
  share no such part run side by side. `Variable`s may be shared: a weight is made of one, and changes none.
- The parts are known by identity. So a view of a part, and a model that shares a layer, need no lock handed on, and
  a copy (clone, merge, pickle) is a model of its own. Nothing is written on the objects, where NNX would see it.
- Parts are only looked into while no other thread has them, as its code may be changing them at that moment.
- A thread that has the model has its turn already: the model's code may call the model.
- A part has an entry only during a turn, which keeps the part alive meanwhile. So no identity is used again under an
  entry, and nothing is left to collect.
- A thread inside one model that calls another one takes that as well, and keeps the first. So two threads could wait
  for each other, which no order of taking would prevent, as nobody knows beforehand what a model's code will call. It
  is an error in the thread that would close the circle.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import jax
from flax import nnx

from wn_jax._types import PyTree

_changed = threading.Condition()
"""Guards the two tables below. It is held for looking and noting only, never while a model's methods run. (Looking
flattens the containers in it, which may be a user's own.)"""

_users: dict[int, int] = {}
"""By the `id` of a part in use: the thread that uses it."""

_waits_for: dict[int, int] = {}
"""By a thread that waits: the thread that has what it needs."""


@contextlib.contextmanager
def turn(model: nnx.Module) -> Iterator[None]:
    """This thread's turn on the model; other threads that want a part of it wait until the context ends.

    Raises:
        RuntimeError: the other thread waits for this one, too.
    """
    thread = threading.get_ident()
    parts = _take(model, thread)
    try:
        yield
    finally:
        _give_back(parts)


def _take(model: nnx.Module, thread: int) -> dict[int, PyTree]:
    """The parts that are taken now, and were not this thread's before."""
    with _changed:
        if _users.get(id(model)) == thread:
            return {}

        parts, other = _look(model, thread)
        while other is not None:
            _check_no_circle(model, thread, other)
            _waits_for[thread] = other
            try:
                _changed.wait()
            finally:
                _waits_for.pop(thread, None)
            parts, other = _look(model, thread)

        _users.update(dict.fromkeys(parts, thread))
        return parts


def _give_back(parts: dict[int, PyTree]) -> None:
    if not parts:
        return
    with _changed:
        for part in parts:
            del _users[part]
        # All look again; a note from before could be taken for a circle that is none.
        _waits_for.clear()
        _changed.notify_all()


def _look(model: nnx.Module, thread: int) -> tuple[dict[int, PyTree], int | None]:
    """The free parts of the model by their ids, and a thread that has one of the others."""
    seen: dict[int, PyTree] = {}
    free: dict[int, PyTree] = {}
    stack: list[PyTree] = [model]
    while stack:
        part = stack.pop()
        if id(part) in seen:
            continue
        seen[id(part)] = part

        # Only what can be changed: Python keeps one empty tuple for all models.
        if isinstance(part, nnx.Pytree | list | dict):
            user = _users.get(id(part))
            if user is None:
                free[id(part)] = part
            elif user != thread:
                return free, user
        stack.extend(_children(part))
    return free, None


def _children(part: PyTree) -> list[PyTree]:
    if isinstance(part, nnx.Variable):
        return []
    if isinstance(part, nnx.Pytree):
        return list(vars(part).values())
    if jax.tree_util.all_leaves([part]):  # most attributes are numbers and functions, and this is quick
        return []
    return jax.tree.leaves(part, is_leaf=lambda child: child is not part)


def _check_no_circle(model: nnx.Module, thread: int, other: int) -> None:
    """Raises where `other`, or whom that thread waits for, waits for this thread."""
    waiting: int | None = other
    while waiting is not None and waiting != thread:
        waiting = _waits_for.get(waiting)
    if waiting == thread:
        raise RuntimeError(
            f"two threads would wait for each other for ever: this one, inside a WeightNormed, calls a "
            f"{type(model).__name__} that another thread is inside of, and that one calls what this one is inside of. "
            "Call the models in one order in all threads, or give each thread copies, as nnx.clone makes them"
        )
