"""The functions of an arm as compiled programs: over the members of a group at once, on the devices of a placement.

A group is as many members as make one call. Their states, and what happens to them, are `arm`'s.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax

from experiments.devices import sharding
from experiments.devices.placement import Placement, placed
from experiments.engine.members import Member, as_arrays
from experiments.engine.training import Functions, State

Name = Literal["first", "order", "evaluate", "add_weight", "log_mean", "sample", "pictures", "statistics"]
"""The methods of `Functions` whose programs are had by name."""

InAxes = tuple[int | None, ...]
"""Which axis of each argument counts the members; None: they share the argument."""

_IN_AXES: dict[Name, InAxes] = {
    "first": (0,),
    "order": (0, None),
    "evaluate": (0, 0, None, None, None),
    "add_weight": (0, 0, 0, None, None, None),
    "log_mean": (0, None),
    "sample": (0, 0),
    "pictures": (0, 0, None),
    "statistics": (0, 0),
}
_INIT: InAxes = (0, None, 0)
_ADVANCE: InAxes = (0, 0, None, 0)


class Programs:
    """The programs of an arm.

    `programs["evaluate"]` is `Functions.evaluate` over a group, compiled when it is first called, and so for every
    `Name`. `init` and `advance` are attributes, as each is compiled in a way of its own: the former when it is first
    called, the latter when the attribute is first read.

    Arguments:
        functions: the arm's.
        placement: where its arrays lie.
        members: learning rate and seed of each member.
    """

    def __init__(self, functions: Functions, placement: Placement, members: list[tuple[float, int]]) -> None:
        self.functions = functions
        self.placement = placement
        self._members = members
        self._jitted: dict[Name, Callable[..., Any]] = {}

    def __getitem__(self, name: Name) -> Callable[..., Any]:
        if name not in self._jitted:
            self._jitted[name] = self._jit(getattr(self.functions, name), _IN_AXES[name])
        return self._jitted[name]

    @functools.cached_property
    def init(self) -> Callable[..., State]:
        """`Functions.init` over a group."""
        # It runs once, and LLVM's optimization of its random numbers takes longer than all else at the start.
        quickly = {"xla_backend_optimization_level": "0"} if self.placement.on_cpu() else {}
        return self._jit(self.functions.init, _INIT, out_shardings=self._shardings, compiler_options=quickly)

    @functools.cached_property
    def advance(self) -> jax.stages.Compiled:
        """`Functions.advance` over a group, for as many steps as make one call. It is given the states to keep."""
        return self.lower().compile()

    def lower(self) -> jax.stages.Lowered:
        """`advance` before it is compiled: from shapes alone, and the devices need not be there."""
        # A new function each time, which JAX traces anew: `tpu.compiled` measures how long that takes.
        places = (self._shardings, self.placement.everywhere)
        advance = self._jit(self.functions.advance, _ADVANCE, out_shardings=places, donate_argnums=0)
        to_next_record = jax.eval_shape(jax.vmap(self.functions.order, _IN_AXES["order"]), self._member, 0)
        members, _, batch = to_next_record.shape
        rows = jax.ShapeDtypeStruct((members, self.steps_per_call, batch), to_next_record.dtype)
        return advance.lower(self.state, self._member, self.placement.train_like, self.placement.feed_like(rows))

    @functools.cached_property
    def state(self) -> State:
        """The shapes of a group's states, and where they lie; nothing is computed."""
        return jax.tree.map(placed, self._shapes, self._shardings)

    @functools.cached_property
    def steps_per_call(self) -> int:
        """How many steps make one call."""
        train = self.functions.config.train
        return train.steps_per_call or (1 if self._slow_in_loops or self.placement.fed else train.record_every)

    @functools.cached_property
    def group_size(self) -> int:
        """How many members make one call."""
        return self.functions.config.train.members_per_call or (1 if self._slow_in_loops else len(self._members))

    @property
    def _slow_in_loops(self) -> bool:
        """Whether XLA should get the steps and the members one by one.

        Its CPU backend takes a slow path for convolutions inside a loop, and for those of several members at once
        (`overhead configs/cifar10_small.toml --set train.record_every=2 --set train.steps_per_call=2` measures it).
        """
        return self.placement.on_cpu() and self.functions.convolves

    @functools.cached_property
    def _member(self) -> Member:
        """The shapes of a group's members, and where they lie."""
        shapes = jax.eval_shape(lambda: as_arrays(self._members[: self.group_size]))
        return jax.tree.map(lambda shape: placed(shape, self.placement.everywhere), shapes)

    @functools.cached_property
    def _shapes(self) -> State:
        """Those of a group's states; all groups are of one size."""
        rows = jax.eval_shape(jax.vmap(self.functions.first, _IN_AXES["first"]), self._member)
        init = jax.vmap(self.functions.init, _INIT)
        return jax.eval_shape(init, self._member, self.placement.train_like, self.placement.feed_like(rows))

    @functools.cached_property
    def _shardings(self) -> State:
        """Where a group's states lie, on a mesh whose axes the parameters are sharded over."""
        by_path = sharding.of_parameters(self.functions.uses, self.placement.mesh)
        return jax.tree.map(self.placement.at, sharding.of_state(self._shapes, by_path))

    def _jit(self, function: Callable[..., Any], in_axes: InAxes, **options: Any) -> Any:
        """A function of one member over a group; what it gives is whole on each device, where nothing else is said."""
        mapped = jax.vmap(function, in_axes=in_axes)
        return jax.jit(mapped, **{"out_shardings": self.placement.everywhere, **options})
