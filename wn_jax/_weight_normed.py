"""`WeightNormed`: a weight-normalized Flax NNX model, as an object."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from wn_jax._nnx_factored import is_traced, run_factored
from wn_jax._nnx_weights import nodes_of, weights_in_place, with_nodes, with_weights
from wn_jax._node import is_node
from wn_jax._transform import Axes
from wn_jax._wrap import check_scale


class _Calls:
    """Calls `self.model`, its methods and its parts, with weights in the place of nodes."""

    model: Any
    scale: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own call."""
        return self._run("__call__", args, kwargs)

    def __getitem__(self, key: Any) -> Any:
        """A part of a model that is a list or a dict."""
        return _part(self.model[key], self.scale)

    def __getattr__(self, name: str) -> Any:
        """The model's methods and parts.

        Not what else it holds: an attribute that were found on both could be set on the wrong one (as by
        `nnx.Module.set_attributes`, which asks `hasattr`). For the same reason not `set_view`, which `nnx.view` calls
        on each module that has it.
        """
        model = vars(self).get("model")
        part = vars(model).get(name) if isinstance(model, nnx.Module) else None
        if isinstance(part, nnx.Module):
            return _part(part, self.scale)
        method = getattr(type(model), name, None)
        if not callable(method) or name.startswith("__") or name == "set_view":
            hint = f"; the model's own is .model.{name}" if name in dir(model) else ""
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}")

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            return self._run(name, args, kwargs)

        return call

    def _run(self, name: str, args: Any, kwargs: Any) -> Any:
        nodes = {} if self.scale == "weight" else nodes_of(self.model)
        if nodes and is_traced(nodes, args, kwargs):
            # What is in the way of this, in the model or in the call, shows below, or was in the way of this only.
            with contextlib.suppress(Exception):
                return run_factored(self.model, nodes, name, args, kwargs, self.scale)
        with weights_in_place(self.model):
            return getattr(self.model, name)(*args, **kwargs)


class WeightNormed(nnx.Module, _Calls):
    """An NNX model with weight-normalized weights, which works where the model works.

    At each weight, `.model` holds a `WeightNorm` node with two `nnx.Param`s, `g` and `v`, of the metadata that the
    weight's had (`g` without sharding names on the axes that it sums over). Everything else in the model stays as it
    is, `BatchStat`s and random keys for example, and changes as ever when the model runs. A call changes no
    parameter.

    The model's methods and parts are called on this object: `wrapped(x)`, `wrapped.encode(x)`, `wrapped.encoder(x)`.
    While they run, the layers hold plain weights; otherwise they hold nodes, so `wrapped.model.encoder(x)` fails. A
    model's code that writes to a weight writes to a copy.

    Arguments:
        model: any NNX module. It is copied, and stays as it is.
        axes: which weights, and over which axes their norms run: a dict from path to axes or a function, as for
            `wn_jax.reparameterize`. `wn_jax.nnx.infer_axes(lambda model, x: model(x))(model, x)` finds them.
        scale: where the scale `g / ||v||` goes, as for `wn_jax.wrap`. `"auto"` and `"output"` read the model's program
            inside `nnx.jit`, `nnx.grad` and other transformations, which runs the model's code once more; eagerly,
            and where the program does not tell all (the call adds attributes, or fails), the weights are computed, as
            always with `"weight"`. The norm is computed once a call, outside of the model's loops.

    Raises:
        TypeError: `model` is no NNX module.
        ValueError: the model is weight-normalized already, `axes` do not fit (see `wn_jax.reparameterize`), or
            `scale` is unknown.

    >>> import jax.numpy as jnp, optax, wn_jax.nnx
    >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    >>> x = jnp.ones((4, 3))
    >>> wrapped = WeightNormed(model, wn_jax.nnx.infer_axes(lambda model, x: model(x))(model, x))
    >>> bool((wrapped(x) == model(x)).all()), wrapped.model.kernel.g.shape
    (True, (1, 2))
    >>> optimizer = nnx.Optimizer(wrapped, optax.sgd(0.1), wrt=nnx.Param)
    >>> @nnx.jit
    ... def step(wrapped, optimizer, x):
    ...     optimizer.update(wrapped, nnx.grad(lambda wrapped: jnp.mean(wrapped(x) ** 2))(wrapped))
    >>> for _ in range(3):
    ...     step(wrapped, optimizer, x)
    >>> bool(jnp.mean(wrapped(x) ** 2) < jnp.mean(model(x) ** 2))
    True
    """

    def __init__(
        self,
        model: nnx.Module,
        axes: Mapping[str, Axes | None] | Callable[[str, Any], Axes | None],
        scale: str = "auto",
    ):
        check_scale(scale)
        _check_is_plain(model)
        self.model = with_nodes(model, axes)
        self.scale = scale

    def plain(self) -> Any:
        """The model with plain weights, for serving and export: a copy, of the class that was wrapped."""
        return with_weights(self.model)

    def train(self, **attributes: Any) -> None:
        """The model's own `train`."""
        self.model.train(**attributes)

    def eval(self, **attributes: Any) -> None:
        """The model's own `eval`."""
        self.model.eval(**attributes)


class _Part(_Calls):
    """A part of a weight-normalized model, to be called."""

    def __init__(self, model: nnx.Module, scale: str):
        self.model, self.scale = model, scale


def _part(part: Any, scale: str) -> Any:
    return _Part(part, scale) if isinstance(part, nnx.Module) and nodes_of(part) else part


def _check_is_plain(model: Any) -> None:
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"WeightNormed takes an NNX module; got a {type(model).__name__}. For parameter trees there are "
            "wn_jax.reparameterize and wn_jax.wrap"
        )
    for path, part in nnx.iter_graph(model, graph=True):
        where = repr("/".join(map(str, path))) if path else "the model"
        if isinstance(part, nnx.WeightNorm):
            raise ValueError(
                f"{where} is a flax.nnx.WeightNorm, which writes to the weights in each call; "
                "wn_jax.nnx.from_weight_norm(model) takes its place"
            )
        if isinstance(part, WeightNormed) or is_node(part):
            raise ValueError(
                f"{where} is weight-normalized already (a {type(part).__name__}); wrap the model that .plain() returns"
            )
