"""`WeightNormed`: a weight-normalized Flax NNX model, as an object."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from flax import nnx

from wn_jax._node import is_node
from wn_jax._tree import is_traced
from wn_jax._types import AxesRule, PyTree, Scale
from wn_jax._wrap import check_scale
from wn_jax.nnx._nodes_in_place import nodes_of, rebuilt_copy, rebuilt_in_place, with_nodes
from wn_jax.nnx._program_call import run_factored, tell
from wn_jax.nnx._turns import turn


class WeightNormed(nnx.Module):
    """An NNX model with weight-normalized weights, which works where the model works.

    At each weight, `.model` holds a `WeightNorm` node with two `nnx.Param`s, `g` and `v`, of the metadata that the
    weight's had (`g` without sharding names on the axes that it sums over). Everything else in the model stays as it
    is, `BatchStat`s and random keys for example, and changes as ever when the model runs. A call changes no
    parameter.

    The model's methods, parts and attributes are found on this object: `wrapped(x)`, `wrapped.encode(x)`,
    `wrapped.encoder(x)`, `wrapped.rate = 0.1` (but for those that it has itself: `model`, `plain`, `train`, `eval`).
    While the model's code runs, the layers hold plain weights, computed once a call; otherwise they hold nodes, so
    `wrapped.model.encoder(x)` fails. What the model's code writes to a weight is dropped after the call.

    Threads take turns on one model, on its parts, and on models that share parts; others run side by side. Reading a
    part waits for its turn, too, so a call must not wait for a thread that touches this object. Two threads inside two
    models, each of which calls the other's, would wait for ever: one gets a `RuntimeError` that says so.

    Arguments:
        model: any NNX module. It is copied, and stays as it is.
        axes: which weights, and over which axes their norms run: a dict from path to axes or a function, as for
            `wn_jax.reparameterize`. `wn_jax.nnx.infer_axes(lambda model, x: model(x))(model, x)` finds them.
        scale: where the scale `g / ||v||` goes, as for `wn_jax.wrap`. `"auto"` and `"output"` read the model's program
            inside `nnx.jit`, `nnx.grad` and other transformations, which saves much at small batches. They are for
            models whose code can run twice in a call: not for one that counts its calls, or collects arrays, in
            variables of Python that NNX does not know. Outside of transformations the weights are computed as by
            `"weight"`. Where the program does not tell all (the call adds attributes, or returns a module), or
            cannot be read or run, they are too, and a `UserWarning` says why, once for a class, method and kind of
            failure. An error of the model's own code is raised as without `WeightNormed`.

    Raises:
        TypeError: `model` is no NNX module.
        ValueError: the model is weight-normalized already, `axes` do not fit (see `wn_jax.reparameterize`), or
            `scale` is unknown.

    >>> import jax.numpy as jnp, optax, wn_jax.nnx
    >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    >>> x = jnp.ones((4, 3))
    >>> wrapped = WeightNormed(model, wn_jax.nnx.infer_axes(lambda model, x: model(x))(model, x))
    >>> bool((wrapped(x) == model(x)).all()), wrapped.kernel.g.shape
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

    def __init__(self, model: nnx.Module, axes: AxesRule, scale: Scale = "weight") -> None:
        check_scale(scale)
        _check_is_plain(model)
        self.model: Any = with_nodes(model, axes)  # of the user's class, whose attributes no type tells
        self._scale: Scale = scale

    def plain(self) -> Any:
        """The model with plain weights, for serving and export: a copy, of the class that was wrapped."""
        return rebuilt_copy(self.model)

    def train(self, **attributes: Any) -> None:
        """The model's own `train`."""
        self.model.train(**attributes)

    def eval(self, **attributes: Any) -> None:
        """The model's own `eval`."""
        self.model.eval(**attributes)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own call."""
        return self._run("__call__", args, kwargs)

    def __getattr__(self, name: str) -> Any:
        """The model's methods, parts and attributes. Not `set_view`, as `nnx.view` calls that of each module."""
        model = vars(self).get("model")
        if model is None or name.startswith("__") or name == "set_view":
            raise AttributeError(f"'WeightNormed' object has no attribute {name!r}")
        if name in vars(model):
            return self._part(vars(model)[name])
        method = getattr(type(model), name, None)
        if not callable(method):
            with rebuilt_in_place(model):  # for a property
                return getattr(model, name)

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            return self._run(name, args, kwargs)

        return call

    def __setattr__(self, name: str, value: object) -> None:
        model = vars(self).get("model", self)
        if name not in vars(self) and not name.startswith("_") and (name in vars(model) or hasattr(type(model), name)):
            setattr(model, name, value)
        else:
            super().__setattr__(name, value)

    def __getitem__(self, key: int | str | slice) -> PyTree:
        return self._part(self.model[key])

    def __iter__(self) -> Iterator[PyTree]:
        return map(self._part, self.model)

    def __len__(self) -> int:
        return len(self.model)

    def __contains__(self, key: object) -> bool:
        return key in self.model

    def __bool__(self) -> bool:
        return bool(self.model)

    def _part(self, part: PyTree) -> PyTree:
        """A part of the model: as a `WeightNormed` of the same parameters, where it holds some."""
        if not isinstance(part, nnx.Module) or isinstance(part, WeightNormed) or not nodes_of(part):
            return part
        view = object.__new__(WeightNormed)
        vars(view).update({**vars(self), "model": part})  # past __setattr__, which speaks to the model
        return view

    def _run(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PyTree:
        """`name` of the model: by its program where `scale` asks for that and it can be done, else its code itself."""
        with turn(self.model):
            nodes = {} if self._scale == "weight" else nodes_of(self.model)
            if not nodes or not is_traced(list(nodes.values()), args, kwargs):
                return self._run_in_place(name, args, kwargs)
            try:
                return run_factored(self.model, nodes, name, args, kwargs, self._scale)
            except Exception as error:  # noqa: BLE001 - of the model's code, or of ours: the code itself tells which
                failure = error
            # Past the `except`, so that an error of the model's is shown as its own, and not as one during another.
            try:
                result = self._run_in_place(name, args, kwargs)
                tell(self.model, name, self._scale, failure)
            finally:
                del failure  # its traceback holds this frame
            return result

    def _run_in_place(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PyTree:
        with rebuilt_in_place(self.model):
            return getattr(self.model, name)(*args, **kwargs)


def _check_is_plain(model: nnx.Module) -> None:
    """Raises where `model` is no NNX module, or holds nodes already, or Flax's own weight normalization."""
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
