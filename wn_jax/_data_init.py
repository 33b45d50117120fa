"""Data-dependent initialization: each `g` and bias from one batch, in the order of the program.

Source: Salimans & Kingma (2016), section 3, equations 5 and 6: with `g = 1/std` and `b = -mean/std` of what a unit
direction gives on a batch, every pre-activation starts with mean 0 and variance 1.

This file owns `init_from_data` and the run that takes the statistics. Which nodes it sets, `_data_plan` decides.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.core
import jax.numpy as jnp
from jax.typing import ArrayLike

from wn_jax._boxes import rebox, unbox
from wn_jax._data_plan import Target, plan
from wn_jax._node import WeightNorm
from wn_jax._norms import norm_dtype
from wn_jax._program import jaxpr
from wn_jax._program.factored import Factored, Operand, can_hold_directions, weight
from wn_jax._program.jaxpr import Equation, Input, Site
from wn_jax._program.moves import is_scaling
from wn_jax._program.notes import Bias
from wn_jax._program.reading import ParameterLeaf, Reading, check_callable, check_position, read
from wn_jax._program.run import Runner, scale_of_operand, scale_of_output, with_v
from wn_jax._program.views import Contraction, View
from wn_jax._tree import flatten, is_traced, with_plain_children
from wn_jax._types import Params, PyTree


def init_from_data(fn: Callable[..., PyTree], init_scale: float = 1.0, argnums: int = 0) -> Callable[..., Params]:
    """Sets `g` and the biases so that each pre-activation of `fn` has mean 0 and a given deviation on one batch.

    Returns a function of `fn`'s own arguments that returns the parameters anew. In the order of the program, each
    matmul or convolution of a node is computed with unit directions, and its mean and standard deviation are taken,
    in float32, over everything but the features; then `g = init_scale / std`, the bias that the program adds to that
    output (if it does, and only there) becomes `-init_scale * mean / std`, and the program goes on with the new output.
    Each of a scanned stack of layers sees what the layers before it give.

    Some nodes keep their `g`, hence their function, and a warning names them: those that are used at several places or
    at several steps of a loop over time, that a branch or a `while_loop` holds, or whose norm runs over other axes than
    the program sums over; and, of the others, features that are constant on the batch. `v` never changes.

    Works in `jit`, where the constant features are told by a `jax.debug.callback`, and with a batch that is sharded
    over devices: its statistics are those of the whole batch. What is set stays on its devices (in `jit`, give the
    `out_shardings`).

    Arguments:
        fn: a function whose argument `argnums` is the parameter tree, with nodes; such as `model.apply`.
        init_scale: the standard deviation that pre-activations get.
        argnums: the position of the parameters.

    Raises:
        ValueError: `init_scale` is not positive; the parameters hold no nodes; the call is made inside `shard_map` or
            `pmap`, on one shard of the batch; a layer gets a single sample, of which there is no deviation; or (outside
            `jit`) a pre-activation is NaN or infinite: the first layer is named.
        TypeError: `fn` is not callable, or an argument is abstract.

    >>> import jax, jax.numpy as jnp, wn_jax as wn
    >>> def model(params, x):
    ...     return x @ params["kernel"] + params["bias"]
    >>> params = wn.reparameterize({"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}, {"kernel": (-2,)})
    >>> x = jax.random.normal(jax.random.key(0), (50, 3)) * 9 + 5
    >>> y = wn.wrap(model)(wn.init_from_data(model)(params, x), x)
    >>> bool((abs(y.mean(0)) < 1e-5).all() and (abs(y.std(0) - 1) < 1e-5).all())
    True
    """
    check_callable("init_from_data", fn)
    if not 0 < init_scale < math.inf:
        raise ValueError(f"init_scale must be a positive number, the deviation of pre-activations; got {init_scale!r}")

    @functools.wraps(fn)
    def initialize(*args: Any, **kwargs: Any) -> Params:
        check_position((argnums,), args, kwargs)
        _check_whole_batch()
        reading = read(fn, (argnums,), args, kwargs, "to initialize its weights from data.")
        targets, left = plan(reading)
        _warn(left, stacklevel=3)
        inputs = _inputs(reading, targets)
        # Under jit even where the caller is not: a run enters loops and calls only while it is traced.
        results = jax.jit(lambda inputs: _results(reading, targets, init_scale, inputs))(inputs)
        _report(targets, results)
        return _renewed(args[argnums], targets, results)

    return initialize


@functools.partial(jax.tree_util.register_dataclass, data_fields=("g", "bias", "constant", "finite"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Result:
    """The numbers that a target gets. Those of a scanned stack have a slice for each layer."""

    g: jax.Array
    """The magnitudes, laid out as the node's `g`."""
    bias: jax.Array | None
    """The bias, laid out as the parameter; `None` where the program adds none that can be set."""
    constant: jax.Array
    """How many of its features are constant on the batch."""
    finite: jax.Array
    """Whether all statistics are."""


def _inputs(reading: Reading, targets: dict[Site, Target]) -> list[Operand]:
    """The program's inputs: of a target, its unit directions and its `g`; of another node, its weight."""
    inputs: list[Input | Factored] = list(reading.program.arrays)
    for leaf in reading.leaves:
        if leaf.node is not None:
            inputs[leaf.input] = unbox(with_plain_children(leaf.node).weight())
    for target in targets.values():
        node = cast(WeightNorm, with_plain_children(target.node))
        g = unbox(node.g)
        unit = unbox(dataclasses.replace(node, g=jnp.ones_like(g)).weight())
        inputs[target.leaf.input] = Factored(unit, g.astype(norm_dtype(unit.dtype)), unit.dtype)
    return [_concrete(value) for value in inputs]


def _check_whole_batch() -> None:
    if manual := jax.sharding.get_abstract_mesh().manual_axes:
        raise ValueError(
            f"init_from_data was called inside shard_map or pmap over {tuple(manual)}, where its statistics would be "
            "those of one shard of the batch. Call it outside, with the whole batch; params and batch may be sharded"
        )


def _concrete(value: Input | Factored) -> Operand:
    """The input itself, after a check that it holds numbers."""
    if isinstance(value, jax.ShapeDtypeStruct):
        raise TypeError("init_from_data computes with data, but an argument holds a jax.ShapeDtypeStruct")
    return value


def _results(
    reading: Reading, targets: dict[Site, Target], init_scale: float, inputs: list[Operand]
) -> dict[Site, Result]:
    """The results by the site of the contraction, of one run of the program."""
    runner = _Initializer(targets, init_scale)
    runner.run(reading.program.body, inputs)
    return runner.found


class _Initializer(Runner):
    """A run that sets each target's `g` and bias when it gets there, and goes on with what they give.

    `found` holds a `Result` by the site of the contraction; those of a scanned stack have a slice for each layer.
    """

    def __init__(self, targets: dict[Site, Target], init_scale: float) -> None:
        super().__init__()
        self.targets = targets
        self.init_scale = init_scale
        self.shifts: dict[Site, tuple[Site, ParameterLeaf, Bias, jax.Array]] = {}
        """By the site of the addition: the site of the contraction, and what is added, NaN where that stays."""

    def contract(
        self, eqn: Equation, values: list[Operand], factored: Factored, contraction: Contraction, site: Site
    ) -> jax.Array | None:
        target = self.targets.get(site)
        if target is None:
            return super().contract(eqn, values, factored, contraction, site)
        out = jaxpr.outputs(eqn)[0]
        is_narrow = not can_hold_directions(factored.v.dtype, factored.dtype, out.dtype)
        y = _of_directions(eqn, values, factored, contraction, is_narrow)
        mean = jnp.mean(y, target.samples, keepdims=True)
        std = jnp.sqrt(jnp.mean(jnp.square(y - mean), target.samples, keepdims=True))

        # Equal numbers have a deviation of some roundings of their size, not of exactly 0.
        rounding = 8 * jnp.finfo(y.dtype).eps * jnp.max(jnp.abs(y), target.samples, keepdims=True)
        constant, finite = std <= rounding, jnp.isfinite(mean) & jnp.isfinite(std)
        keep = constant | ~finite

        before = _as_explicitly_sharded(scale_of_output(factored, contraction, y.ndim), std)
        # Added zeros: in a mesh with explicit axes, a select needs its operands to be sharded alike.
        before = before + jnp.zeros_like(std)
        std, keep = std + jnp.zeros_like(before), keep | jnp.zeros_like(before, bool)
        gain = jnp.where(keep, before, self.init_scale / jnp.where(keep, 1, std))
        y, mean = y * gain, mean * gain
        if is_narrow:
            # Rounded to few digits, the weight has another mean on the batch than unrounded, which the bias must know.
            y = _of_weight(eqn, values, factored, contraction, gain)
            mean = jnp.mean(y.astype(mean.dtype), target.samples, keepdims=True) + jnp.zeros_like(before)
            finite = (finite | jnp.zeros_like(before, bool)) & jnp.isfinite(mean)  # NaN where it leaves the range
            gain, mean = jnp.where(finite, gain, before), jnp.where(finite, mean, jnp.nan)

        self.found[site] = Result(target.g(gain), None, jnp.sum(constant), jnp.all(finite))
        if target.bias:
            leaf, bias = target.bias
            self.shifts[bias.site] = (site, leaf, bias, jnp.where(keep, jnp.nan, -mean))
        return y.astype(out.dtype)

    def scaled(self, eqn: Equation, values: list[Operand]) -> Factored | None:
        """The directions take a scalar, as it changes what their `g` has to be."""
        for i, value in enumerate(values):
            if isinstance(value, Factored) and is_scaling(eqn, i) and value.dtype == value.v.dtype:
                arrays = [weight(other) if other is not value else value.v for other in values]
                return dataclasses.replace(value, v=jaxpr.bind(eqn, arrays)[0])
        return None

    def step(self, eqn: Equation, values: list[Operand], site: Site) -> Sequence[Operand]:
        if site not in self.shifts:
            return super().step(eqn, values, site)
        contraction, leaf, bias, shift = self.shifts.pop(site)
        arrays = [weight(value) for value in values]
        before, shift = jnp.asarray(arrays[bias.operand]), bias.output.from_source(shift)
        first = before[tuple(slice(size) for size in shift.shape)]  # one number a feature
        first, shift = first + jnp.zeros_like(shift), shift + jnp.zeros_like(first, shift.dtype)
        new = jnp.where(jnp.isnan(shift), first, shift)
        stored = bias.view.to_source(new, leaf.aval.ndim)
        self.found[contraction] = dataclasses.replace(self.found[contraction], bias=stored)
        arrays[bias.operand] = jnp.broadcast_to(new, before.shape).astype(before.dtype)
        return jaxpr.bind(eqn, arrays)

    def entered(self, eqn: Equation, values: list[Operand], site: Site) -> Sequence[Operand] | None:
        """Calls are run through: the derivatives of a custom rule, or what a `remat` saves, do not matter here."""
        body = jaxpr.call(eqn)
        return super().entered(eqn, values, site) if body is None else self.run(body, values, site)


def _of_directions(
    eqn: Equation, values: list[Operand], factored: Factored, contraction: Contraction, is_narrow: bool
) -> jax.Array:
    """The output of unit directions, in float32 at least. A narrow dtype in the program rounds the data, not these."""
    if not is_narrow:
        y = jaxpr.bind(eqn, with_v(values, factored, contraction))[0]
        return y.astype(norm_dtype(y.dtype))
    wide = norm_dtype(factored.v.dtype)
    directions = dataclasses.replace(factored, dtype=factored.v.dtype)
    operands = [jnp.asarray(value) for value in with_v(values, directions, contraction)]
    operands = [value.astype(wide) if jnp.issubdtype(value.dtype, jnp.floating) else value for value in operands]
    # The precision may be one of narrow numbers.
    params = {**eqn.params, "preferred_element_type": wide, "precision": None}
    return jaxpr.bind(eqn.replace(params=params), operands)[0]


def _of_weight(
    eqn: Equation, values: list[Operand], factored: Factored, contraction: Contraction, gain: jax.Array
) -> jax.Array:
    """The output of the weight that unit directions and this gain make, rounded as the program rounds it."""
    scale = _as_explicitly_sharded(scale_of_operand(gain, contraction, factored.v.ndim), factored.scale)
    new = dataclasses.replace(factored, scale=scale)
    operands = [new if i == contraction.operand else value for i, value in enumerate(values)]
    return jaxpr.bind(eqn, [weight(value) for value in operands])[0]


def _report(targets: dict[Site, Target], results: dict[Site, Result]) -> None:
    """Raises for the first layer that is not finite, and warns of what kept its `g`. While tracing, it only warns."""
    paths = [targets[site].leaf.path for site in targets if site in results]
    found = [(results[site].constant, results[site].finite) for site in targets if site in results]
    missing = [targets[site].leaf.path for site in targets if site not in results]
    if missing:
        _warn(f"init_from_data left {', '.join(missing)} as they were: the program does not contract them as they are")
    if is_traced(found):
        # The numbers are known when the compiled program runs.
        jax.debug.callback(lambda found: _warn(_problems(paths, found)), found)
        return
    for path, (_, finite) in zip(paths, found, strict=True):
        if not finite.all():
            raise ValueError(
                f"init_from_data: the pre-activations of {path!r} are NaN or infinite, and no layer's before. Look for "
                "NaN in the batch and in the parameters up to there, and for numbers that leave the range of the dtype "
                "that this layer computes in (for small data, the weight has to be large)."
            )
    _warn(_problems(paths, found))


def _problems(paths: list[str], found: Sequence[tuple[jax.Array, jax.Array]]) -> str:
    """The warning about layers of which something was left as it was, from (constant, finite) of each; or nothing."""
    lines = []
    for path, (constant, finite) in zip(paths, found, strict=True):
        if not finite.all():
            lines.append(f"  {path}: its pre-activations are NaN or infinite")
        elif constant.sum():
            lines.append(f"  {path}: {constant.sum()} of its features are constant on this batch")
    return "init_from_data left g and biases as they were here:\n" + "\n".join(lines) if lines else ""


def _warn(message: str, stacklevel: int = 4) -> None:
    """A warning about the line that called the public function, `stacklevel` calls up from here."""
    if message:
        warnings.warn(message, UserWarning, stacklevel=stacklevel)


def _renewed(params: Params, targets: dict[Site, Target], results: dict[Site, Result]) -> Params:
    """The parameters with their new `g` and biases, in their boxes."""
    _, leaves, treedef = flatten(params)
    for site, result in results.items():
        target = targets[site]
        node = target.node
        g = _unstacked(result.g, target.use.view).astype(unbox(node.g).dtype)
        leaves[target.leaf.position] = dataclasses.replace(node, g=rebox(node.g, _in_place_of(unbox(node.g), g)))
        if target.bias and result.bias is not None:
            leaf, bias = target.bias
            new = _unstacked(result.bias, bias.view).astype(leaf.aval.dtype)
            old = leaves[leaf.position]
            leaves[leaf.position] = rebox(old, _in_place_of(unbox(old), new))
    return jax.tree.unflatten(treedef, leaves)


def _in_place_of(old: ArrayLike, new: jax.Array) -> jax.Array:
    """`new` where `old` is. Of a tracer without explicit axes that is not known, and the compiler decides."""
    if isinstance(old, jax.Array) and not isinstance(old, jax.core.Tracer) and not isinstance(new, jax.core.Tracer):
        return jax.device_put(new, old.sharding) if old.committed else new
    return _as_explicitly_sharded(new, old)


def _as_explicitly_sharded(x: jax.Array, other: ArrayLike) -> jax.Array:
    """`x`, sharded as `other` is in a mesh with explicit axes."""
    sharding = jax.typeof(other).sharding
    explicit = jax.sharding.AxisType.Explicit in getattr(sharding.mesh, "axis_types", ())
    return jax.sharding.reshard(x, sharding) if explicit else x


def _unstacked(array: jax.Array, view: View) -> jax.Array:
    """An array that scans stacked along leading axes, with these axes where the parameter has them."""
    axes = [axis for _, dim in view.slices for axis, _ in dim if axis is not None]
    array = jnp.squeeze(array, [len(axes) + axis for axis in axes])
    return jnp.moveaxis(array, range(len(axes)), axes)
