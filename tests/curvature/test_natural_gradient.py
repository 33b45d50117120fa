"""The natural gradient, against dense solutions; and what is said where there is none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wn_jax as wn
from tests.curvature.problems import Recorded, flat, problem, relative, with_spectrum
from wn_jax import curvature
from wn_jax.curvature import natural_gradient

ROWS = 60

pytestmark = pytest.mark.filterwarnings("error")
RANDOM = np.random.default_rng(3)
SINGULAR = np.concatenate([np.zeros(20), np.linspace(1, 5, 40)])


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def test_it_solves_the_damped_system():
    """With the Fisher matrix `J'J / examples` of the normal likelihood."""
    p = problem("tanh", "squared", "nodes")
    own = curvature.fisher(wn.wrap(p.apply), "normal")(p.params, p.batch)
    dense = np.einsum("nap,naq->pq", p.jacobian, p.jacobian) / len(p.outputs)
    gradient = np.einsum("nap,na->p", p.jacobian, p.outputs - p.batch[1]) / len(p.outputs)
    for damping in (1e-1, 1e-4):
        solution = natural_gradient(own, p.unravel(jnp.asarray(gradient)), damping, tolerance=1e-11)
        damped = dense + damping * np.eye(len(dense))
        assert solution.converged
        assert relative(flat(solution.value), np.linalg.solve(damped, gradient)) < 1e-6
        left = np.linalg.norm(gradient - damped @ flat(solution.value)) / np.linalg.norm(gradient)
        assert left <= 1e-11
        np.testing.assert_allclose(solution.residual, left, atol=1e-13)


@pytest.mark.slow
def test_it_is_the_same_direction_of_the_function_in_any_coordinates():
    """Without damping, what it changes of the outputs, `J x`, is one for plain weights and for their nodes.

    F is singular, so that x is not unique, but `J x` is.
    """
    changes = []
    for form in ("plain", "nodes"):
        p = problem("tanh", "squared", form)
        own = curvature.fisher(wn.wrap(p.apply), "normal")(p.params, p.batch)
        solution = natural_gradient(own, p.unravel(jnp.asarray(p.gradients.mean(axis=0))), 0.0, tolerance=1e-9)
        changes.append(p.jacobian @ flat(solution.value))
    assert relative(changes[1], changes[0]) < 1e-5


def test_a_gradient_in_the_range_of_a_singular_matrix_needs_no_damping():
    own = with_spectrum(SINGULAR)
    dense = np.asarray(own.chunks[0])
    gradient = dense @ RANDOM.standard_normal(ROWS)
    solution = natural_gradient(own, own.unravel(jnp.asarray(gradient)), damping=0.0, tolerance=1e-10)
    assert solution.converged
    expected = np.linalg.pinv(dense, rcond=1e-10, hermitian=True) @ gradient  # the shortest of the solutions
    assert relative(flat(solution.value), expected) < 1e-8


def test_a_gradient_outside_of_the_range_is_said_and_stays_finite():
    own = with_spectrum(SINGULAR)
    gradient = own.unravel(jnp.asarray(RANDOM.standard_normal(ROWS)))
    with pytest.warns(UserWarning, match="More damping"):
        solution = natural_gradient(own, gradient, damping=0.0)
    assert not solution.converged
    assert solution.residual > 0.1
    assert np.isfinite(flat(solution.value)).all()


def test_a_negative_matrix_is_said():
    own = with_spectrum(np.linspace(-2, -1, ROWS))
    with pytest.warns(UserWarning, match="singular or not positive"):
        solution = natural_gradient(own, own.unravel(jnp.ones(ROWS)), damping=0.5)
    assert not solution.converged


def test_too_few_steps_are_said_and_give_the_best_of_their_krylov_space():
    """Two steps of conjugate gradients minimize `x'Ax/2 - g'x` over the span of g and A g."""
    own = with_spectrum(np.linspace(1, 100, ROWS))
    dense, gradient = np.asarray(own.chunks[0]), RANDOM.standard_normal(ROWS)
    recorded = Recorded(own)
    with pytest.warns(UserWarning, match="max_steps was reached"):
        solution = natural_gradient(recorded, own.unravel(jnp.asarray(gradient)), damping=1.0, max_steps=2)
    assert (solution.steps, solution.converged) == (2, False)
    assert len(recorded.vectors) == 3  # one for the residual
    damped = dense + np.eye(ROWS)
    span = np.stack([gradient, damped @ gradient], axis=1)
    best = span @ np.linalg.solve(span.T @ damped @ span, span.T @ gradient)
    assert relative(flat(solution.value), best) < 1e-10
    np.testing.assert_allclose(
        solution.residual, np.linalg.norm(gradient - damped @ best) / np.linalg.norm(gradient), rtol=1e-9
    )


def test_a_gradient_of_zero_has_a_step_of_zero():
    own = Recorded(with_spectrum(SINGULAR))
    solution = natural_gradient(own, own.unravel(jnp.zeros(ROWS)), damping=0.0)
    np.testing.assert_array_equal(flat(solution.value), np.zeros(ROWS))
    assert (solution.residual, solution.steps, solution.converged, own.vectors) == (0.0, 0, True, [])


@pytest.mark.parametrize("scale", [1e-24, 1e-12, 1e12, 1e24])
def test_the_solution_scales_with_the_gradient(scale):
    """In float32, as the tolerance is relative."""
    own = with_spectrum(np.linspace(1, 3, ROWS), np.float32)
    gradient = RANDOM.standard_normal(ROWS)
    solution = natural_gradient(own, own.unravel(jnp.asarray(scale * gradient, jnp.float32)), 0.1, tolerance=1e-5)
    assert solution.converged
    damped = np.asarray(own.chunks[0], np.float64) + 0.1 * np.eye(ROWS)
    assert relative(flat(solution.value) / scale, np.linalg.solve(damped, gradient)) < 1e-4


def test_it_is_never_worse_than_no_step():
    """A singular matrix in float32, whose rounding conjugate gradients blow up outside of its range."""
    own = with_spectrum(SINGULAR, np.float32)
    gradient = own.unravel(jnp.asarray(RANDOM.standard_normal(ROWS), jnp.float32))
    with pytest.warns(UserWarning, match="did not converge"):
        solution = natural_gradient(own, gradient, damping=0.0, max_steps=200)
    left = flat(gradient) - np.asarray(own.chunks[0], np.float64) @ flat(solution.value)
    assert np.linalg.norm(left) <= np.linalg.norm(flat(gradient)) * (1 + 1e-5)
    assert not solution.converged
