"""Random networks, against the support of the Jacobian: which outputs of its layers does a slice of a weight reach?

Two slices along a reduction axis reach the same pre-activations; two along any other axis reach none together. That is
measured in NumPy, by differences, and knows nothing of programs. What must be found, and what must not be taken, the
networks of `support_programs` know besides.

`SUPPORT_SEEDS=1000:2000 pytest -n0 tests/program/test_support.py -k fresh` tries the networks of these numbers.
"""

import functools
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wn_jax as wn
from tests.program.support_machines import Reach, Value, generic
from tests.program.support_programs import network

DEFAULT, SLOW = range(50), range(50, 250)
FRESH = range(*map(int, os.environ.get("SUPPORT_SEEDS", "0:0").split(":")))


def reached(net, params, x, path):
    """For each axis of a leaf: whether its slices reach the "same" outputs, outputs "apart", or neither ("mixed").

    An axis of size 1 is "either", as it has but one slice. `None` for a leaf that reaches nothing.
    """
    layer, name = path.split("/")

    def taps(weight):
        machine = Reach()
        net(machine, {**params, layer: {**params[layer], name: weight}}, x)
        return np.concatenate(machine.taps)

    weight = params[layer][name]
    base, found = taps(weight), []
    for axis, size in enumerate(weight.shape):
        here = [np.arange(size).reshape(-1, *[1] * (weight.ndim - axis - 1)) == i for i in range(size)]
        hits = np.array([np.abs(taps(weight + 0.1 * generic(weight.shape, 5) * at) - base) > 1e-9 for at in here])
        if not hits.any():
            return None
        apart, same = (hits.sum(0) <= 1).all(), (hits == hits[0]).all()
        found.append("either" if size == 1 else "apart" if apart else "same" if same else "mixed")
    return found


def fits(found, summed):
    """Whether these axes are the reduction axes by what was reached."""
    if found is None:
        return False
    return all(kind in ("either", "same" if axis in summed else "apart") for axis, kind in enumerate(found))


@functools.cache
def examined(seed):
    """`(wrong, missing)`: of each, lines for a person to read."""
    net = network(seed)
    params, x = net.arrays()
    claims = {use.path: use for use in wn.weight_uses(net.program)(*_in_jax(params, x))}
    wrong, missing = [], []
    for path, leaf in net.leaves.items():
        claim, line = claims[path], f"seed {seed}, {path} {leaf.shape} of {net.kind(path)}"
        found = reached(net, params, x, path) if leaf.need != "never" or claim.reduction else None
        if leaf.need != "never" and not fits(found, leaf.summed):
            wrong.append(f"{line}: the generator says {leaf.summed}, but its slices reach {found}")
        if claim.reduction is None:
            missing += [f"{line}: {claim.reason} ({claim.by})"] if leaf.need == "must" else []
        else:
            wrong += [f"{line}: {claim} but {text}" for text in _faults(claim, leaf, found)]
    return wrong, missing


def _faults(claim, leaf, found):
    rank = len(leaf.shape)
    if leaf.need == "never":
        yield "it is no weight"
    if not fits(found, {axis + rank for axis in claim.reduction}):
        yield f"its slices reach {found}"
    if leaf.copies is not None and claim.batch != tuple(axis - rank for axis in leaf.copies):
        yield f"copies are {leaf.copies}"


def _in_jax(params, x):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (params, x))


def check_wrap(seed):
    """`wrap` computes on nodes, wherever the scale goes, what NumPy does on weights made of the same numbers.

    Nodes are all arrays but vectors, whether they are weights or not.
    """
    net = network(seed)
    params, x = net.arrays()
    nodes, plain = _in_jax(params, x)[0], jax.tree.map(np.copy, params)
    for path, leaf in net.leaves.items():
        layer, name = path.split("/")
        v, reduced = params[layer][name], tuple(axis - len(leaf.shape) for axis in leaf.summed or (0,))
        if v.ndim < 2:
            continue
        norm = np.sqrt((v**2).sum(reduced, keepdims=True))
        g = norm * (1 + 0.5 * generic(norm.shape, 6))
        nodes[layer][name] = wn.WeightNorm(*_in_jax(g, 1.5 * v), reduced)
        plain[layer][name] = v * (g / norm)
    scales = ("weight", "output", "auto")
    run = jax.jit(lambda nodes, x: [wn.wrap(net.program, scale=scale)(nodes, x) for scale in scales])
    expected = net(Value(), plain, x)
    for scale, y in zip(scales, run(nodes, jnp.asarray(x, jnp.float32)), strict=True):
        np.testing.assert_allclose(
            y, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max(), err_msg=f"{seed} {scale}"
        )


def test_the_oracle_sees_axes_that_are_wrong():
    for seed in DEFAULT[:20]:
        net = network(seed)
        params, x = net.arrays()
        for path, leaf in net.leaves.items():
            if leaf.need != "must":
                continue
            found = reached(net, params, x, path)
            every = itertools.chain(*(itertools.combinations(range(len(leaf.shape)), n) for n in range(9)))
            fitting = [{axis for axis in axes if leaf.shape[axis] > 1} for axes in every if fits(found, axes)]
            assert fitting
            assert all(axes == {axis for axis in leaf.summed if leaf.shape[axis] > 1} for axes in fitting)


def test_frozen_and_unused_arrays_reach_nothing():
    seen = set()
    for seed in SLOW:
        net = network(seed)
        params, x = net.arrays()
        for path in net.leaves:
            if (name := path.split("/")[1]) in ("frozen", "unused"):
                assert reached(net, params, x, path) is None, (seed, path)
                seen.add(name)
    assert len(seen) == 2


def _lines(seeds, which):
    return "\n".join(line for seed in seeds for line in examined(seed)[which])


def test_no_axis_is_wrong():
    assert not _lines(DEFAULT, 0)


def test_what_must_be_found_is_found():
    assert not _lines(DEFAULT, 1)


@pytest.mark.parametrize("seed", DEFAULT[::5])
def test_the_scale_goes_where_it_changes_nothing(seed):
    check_wrap(seed)


@pytest.mark.slow
def test_no_axis_is_wrong_at_length():
    assert not _lines(SLOW, 0)


@pytest.mark.slow
def test_what_must_be_found_is_found_at_length():
    assert not _lines(SLOW, 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SLOW[::2])
def test_the_scale_goes_where_it_changes_nothing_at_length(seed):
    check_wrap(seed)


@pytest.mark.skipif(not FRESH, reason="SUPPORT_SEEDS says no numbers")
def test_fresh_networks():
    """None wrong, and next to none missing: a mask that enters a `cond` under `vmap` leaves it as data does."""
    wrong, missing = _lines(FRESH, 0), _lines(FRESH, 1)
    assert not wrong, f"{wrong.count('seed')} wrong:\n{wrong}"
    assert missing.count("seed") <= len(FRESH) / 100, missing
