"""`Factored` arrays: what is done to one is done to the weight that it stands for."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax import lax

from tests.program.test_views import draw_operation, equations, settings, shapes
from wn_jax._program.factored import Factored
from wn_jax._program.moves import moved
from wn_jax._program.products import is_scaling, masked, scaled


def factored(data, shape, dtype=jnp.float32):
    small = [n if data.draw(st.booleans()) else 1 for n in shape]
    rng = np.random.default_rng(0)
    scale = jnp.asarray(rng.uniform(0.3, 3, small), jnp.float32)
    return Factored(jnp.asarray(rng.standard_normal(shape), dtype), scale, dtype)


@hypothesis.settings(settings, max_examples=25)
@hypothesis.given(data=st.data(), shape=shapes)
def test_a_moved_factored_is_the_moved_weight(data, shape):
    value = factored(data, shape)
    for _ in range(data.draw(st.integers(1, 3))):
        kind, fn, _ = draw_operation(data, value.v.shape)
        expected = fn(value.weight())
        found = equations(fn, jax.ShapeDtypeStruct(value.v.shape, value.dtype))
        if not found:
            continue  # it changes nothing
        (*_, eqn) = found
        literals = [var.val for var in eqn.invars[1:]] if kind == "dynamic_slice" else []
        results = moved(eqn, [value, value] if kind in ("concatenate", "stack") else [value, *literals])
        if results is None:
            assert kind in ("reshape", "concatenate", "stack", "convert")
            return
        result = results[0]
        assert result.dtype == expected.dtype
        assert result.scale.ndim == result.v.ndim
        assert all(n in (1, m) for n, m in zip(result.scale.shape, result.v.shape, strict=True))
        np.testing.assert_array_equal(result.weight(), expected)
        value = result


MOVES = {
    "slice": lambda x: lax.slice(x, (1, 0, 1), (4, 2, 3), (2, 1, 1)),
    "dynamic_slice": lambda x: lax.dynamic_slice(x, (1, 0, 2), (2, 2, 1)),
    "rev": lambda x: lax.rev(x, (0, 2)),
    "transpose": lambda x: lax.transpose(x, (2, 0, 1)),
    "broadcast": lambda x: lax.broadcast_in_dim(x, (4, 5, 2, 3), (0, 2, 3)),
    "split": lambda x: lax.reshape(x, (2, 2, 2, 3)),
    "transpose and reshape": lambda x: lax.reshape(x, (3, 2, 2, 2), (2, 1, 0)),
    "tile": lambda x: jnp.tile(x, (2, 1, 1)),
    "stop_gradient": lax.stop_gradient,
}


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("small", [(4, 1, 3), (1, 2, 1), (1, 1, 1), (4, 2, 1)])
def test_the_operations_that_must_be_understood(name, small):
    rng = np.random.default_rng(0)
    v, scale = (jnp.asarray(rng.uniform(0.3, 3, shape), jnp.float32) for shape in ((4, 2, 3), small))
    value = Factored(v, scale, jnp.dtype("float32"))
    (*_, eqn) = equations(MOVES[name], v)
    (result,) = moved(eqn, [value, *(var.val for var in eqn.invars[1:])])
    np.testing.assert_array_equal(result.weight(), MOVES[name](value.weight()))
    assert result.scale.size <= 2 * scale.size  # moved, not multiplied out


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_concatenations_of_factored_and_plain_arrays(dtype):
    rng = np.random.default_rng(0)
    left, right = (jnp.asarray(rng.standard_normal((3, n)), dtype) for n in (2, 4))
    columns = Factored(left, jnp.array([[2.0, 0.3]]), dtype)
    constant = Factored(right, jnp.array([[5.0]]), dtype)
    (eqn,) = equations(lambda a, b: lax.concatenate([a, b], 1), left, right)
    for values in ([columns, constant], [columns, right], [left, constant]):
        (found,) = moved(eqn, values)
        expected = jnp.concatenate([v.weight() if isinstance(v, Factored) else v for v in values], 1)
        np.testing.assert_array_equal(found.weight(), expected)
    by_row = Factored(right, jnp.ones((3, 1)), dtype)
    assert moved(eqn, [columns, by_row]) is None  # its scale would be as large as it is


@pytest.mark.parametrize("small", [(4, 1, 6), (1, 2, 1), (1, 1, 1)])
@pytest.mark.parametrize(
    "fn", [lambda x: jnp.split(x, [1, 4], 2), lambda x: jnp.unstack(x, axis=0), lambda x: jnp.unstack(x, axis=1)]
)
def test_each_part_of_a_factored_is_that_part_of_the_weight(fn, small):
    rng = np.random.default_rng(0)
    v, scale = (jnp.asarray(rng.uniform(0.3, 3, shape), jnp.float32) for shape in ((4, 2, 6), small))
    value = Factored(v, scale, jnp.dtype("float32"))
    (*_, eqn) = equations(fn, v)
    for found, expected in zip(moved(eqn, [value]), fn(value.weight()), strict=True):
        np.testing.assert_array_equal(found.weight(), expected)
        assert found.scale.size <= scale.size


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_mask_is_taken_by_v(dtype):
    rng = np.random.default_rng(0)
    value = Factored(jnp.asarray(rng.standard_normal((3, 4)), jnp.float32), jnp.array([[0.5, 2.0, 3.0, 0.3]]), dtype)
    mask = jnp.asarray(rng.integers(0, 2, (3, 4)), dtype)
    zeros = jnp.zeros((3, 4), dtype)
    for fn, operands in (
        (lambda w, m: w * m, [value, mask]),
        (lambda w, m: m * w, [mask, value]),
        (lambda w, m: lax.select(m, w, zeros), [mask > 0, zeros, value]),
        (lambda w, m: lax.select(m, zeros, w), [mask > 0, value, zeros]),
    ):
        chosen = mask > 0 if len(operands) == 3 else mask
        (*_, eqn) = equations(fn, value.weight(), chosen)
        np.testing.assert_array_equal(masked(eqn, operands).weight(), fn(value.weight(), chosen))
        assert masked(eqn, operands).scale.shape == (1, 4)


def test_a_factored_times_a_scalar():
    value = Factored(jnp.array([[1.0, -2.0]]), jnp.array([[3.0, 0.5]]), jnp.dtype("float32"))
    cases = {
        lambda w, s: w * s: (value, 4.0),
        lambda w, s: s * w: (value, 4.0),
        lambda w, s: w / s: (value, 4.0),
        lambda w, s: w * s[:, None]: (value, jnp.array([4.0])),
    }
    for fn, (_, scalar) in cases.items():
        (*_, eqn) = equations(fn, value.v, jnp.asarray(scalar))
        operands = [
            value if aval == (1, 2) else jnp.reshape(scalar, aval) for aval in (v.aval.shape for v in eqn.invars)
        ]
        np.testing.assert_allclose(scaled(eqn, operands).weight(), fn(value.weight(), jnp.asarray(scalar)), rtol=1e-6)
    (eqn,) = equations(lambda s, w: s / w, jnp.float32(4), value.v)
    assert scaled(eqn, [jnp.float32(4), value]) is None
    assert not is_scaling(eqn, 1)
    (eqn,) = equations(lambda w, x: w * x, value.v, value.v)
    assert scaled(eqn, [value, value.v]) is None
