"""Trace and diagonal: exact, or estimates with the errors that theory gives them."""

import jax
import numpy as np
import pytest

from tests.curvature.problems import Recorded, flat, with_spectrum
from wn_jax import curvature

KEY = jax.random.key(0)
ROWS = 60
OWN_VALUES = np.random.default_rng(0).standard_normal(ROWS) + 0.5


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def own():
    return with_spectrum(OWN_VALUES)


@pytest.fixture
def dense(own):
    return np.asarray(own.chunks[0])


@pytest.mark.parametrize("probes", [ROWS, ROWS + 1])
def test_as_many_probes_as_rows_are_exact(own, dense, probes):
    value, error = curvature.trace(own, KEY, probes)
    np.testing.assert_allclose(value, OWN_VALUES.sum(), rtol=1e-12)
    assert error == 0
    values, errors = curvature.diagonal(own, KEY, probes)
    np.testing.assert_allclose(flat(values), np.diag(dense), rtol=1e-12)
    np.testing.assert_array_equal(flat(errors), np.zeros(ROWS))
    assert jax.tree.structure(values) == jax.tree.structure(own.params)


def test_the_trace_is_the_mean_over_signs(own, dense):
    """Its variance for one probe is `2 (||A||^2 - sum a_ii^2)` (Hutchinson)."""
    recorded, probes = Recorded(own), 50
    value, error = curvature.trace(recorded, KEY, probes)
    z = np.array(recorded.vectors)
    samples = np.einsum("si,ij,sj->s", z, dense, z)
    assert z.shape == (probes, ROWS)
    np.testing.assert_array_equal(abs(z), 1)
    np.testing.assert_allclose(value, samples.mean(), rtol=1e-12)
    np.testing.assert_allclose(error, samples.std(ddof=1) / np.sqrt(probes), rtol=1e-12)
    deviation = np.sqrt(2 * (np.sum(dense**2) - np.sum(np.diag(dense) ** 2)) / probes)
    np.testing.assert_allclose(error, deviation, rtol=0.4)
    assert abs(value - OWN_VALUES.sum()) < 4 * deviation


def test_the_diagonal_is_the_mean_over_signs(own, dense):
    """The variance of entry i for one probe is `sum_{j != i} a_ij^2`."""
    recorded, probes = Recorded(own), 50
    values, errors = (flat(tree) for tree in curvature.diagonal(recorded, KEY, probes))
    z = np.array(recorded.vectors)
    samples = z * (z @ dense)
    np.testing.assert_allclose(values, samples.mean(axis=0), rtol=1e-10)
    np.testing.assert_allclose(errors, samples.std(axis=0, ddof=1) / np.sqrt(probes), rtol=1e-10)
    deviations = np.sqrt((np.sum(dense**2, axis=1) - np.diag(dense) ** 2) / probes)
    np.testing.assert_allclose(errors, deviations, rtol=0.5)
    assert (abs(values - np.diag(dense)) < 5 * deviations).all()


@pytest.mark.slow
def test_the_errors_of_a_diagonal_survive_large_values():
    """In float32, where squares of the samples would cancel: entries near 1000 that scatter by 0.1."""
    own = with_spectrum(1000 + OWN_VALUES / 10, np.float32)
    dense = np.asarray(own.chunks[0], np.float64)
    _, errors = curvature.diagonal(own, KEY, 40)
    deviations = np.sqrt((np.sum(dense**2, axis=1) - np.diag(dense) ** 2) / 40)
    np.testing.assert_allclose(flat(errors), deviations, rtol=0.5)


def test_one_probe_has_no_error(own):
    for estimate in (curvature.trace(own, KEY, 1), curvature.diagonal(own, KEY, 1)):
        assert np.isfinite(flat(estimate.value)).all()
        assert np.isnan(flat(estimate.standard_error)).all()


def test_a_diagonal_matrix_needs_one_probe():
    def loss(params, scales):
        return sum((scales[name] * params[name] ** 2).sum() / 2 for name in params)

    scales = {"a": np.arange(6.0).reshape(2, 3), "b": np.array(-3.0)}
    own = curvature.hessian(loss)(jax.tree.map(np.ones_like, scales), scales)
    np.testing.assert_allclose(flat(curvature.diagonal(own, KEY, 1).value), flat(scales), rtol=1e-12)
    np.testing.assert_allclose(curvature.trace(own, KEY, 3).value, 12, rtol=1e-12)
    np.testing.assert_allclose(curvature.trace(own, KEY, 3).standard_error, 0, atol=1e-12)
