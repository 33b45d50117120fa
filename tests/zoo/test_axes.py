"""`infer_axes` over the whole model zoo: the hand-written answers, however the function is wrapped."""

import functools

import jax
import pytest

import wn_jax as wn
from tests.zoo import ZOO
from wn_jax import infer_axes, weight_uses

every_model = pytest.mark.parametrize("name", ZOO)


@functools.cache
def zoo(name):
    return ZOO[name]()


@every_model
def test_the_answers_are_those_written_by_hand(name):
    model = zoo(name)
    found = weight_uses(model.fn)(model.params, model.x)
    assert {use.path: use.reduction for use in found if use.reduction} == model.axes
    assert {use.path: str(use.reason) for use in found if use.reason} == model.left
    assert {use.path for use in found if use.reduction and use.feature is None} == set()
    for use in found:
        if use.reduction:
            axes = [*use.reduction, *use.feature, *use.batch]
            assert sorted(axes) == list(range(-len(use.shape), 0)), f"{use.path}: each axis is of one kind"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if i % 4 == 0 else pytest.mark.slow) for i, name in enumerate(ZOO)]
)
def test_abstract_arguments_and_nodes_give_the_same(name):
    model = zoo(name)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, jax.Array) else leaf,
        (model.params, model.x),
    )
    assert infer_axes(model.fn)(*abstract) == model.axes
    assert infer_axes(model.fn)(wn.reparameterize(model.params, model.axes), model.x) == model.axes


def flat(model):
    """`fn` of a list of arrays, and the path of each."""
    leaves, treedef = jax.tree.flatten(model.params)
    numbers = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape")]
    paths = [use.path for use in weight_uses(model.fn)(model.params, model.x)]
    assert len(paths) == len(numbers)

    def fn(arrays, x):
        merged = list(leaves)
        for i, array in zip(numbers, arrays, strict=True):
            merged[i] = array
        return model.fn(jax.tree.unflatten(treedef, merged), x)

    return fn, [leaves[i] for i in numbers], paths


def custom_jvp(fn):
    wrapped = jax.custom_jvp(fn)
    wrapped.defjvp(lambda primals, tangents: (fn(*primals), fn(*primals)))
    return wrapped


def custom_vjp(fn):
    wrapped = jax.custom_vjp(fn)
    wrapped.defvjp(lambda *args: (fn(*args), args), lambda args, _: args)
    return wrapped


WRAPPERS = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "custom_jvp": custom_jvp,
    "custom_vjp": custom_vjp,
    "vmap": lambda fn: jax.vmap(fn, in_axes=(None, 0)),
    "scan": lambda fn: lambda params, x: jax.lax.scan(lambda c, x: (c, fn(params, x)), None, x)[1],
}


# There `vmap` makes of each branch's weights a choice by data: `select(index == i, w, stop_gradient(w))`.
NOT_PROVED = {("plain_branches", "vmap")}


@every_model
def test_the_answer_does_not_depend_on_what_is_around(name):
    model = zoo(name)
    fn, arrays, paths = flat(model)
    wrong = {}
    for wrapper, wrap in WRAPPERS.items():
        x = model.x[None].repeat(2, 0) if wrapper in ("vmap", "scan") else model.x
        found = infer_axes(wrap(fn))(arrays, x)
        by_path = {paths[int(i)]: axes for i, axes in found.items()}
        if (name, wrapper) in NOT_PROVED:
            assert by_path.items() <= model.axes.items()
        elif by_path != model.axes:
            wrong[wrapper] = by_path
    assert not wrong
