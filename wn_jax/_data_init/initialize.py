"""Data-dependent initialization: each `g` and bias from one batch, in the order of the program.

Source: Salimans & Kingma (2016), section 3, equations 5 and 6: with `g = 1/std` and `b = -mean/std` of what a unit
direction gives on a batch, every pre-activation starts with mean 0 and variance 1.

This file owns `init_from_data` and the run that takes the statistics. Which nodes it sets, `plan` decides.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import jax
import jax.core
import jax.numpy as jnp
from jax.typing import ArrayLike

from wn_jax._boxes import rebox, unbox
from wn_jax._by_path import ByPath
from wn_jax._data_init.grid import Target
from wn_jax._data_init.plan import Plan, check_init_scale, plan
from wn_jax._data_init.statistics import Groups, Statistics, of_batch
from wn_jax._node import WeightNorm
from wn_jax._norms import norm_dtype
from wn_jax._program import jaxpr
from wn_jax._program.contractions import Contraction
from wn_jax._program.factored import Factored, Operand, can_hold_directions, weight
from wn_jax._program.jaxpr import Equation, Input, Site
from wn_jax._program.products import is_scaling
from wn_jax._program.reading import Reading, check_callable, check_position, read
from wn_jax._program.run import Runner, scale_of_operand, scale_of_output, with_v
from wn_jax._tree import flatten, is_traced, with_plain_children
from wn_jax._types import Params, PyTree


def init_from_data(
    fn: Callable[..., PyTree],
    init_scale: ByPath[float] = 1.0,
    argnums: int = 0,
    zeros: Literal["keep", "set"] = "keep",
) -> Callable[..., Params]:
    """Sets `g` and the biases so that each pre-activation of `fn` has mean 0 and a given deviation on one batch.

    Returns a function of `fn`'s own arguments that returns the parameters anew. In the order of the program, each
    matmul or convolution of a node is computed with unit directions, and its mean and standard deviation are taken,
    in float32, over everything but the features; then `g = init_scale / std`, the bias that the program adds to that
    output (if it does, and only there) becomes `-init_scale * mean / std`, and the program goes on with the new output.
    Each of a scanned stack of layers sees what the layers before it give.

    Parts of a weight that the program uses apart, such as the thirds of a fused projection or the layers of a stack,
    are initialized each by itself.

    Some nodes keep their `g`, hence their function, and a warning names them: those that are used at several places or
    at several steps of a loop over time, that a branch or a `while_loop` holds, that are frozen, or whose norm runs
    over other axes than the program sums over. So do features that are constant on the batch, and those of weights
    that are zero on purpose (`g = 0`): a last layer of zeros lets a network or a flow start as the identity. And so do
    biases that the program adds in a way that is not understood, such as one that is scaled or added twice. `v` never
    changes.

    Works in `jit`, where the constant features are told by a `jax.debug.callback`, and with a batch that is sharded
    over devices: its statistics are those of the whole batch. What is set stays on its devices (in `jit`, give the
    `out_shardings`).

    Arguments:
        fn: a function whose argument `argnums` is the parameter tree, with nodes; such as `model.apply`.
        init_scale: the standard deviation that pre-activations get: a number; a dict from the path of a node, or a glob
            of paths, to a number, in which the others have 1 (`{"*/last/kernel": 0.1}`, as PixelCNN++, Glow and IAF
            need); or a function from a path to a number. Of what a dict has for a node, the path counts most, and then
            the last glob. In globs, `*` matches any characters, `/` too.
        argnums: the position of the parameters.
        zeros: `"keep"` leaves features that are zero on purpose as they are; `"set"` sets them like all others.

    Raises:
        ValueError: `init_scale` is not positive, or names what is no node; `zeros` is none of its two words; the
            parameters hold no nodes; the call is made inside `shard_map` or `pmap`, on one shard of the batch; a layer
            gets a single sample, of which there is no deviation; or (outside `jit`) a pre-activation is NaN or
            infinite: the first layer is named.
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
    _check_init_scale(init_scale)
    if zeros not in ("keep", "set"):
        raise ValueError(f"zeros must be 'keep' or 'set', for layers that are zero on purpose; got {zeros!r}")

    @functools.wraps(fn)
    def initialize(*args: Any, **kwargs: Any) -> Params:
        check_position((argnums,), args, kwargs)
        _check_whole_batch()
        reading = read(fn, (argnums,), args, kwargs, "to initialize its weights from data.")
        planned = plan(reading, init_scale)
        _warn(planned.left, stacklevel=3)
        inputs = _inputs(reading, planned)
        # Under jit even where the caller is not: a run enters loops and calls only while it is traced.
        found = jax.jit(lambda inputs: _found(reading, planned, zeros == "keep", inputs))(inputs)
        _report(planned, found)
        return _renewed(args[argnums], planned, found)

    return initialize


@functools.partial(jax.tree_util.register_dataclass, data_fields=("g", "constant", "zero", "finite"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Result:
    """The numbers that a target gets. Those of a scanned stack have a slice for each layer."""

    g: jax.Array
    """The magnitudes, on the grid of the weight's view."""
    constant: jax.Array
    """How many of its features are constant on the batch."""
    zero: jax.Array
    """How many others are zero on purpose, and stay so."""
    finite: jax.Array
    """Whether all statistics are."""


def _inputs(reading: Reading, planned: Plan) -> list[Operand]:
    """The program's inputs: of a target, its unit directions and its `g`; of another node, its weight."""
    inputs: list[Input | Factored] = list(reading.program.arrays)
    targets = {target.leaf.input for targets in planned.targets.values() for target in targets}
    for leaf in reading.leaves:
        if leaf.node is None:
            continue
        node = with_plain_children(leaf.node)
        if leaf.input not in targets:
            inputs[leaf.input] = unbox(node.weight())
            continue
        node = cast(WeightNorm, node)
        g = unbox(node.g)
        unit = unbox(dataclasses.replace(node, g=jnp.ones_like(g)).weight())
        inputs[leaf.input] = Factored(unit, g.astype(norm_dtype(unit.dtype)), unit.dtype)
    return [_concrete(value) for value in inputs]


def _check_init_scale(init_scale: ByPath[float]) -> None:
    """Raises where a number is none that pre-activations can have as their deviation. A function is asked later."""
    if isinstance(init_scale, Mapping):
        for path, scale in init_scale.items():
            check_init_scale(scale, f" for {path!r}")
    elif not callable(init_scale):
        check_init_scale(init_scale)


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


def _found(reading: Reading, planned: Plan, keep_zeros: bool, inputs: list[Operand]) -> dict[Site, PyTree]:
    """All that one run of the program finds; see `_Initializer`."""
    runner = _Initializer(reading.masks, planned, keep_zeros)
    runner.run(reading.program.body, inputs)
    return runner.found


class _Initializer(Runner):
    """A run that sets each target's `g` and bias when it gets there, and goes on with what they give.

    `found` holds a `Result` for each target, by the site of its contraction and its number there; and each bias, by the
    site of its addition. Those of a scanned stack have a slice for each layer.
    """

    def __init__(self, masks: frozenset[Site], planned: Plan, keep_zeros: bool) -> None:
        super().__init__(masks)
        self.planned = planned
        self.keep_zeros = keep_zeros
        self.shifts: dict[Site, jax.Array] = {}
        """By the site of a contraction: what is to be added to its output; NaN where that stays."""

    def contract(
        self, eqn: Equation, values: list[Operand], factored: Factored, contraction: Contraction, site: Site
    ) -> jax.Array | None:
        targets = [
            (number, target)
            for number, target in enumerate(self.planned.targets.get(site, ()))
            if target.use.contraction == contraction
        ]
        if not targets:
            return super().contract(eqn, values, factored, contraction, site)
        out = jaxpr.outputs(eqn)[0]
        is_narrow = not can_hold_directions(factored.v.dtype, factored.dtype, out.dtype)
        y = _of_directions(eqn, values, factored, contraction, is_narrow)
        if contraction.group is not None:
            return self.grouped(eqn, values, factored, targets[0], site, y).astype(out.dtype)
        gain = scale_of_output(factored, contraction, y.ndim)
        shift = jnp.full_like(gain, jnp.nan)
        for number, target in targets:
            statistics = of_batch(target.on_grid(y), target.samples)
            result, own_gain, own_shift = self.settled(target, statistics, target.features_on_grid(gain))
            self.found[*site, number] = result
            gain, shift = target.in_output(own_gain, gain), target.in_output(own_shift, shift)
        self.shifts[site] = shift
        if not is_narrow:
            return (y * gain).astype(out.dtype)
        y = _of_weight(eqn, values, factored, contraction, gain)
        self.shift_as_rounded(targets, site, y.astype(gain.dtype))
        return y.astype(out.dtype)

    def shift_as_rounded(self, targets: Sequence[tuple[int, Target]], site: Site, y: jax.Array) -> None:
        """Shifts an output by the mean that it has: of few digits, a weight has another one than unrounded."""
        for number, target in targets:
            mean = of_batch(target.on_grid(y), target.samples).mean
            before = target.features_on_grid(self.shifts[site])
            mean, before = mean + jnp.zeros_like(before), before + jnp.zeros_like(mean)
            self.shifts[site] = target.in_output(jnp.where(jnp.isnan(before), before, -mean), self.shifts[site])
            result = self.found[*site, number]  # NaN where it leaves the range
            self.found[*site, number] = dataclasses.replace(result, finite=result.finite & jnp.isfinite(mean).all())

    def grouped(
        self,
        eqn: Equation,
        values: list[Operand],
        factored: Factored,
        numbered: tuple[int, Target],
        site: Site,
        y: jax.Array,
    ) -> jax.Array:
        """The output of a `ragged_dot`, each of whose groups has statistics and a `g` of its own."""
        number, target = numbered
        groups = Groups.of(weight(values[2]), jaxpr.ragged_rows(eqn), y)
        before = groups.scale_of_output(factored, target.use.contraction, y.ndim)
        statistics = groups.statistics(target.on_grid(y), target.samples, target.grid_dim(groups.rows))
        on_grid = jax.vmap(target.features_on_grid)(before)
        self.found[*site, number], gain, _ = self.settled(target, statistics, on_grid)
        return y * groups.of_each_row(jax.vmap(target.in_output)(gain, before))

    def settled(self, target: Target, statistics: Statistics, before: jax.Array) -> tuple[Result, jax.Array, jax.Array]:
        """The result of a target, the gain of its output and what is to be added to that, NaN where it stays."""
        mean, std, finite = statistics.mean, statistics.std, statistics.finite
        before = _as_explicitly_sharded(before, std)
        # Added zeros: in a mesh with explicit axes, a select needs its operands to be sharded alike.
        before, std = before + jnp.zeros_like(std), std + jnp.zeros_like(before)
        zero = (before == 0) & self.keep_zeros
        keep = statistics.constant | ~finite | zero
        deviation = self.planned.scales[target.leaf.path]
        gain = jnp.where(keep, before, deviation / jnp.where(keep, 1, std))
        result = Result(target.in_view(gain), jnp.sum(statistics.constant & ~zero), jnp.sum(zero), jnp.all(finite))
        return result, gain, jnp.where(keep, jnp.nan, -mean * gain)

    def scaled(self, eqn: Equation, values: list[Operand]) -> Factored | None:
        """The directions take a scalar, as it changes what their `g` has to be."""
        for i, value in enumerate(values):
            if isinstance(value, Factored) and is_scaling(eqn, i) and value.dtype == value.v.dtype:
                arrays = [weight(other) if other is not value else value.v for other in values]
                return dataclasses.replace(value, v=jaxpr.bind(eqn, arrays)[0])
        return None

    def step(self, eqn: Equation, values: list[Operand], site: Site) -> Sequence[Operand]:
        target = self.planned.biases.get(site)
        if target is None or target.contraction not in self.shifts:
            body = jaxpr.call(eqn)
            return super().step(eqn, values, site) if body is None else self.run(body, values, site)
        bias, arrays = target.bias, [weight(value) for value in values]
        shift = target.from_output(self.shifts[target.contraction])
        shift, before = -shift if bias.subtracted else shift, jnp.asarray(arrays[bias.operand])
        first = target.from_operand(before)
        first, shift = first + jnp.zeros_like(shift), shift + jnp.zeros_like(first, shift.dtype)
        new = jnp.where(jnp.isnan(shift), first, shift)
        self.found[site] = new
        arrays[bias.operand] = target.as_operand(new, before)
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


def _report(planned: Plan, found: dict[Site, PyTree]) -> None:
    """Raises for the first layer that is not finite, and warns of what kept its `g`. While tracing, it only warns."""
    keys = {
        (*site, number): target for site, targets in planned.targets.items() for number, target in enumerate(targets)
    }
    paths = [target.leaf.path for key, target in keys.items() if key in found]
    results = [dataclasses.replace(found[key], g=None) for key in keys if key in found]
    if missing := [target.leaf.path for key, target in keys.items() if key not in found]:
        _warn(f"init_from_data left {', '.join(missing)} as they were: the program does not contract them as they are")
    if is_traced(results):
        # The numbers are known when the compiled program runs.
        jax.debug.callback(lambda results: _warn(_problems(paths, results)), results)
        return
    for path, result in zip(paths, results, strict=True):
        if not result.finite.all():
            raise ValueError(
                f"init_from_data: the pre-activations of {path!r} are NaN or infinite, and no layer's before. Look for "
                "NaN in the batch and in the parameters up to there, and for numbers that leave the range of the dtype "
                "that this layer computes in (for small data, the weight has to be large)."
            )
    _warn(_problems(paths, results))


def _problems(paths: list[str], results: Sequence[Result]) -> str:
    """The warning about layers of which something was left as it was; or nothing."""
    lines = []
    for path, result in zip(paths, results, strict=True):
        if not result.finite.all():
            lines.append(f"  {path}: its pre-activations are NaN or infinite")
            continue
        if result.constant.sum():
            lines.append(f"  {path}: {result.constant.sum()} of its features are constant on this batch")
        if result.zero.sum():
            lines.append(
                f"  {path}: {result.zero.sum()} of its features are zero on purpose (g = 0); zeros='set' sets them, too"
            )
    return "init_from_data left g and biases as they were here:\n" + "\n".join(lines) if lines else ""


def _warn(message: str, stacklevel: int = 4) -> None:
    """A warning about the line that called the public function, `stacklevel` calls up from here."""
    if message:
        warnings.warn(message, UserWarning, stacklevel=stacklevel)


def _renewed(params: Params, planned: Plan, found: dict[Site, PyTree]) -> Params:
    """The parameters with their new `g` and biases, in their boxes."""
    _, leaves, treedef = flatten(params)
    for site, targets in planned.targets.items():
        for number, target in enumerate(targets):
            if (*site, number) in found:
                node = leaves[target.leaf.position]
                old = unbox(node.g)
                g = target.renewed(jnp.asarray(old), found[*site, number].g)
                leaves[target.leaf.position] = dataclasses.replace(node, g=rebox(node.g, _in_place_of(old, g)))
    for site, bias in planned.biases.items():
        if site in found:
            box = leaves[bias.leaf.position]
            old = unbox(box)
            leaves[bias.leaf.position] = rebox(box, _in_place_of(old, bias.renewed(jnp.asarray(old), found[site])))
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
