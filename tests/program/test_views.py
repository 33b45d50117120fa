"""Views and contractions, against what the operations do to numbers."""

import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

from wn_jax._program.contractions import contractions
from wn_jax._program.jaxpr import trace
from wn_jax._program.moves import move
from wn_jax._program.views import Atom, Dim, Place, View

settings = hypothesis.settings(deadline=None, derandomize=True)
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).filter(lambda s: math.prod(s) <= 64).map(tuple)


def equations(fn, *arrays):
    return trace(fn, arrays, {}, "in a test").body.jaxpr.eqns


def draw_reshape(data, shape):
    """Any shape of the same size, often one that merges or splits a dimension or adds one of size 1."""
    kind, new = data.draw(st.sampled_from(["merge", "split", "one", "any"])), list(shape)
    if kind == "merge" and len(new) > 1:
        i = data.draw(st.integers(0, len(new) - 2))
        new[i : i + 2] = [new[i] * new[i + 1]]
    elif kind == "split":
        i = data.draw(st.integers(0, len(new) - 1))
        n = data.draw(st.sampled_from([n for n in range(1, new[i] + 1) if new[i] % n == 0]))
        new[i : i + 1] = [n, new[i] // n]
    elif kind == "any":
        new, rest = [], math.prod(shape)
        while rest > 1:
            new.append(data.draw(st.sampled_from([n for n in range(1, rest + 1) if rest % n == 0])))
            rest //= new[-1]
    else:
        new.insert(data.draw(st.integers(0, len(new))), 1)
    return new[:6] + [math.prod(new[6:])] * (len(new) > 6)


def draw_operation(data, shape):
    """(kind, by JAX, by NumPy): an operation on arrays of this shape."""
    rank = len(shape)
    one = data.draw(st.integers(0, rank - 1)) if rank else None
    kinds = ["transpose", "reshape", "reshape", "expand", "broadcast", "neg", "convert"]
    kinds += ["rev", "slice", "dynamic_slice", "concatenate", "tile", "split", "unstack"] if rank else []
    kinds += ["stack"]
    kinds += ["squeeze", "repeat"] if rank and shape[one] == 1 else []
    kind = data.draw(st.sampled_from(kinds))
    if kind == "transpose":
        order = data.draw(st.permutations(range(rank)))
        return kind, lambda x: lax.transpose(x, order), lambda x: np.transpose(x, order)
    if kind == "reshape":
        new = draw_reshape(data, shape) if rank else [1]
        return kind, lambda x: lax.reshape(x, new), lambda x: np.reshape(x, new)
    if kind == "squeeze":
        return kind, lambda x: lax.squeeze(x, (one,)), lambda x: np.squeeze(x, one)
    if kind == "repeat":
        new = [3 if i == one else n for i, n in enumerate(shape)]
        return kind, lambda x: lax.broadcast_in_dim(x, new, range(rank)), lambda x: np.broadcast_to(x, new)
    if kind in ("expand", "broadcast"):
        at, n = data.draw(st.integers(0, rank)), 1 if kind == "expand" else 2
        new, kept = [*shape[:at], n, *shape[at:]], [i for i in range(rank + 1) if i != at]
        return (
            kind,
            lambda x: lax.broadcast_in_dim(x, new, kept),
            lambda x: np.repeat(np.expand_dims(x, at), n, axis=at),
        )
    if kind == "rev":
        return kind, lambda x: lax.rev(x, (one,)), lambda x: np.flip(x, one)
    if kind in ("slice", "dynamic_slice"):
        n = data.draw(st.integers(1, shape[one]))
        start = data.draw(st.integers(0, shape[one] - n))
        stride = data.draw(st.sampled_from([1, 2])) if kind == "slice" else 1
        where = tuple(slice(start, start + n, stride) if i == one else slice(None) for i in range(rank))
        starts, sizes = [start * (i == one) for i in range(rank)], [n if i == one else m for i, m in enumerate(shape)]
        if kind == "dynamic_slice":
            return kind, lambda x: lax.dynamic_slice(x, starts, sizes), lambda x: x[where]
        limits = [start + n if i == one else m for i, m in enumerate(shape)]
        strides = [stride if i == one else 1 for i in range(rank)]
        return kind, lambda x: lax.slice(x, starts, limits, strides), lambda x: x[where]
    if kind == "concatenate":
        return kind, lambda x: lax.concatenate([x, x], one), lambda x, *y: np.concatenate([x, *(y or [x])], one)
    if kind == "stack":
        at = data.draw(st.integers(0, rank))
        return kind, lambda x: jnp.stack([x, x], at), lambda x, *y: np.stack([x, *(y or [x])], at)
    if kind == "tile":
        times = [2 if i == one else 1 for i in range(rank)]
        return kind, lambda x: jnp.tile(x, times), lambda x: np.tile(x, times)
    if kind == "split":
        n = data.draw(st.integers(1, shape[one]))
        first = [slice(n) if i == one else slice(None) for i in range(rank)]
        return kind, lambda x: jnp.split(x, [n], one)[0], lambda x: x[tuple(first)]
    if kind == "unstack":
        return kind, lambda x: jnp.unstack(x, axis=one)[0], lambda x: np.take(x, 0, one)
    return kind, {"neg": lax.neg, "convert": lambda x: x.astype(jnp.bfloat16)}[kind], lambda x: x


def follow(fn, view, shape):
    """The view of `fn` of an array of this shape, or `None`."""
    for eqn in equations(fn, jax.ShapeDtypeStruct(shape, jnp.float32)):
        if view is not None:
            facts = [var.val.item() if hasattr(var, "val") else None for var in eqn.invars]
            view = move(eqn, view, Place(facts=facts))
    return view


def assert_true(view, coordinates):
    """`coordinates[a]` of each entry is where along source axis `a` it comes from; -1 where it comes from elsewhere."""
    assert [dim.size for dim in view.dims] == list(coordinates.shape[1:])
    window = tuple(slice(dim.before, dim.before + dim.content) for dim in view.dims)
    inside = coordinates[:, *window]
    assert (inside >= 0).all(), "other arrays stand in what is said to be the source's"
    assert np.prod(inside.shape[1:]) == (coordinates >= 0).all(0).sum(), "more of the source is there"
    atoms = [atom for dim in view.dims for atom in dim.atoms]
    for axis, place in enumerate(view.places(atoms)):
        found = inside[axis].reshape([atom.size for atom in atoms])
        np.testing.assert_array_equal(np.broadcast_to(place, found.shape), found, f"along axis {axis}")
        assert (axis in view.partial) == (set(np.unique(found)) != set(range(view.shape[axis])))


@hypothesis.settings(settings, max_examples=150)
@hypothesis.given(data=st.data(), shape=shapes)
def test_a_view_says_where_its_numbers_are_in_the_source(data, shape):
    view, coordinates = View.of("w", shape), np.indices(shape)
    for _ in range(data.draw(st.integers(1, 4))):
        kind, by_jax, by_numpy = draw_operation(data, coordinates.shape[1:])
        hypothesis.assume(coordinates[0].size <= 512)
        hypothesis.assume(
            kind not in ("concatenate", "stack") or len(set(coordinates.shape[1:])) == coordinates.ndim - 1
        )
        view = follow(by_jax, view, coordinates.shape[1:])
        if view is None:
            assert kind in ("reshape", "slice", "dynamic_slice", "split", "unstack", "tile")
            return
        others = [np.full(coordinates.shape[1:], -1)] if kind in ("concatenate", "stack") else []
        coordinates = np.stack([by_numpy(c, *others) for c in coordinates])
        if view.is_empty:
            assert (coordinates < 0).all()
            return
        assert_true(view, coordinates)


@hypothesis.settings(settings, max_examples=80)
@hypothesis.given(data=st.data(), shape=shapes)
def test_an_array_goes_to_its_source_and_back(data, shape):
    source = np.arange(math.prod(shape)).reshape(shape)
    reduced = frozenset(data.draw(st.sets(st.integers(0, len(shape) - 1))))
    small = source.max(axis=tuple(reduced), keepdims=True)
    view, array = View.of("w", shape), source
    for _ in range(data.draw(st.integers(1, 4))):
        kind, by_jax, by_numpy = draw_operation(data, array.shape)
        after = follow(by_jax, view, array.shape)
        if kind not in ("concatenate", "stack", "tile", "repeat", "broadcast") and after is not None:
            view, array = after, by_numpy(array)
    grid = view.take(jnp.asarray(source), frozenset())
    np.testing.assert_array_equal(grid.reshape(array.shape), array)
    back = view.put(jnp.full(shape, -1), grid, frozenset())
    np.testing.assert_array_equal(back, np.where(np.isin(source, array), source, -1))
    laid_out = view.take(jnp.asarray(small), reduced)
    again = view.put(jnp.full(small.shape, -1), laid_out, reduced)
    held = np.isin(source, array).any(axis=tuple(reduced), keepdims=True)
    np.testing.assert_array_equal(again, np.where(held, small, -1))


def dims(fn, shape):
    view = follow(fn, View.of("w", shape), shape)
    return view and [[atom.axis for atom in dim.atoms] for dim in view.dims]


def test_the_operations_that_must_be_understood():
    assert dims(lambda x: x.reshape(6, 4), (2, 3, 4)) == [[0, 1], [2]]
    assert dims(lambda x: x.transpose(1, 2, 0).reshape(12, 2).T, (2, 3, 4)) == [[0], [1, 2]]
    assert dims(lambda x: x.reshape(6, 4).reshape(2, 3, 4), (2, 3, 4)) == [[0], [1], [2]]
    assert dims(lambda x: x.reshape(6, 1, 4)[:, 0], (2, 3, 4)) == [[0, 1], [2]]
    assert dims(lambda x: x.reshape(2, 1, 3, 1), (2, 1, 3)) == [[0], [1], [2], [None]]
    assert dims(lambda x: x[1], (2, 3, 4)) == [[1], [2]]
    assert dims(lambda x: lax.rev(x.astype(jnp.bfloat16)[None], (1,)), (2, 3)) == [[None], [0], [1]]
    assert dims(lambda x: jnp.concatenate([x, x], 1), (2, 3)) == [[0], [1]]
    assert dims(lambda x: jnp.broadcast_to(x, (5, 2, 3)), (1, 3)) == [[None], [None], [1]]
    assert dims(lambda x: x.reshape(2, 3, 2), (2, 6)) == [[0], [1], [1]]
    assert dims(lambda x: x.reshape(3, 4), (2, 6)) is None  # mixes them
    assert dims(lambda x: jnp.split(x, 3, 1)[0], (2, 6)) == [[0], [1]]
    assert dims(lambda x: jnp.unstack(x)[0], (2, 6)) == [[1]]
    assert dims(lambda x: jnp.tile(x, (3, 1)), (2, 6)) == [[None, 0], [1]]
    assert dims(lambda x: x.astype(int), (2, 6)) is None
    assert dims(jnp.sin, (2, 6)) is None


def test_a_slice_of_a_scan_is_stacked_to_what_it_was():
    view = View.of("w", (5, 2, 3))
    inside = view.sliced("outer").sliced("inner")
    assert inside.dims == (Dim((Atom(2, 3),)),)
    assert inside.stacked("inner", 2).stacked("outer", 5) == view
    assert view.stacked("other", 7).dims == (Dim.broadcast(7), *view.dims)
    assert view.sliced("outer").stacked("other", 7).dims[0] == Dim.broadcast(7)
    assert view.stacked("other", 7).broadcasts([0])
    assert not view.broadcasts([0, 1, 2])
    assert view.stacked("other", 7).axes([0, 1, 3]) == {0, 2}


def test_what_is_cut_out_from_among_others_is_alone_again():
    joined = follow(lambda x: jnp.concatenate([x, np.ones((4, 3), np.float32)]), View.of("w", (2, 3)), (2, 3))
    assert joined.dims[0] == Dim((Atom(0, 2),), 0, 4)
    assert follow(lambda x: x[:2], joined, (6, 3)) == View.of("w", (2, 3))
    assert follow(lambda x: x[2:], joined, (6, 3)).is_empty
    assert follow(lambda x: x[1:3], joined, (6, 3)).dims[0] == Dim((Atom(0, 1),), 0, 1)
    assert follow(lambda x: x.reshape(18), joined, (6, 3)) is None


def check_contraction(eqn, fn, arrays, contraction):
    """Without one index of a contracted dimension each output changes; without one of a kept one, its slice is zero."""
    side, operand = contraction.operand, arrays[contraction.operand]
    kept = dict(contraction.kept)
    assert sorted([*kept, *contraction.contracted]) == list(range(operand.ndim))
    assert len(set(kept.values())) == len(kept)
    assert set(contraction.batch) <= set(kept)
    out = np.asarray(fn(*arrays))
    for dim, size in enumerate(operand.shape):
        factor = np.ones([size if i == dim else 1 for i in range(operand.ndim)], np.float32)
        factor.ravel()[-1] = 0
        less = np.asarray(fn(*(array * factor if i == side else array for i, array in enumerate(arrays))))
        if dim not in kept:
            assert (less < out).all(), f"dimension {dim} is not summed over in each output"
        else:
            assert out.shape[kept[dim]] == size
            expected = out * factor.reshape([size if i == kept[dim] else 1 for i in range(out.ndim)])
            np.testing.assert_allclose(less, expected, rtol=1e-5)


def positive(seed, shape):
    return np.random.default_rng(seed).uniform(0.5, 1.5, shape).astype(np.float32)


@hypothesis.settings(settings, max_examples=15)
@hypothesis.given(data=st.data(), batch=st.integers(0, 2), summed=st.integers(0, 2))
def test_contractions_of_a_dot_general(data, batch, summed):
    sizes = [2, 3, 2, 3][: batch + summed]
    where, arrays = [], []
    for side in (0, 1):
        rank = batch + summed + data.draw(st.integers(0, 2))
        order = data.draw(st.permutations(range(rank)))
        shape = [2 + side] * rank
        for dim, size in zip(order, sizes, strict=False):
            shape[dim] = size
        where.append(order)
        arrays.append(positive(side, shape))
    numbers = (
        tuple(tuple(order[batch : batch + summed]) for order in where),
        tuple(tuple(order[:batch]) for order in where),
    )
    fn = jax.jit(lambda a, b: lax.dot_general(a, b, numbers))
    (eqn,) = equations(lambda a, b: lax.dot_general(a, b, numbers), *arrays)
    found = list(contractions(eqn))
    assert [contraction.operand for contraction in found] == [0, 1]
    for contraction in found:
        check_contraction(eqn, fn, arrays, contraction)
        assert contraction.batch == numbers[1][contraction.operand]


@hypothesis.settings(settings, max_examples=10)
@hypothesis.given(data=st.data(), groups=st.sampled_from([1, 2, 4]), spatial=st.integers(1, 2), batches=st.booleans())
def test_contractions_of_a_convolution(data, groups, spatial, batches):
    image, kernel, output = (tuple(data.draw(st.permutations(range(spatial + 2)))) for _ in range(3))
    counts = {"batch_group_count" if batches else "feature_group_count": groups}
    image_shape = {image[0]: 4 if batches else 3, image[1]: 2 if batches else 4}
    kernel_shape = {kernel[0]: 8, kernel[1]: 2 if batches else 4 // groups}
    for i in range(spatial):
        image_shape[image[2 + i]], kernel_shape[kernel[2 + i]] = 5, 2
    arrays = [positive(i, [shape[d] for d in sorted(shape)]) for i, shape in enumerate((image_shape, kernel_shape))]
    numbers = lax.ConvDimensionNumbers(image, kernel, output)

    def conv(x, w):
        return lax.conv_general_dilated(x, w, (1,) * spatial, "VALID", dimension_numbers=numbers, **counts)

    (eqn,) = equations(conv, *arrays)
    (contraction,) = contractions(eqn)
    assert contraction.operand == 1
    check_contraction(eqn, jax.jit(conv), arrays, contraction)
