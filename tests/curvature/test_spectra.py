"""Eigenvalues and their density, of matrices with known ones, and condition numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wn_jax as wn
from tests.curvature.problems import Recorded, operator, problem, relative, with_spectrum
from wn_jax import curvature
from wn_jax.curvature import Eigenvalues, condition_numbers, eigenvalues, spectral_density

KEY = jax.random.key(0)
ROWS = 60

pytestmark = pytest.mark.filterwarnings("error")
RANDOM = np.random.default_rng(0)
SPECTRA = {
    "indefinite": RANDOM.standard_normal(ROWS),
    "wide": np.logspace(-6, 3, ROWS),
    "repeated": np.repeat([-1.0, 2.0, 2.5, 7.0], ROWS // 4),
    "outermost repeated": np.concatenate([np.full(20, -3.0), RANDOM.uniform(-1, 1, 20), np.full(20, 5.0)]),
    "low rank": np.concatenate([np.zeros(ROWS - 3), [1.0, 2.0, 10.0]]),
    "identity": np.ones(ROWS),
    "zero": np.zeros(ROWS),
    "negative": -np.linspace(1, 2, ROWS),
    "tiny": np.linspace(1, 2, ROWS) * 1e-30,
    "huge": np.linspace(-1, 2, ROWS) * 1e30,
}
every_spectrum = pytest.mark.parametrize("name", SPECTRA)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def distance_to_nearest(values, of):
    return abs(np.asarray(values, np.float64)[:, None] - of).min(axis=1)


@every_spectrum
def test_as_many_steps_as_rows_give_all_eigenvalues(name):
    found = eigenvalues(with_spectrum(SPECTRA[name]), KEY, steps=ROWS)
    expected = np.sort(SPECTRA[name])
    np.testing.assert_allclose(found.values, expected, atol=1e-13 * abs(expected).max())
    assert found.exact
    assert (found.errors <= 2e-15 * abs(expected).max()).all()
    assert (distance_to_nearest(found.values, expected) <= 100 * found.errors).all()


@pytest.mark.slow
@every_spectrum
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fewer_steps_give_the_outermost(name, dtype):
    """By the `tolerance` asked for; and every value is close to an eigenvalue, to its error and rounding."""
    exact = SPECTRA[name]
    tolerance, rounding = (1e-4, 4e-6) if dtype == np.float32 else (1e-8, 1e-13)
    found = eigenvalues(with_spectrum(exact, dtype), KEY, steps=ROWS - 1, tolerance=tolerance)
    largest = abs(exact).max()
    assert not found.exact
    assert found.values.dtype == dtype
    np.testing.assert_allclose(found.values[[0, -1]], [exact.min(), exact.max()], atol=tolerance * largest + 1e-300)
    assert (np.diff(found.values) >= 0).all()
    assert (distance_to_nearest(found.values, exact) <= found.errors + rounding * largest).all()


def test_several_at_each_end():
    exact = np.concatenate([[-9, -8, -7.0], RANDOM.uniform(-1, 1, ROWS - 6), [10, 11, 12.0]])
    found = eigenvalues(with_spectrum(exact), KEY, steps=ROWS - 1, count=3, tolerance=1e-7)
    assert len(found.values) < ROWS - 1  # it did not need all steps
    np.testing.assert_allclose(found.values[:3], [-9, -8, -7], rtol=1e-6)
    np.testing.assert_allclose(found.values[-3:], [10, 11, 12], rtol=1e-6)


def test_without_a_count_all_steps_are_made():
    own = Recorded(with_spectrum(SPECTRA["identity"]))
    assert len(eigenvalues(own, KEY, steps=25, count=None).values) == len(own.vectors) == 25


@pytest.mark.parametrize("name", ["indefinite", "repeated", "low rank", "zero"])
def test_the_basis_stays_orthonormal(name):
    own = Recorded(with_spectrum(SPECTRA[name], np.float32))
    eigenvalues(own, KEY, steps=ROWS - 1, count=None)
    basis = np.array(own.vectors, np.float64)
    np.testing.assert_allclose(basis @ basis.T, np.eye(ROWS - 1), atol=2e-6)


def test_too_few_steps_are_said():
    with pytest.warns(UserWarning, match="more steps"):
        found = eigenvalues(with_spectrum(np.linspace(1, 2, ROWS)), KEY, steps=4, tolerance=1e-6)
    assert not found.exact
    assert (found.errors[[0, -1]] > 1e-6).any()


@pytest.mark.slow
def test_those_of_a_network():
    """The Gauss-Newton matrix of squares, `J'J / examples`."""
    p = problem("tanh", "squared", "plain")
    own, dense = operator("gauss_newton", p), np.einsum("nap,naq->pq", p.jacobian, p.jacobian) / len(p.outputs)
    exact = np.linalg.eigvalsh(dense)
    found = eigenvalues(own, KEY, steps=100, count=2, tolerance=1e-9)
    np.testing.assert_allclose(found.values[-2:], exact[-2:], rtol=1e-6)
    np.testing.assert_allclose(found.values[:2], exact[:2], atol=1e-6 * exact[-1])


@pytest.mark.parametrize("name", ["indefinite", "repeated", "outermost repeated", "low rank", "zero"])
def test_the_moments_of_a_density_are_those_of_its_probes(name):
    """`sum(weights values^k) = z'A^k z / z'z` for k below `2 steps`: Gauss quadrature."""
    steps, own = 6, Recorded(with_spectrum(SPECTRA[name]))
    a = np.asarray(own.chunks[0]) / (abs(SPECTRA[name]).max() or 1)
    density = spectral_density(own, KEY, probes=3, steps=steps)
    values = density.values / (abs(SPECTRA[name]).max() or 1)
    np.testing.assert_allclose(density.weights.sum(axis=1), 1, rtol=1e-12)
    assert (density.weights >= 0).all()
    for probe in range(3):
        z = own.vectors[probe * steps]
        for k in range(2 * steps):
            moment = np.sum(density.weights[probe] * values[probe] ** k)
            np.testing.assert_allclose(moment, z @ np.linalg.matrix_power(a, k) @ z / (z @ z), atol=1e-12)


def test_probes_differ_and_point_everywhere():
    """Of the entries of a normal vector at length 1, the mean square is 1 / rows, and no two probes agree."""
    own = Recorded(with_spectrum(SPECTRA["indefinite"]))
    spectral_density(own, KEY, probes=100, steps=1)
    z = np.array(own.vectors)
    np.testing.assert_allclose(np.mean(z**2, axis=0), 1 / ROWS, rtol=0.6)
    np.testing.assert_allclose(z.T @ z / 100, np.eye(ROWS) / ROWS, atol=6 / ROWS / np.sqrt(100))


def test_the_density_of_as_many_steps_as_rows_is_that_of_the_eigenvalues():
    exact = SPECTRA["indefinite"]
    density = spectral_density(with_spectrum(exact), KEY, steps=ROWS)
    at = np.linspace(-4, 4, 400)
    np.testing.assert_allclose(density.cumulative(at)[0], (exact < at[:, None]).mean(axis=1), atol=1e-12)
    values = density.values[0]
    np.testing.assert_allclose(density.cumulative(values)[0], np.arange(ROWS) / ROWS, atol=1e-12)  # below, not at
    bumps = np.exp(-((at[:, None] - exact) ** 2) / (2 * 0.3**2)) / (0.3 * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(density.density(at, 0.3)[0], bumps.mean(axis=1), rtol=1e-9)


def test_the_fraction_of_eigenvalues_has_the_error_of_random_probes():
    """Half of the eigenvalues are below 2. The share of `||z||^2` in n/2 of n dimensions is Beta(n/4, n/4)."""
    exact, probes = np.repeat([1.0, 3.0], ROWS // 2), 60
    density = spectral_density(with_spectrum(exact), KEY, probes=probes, steps=3)
    (share,), (error,) = density.cumulative([2.0])
    deviation = np.sqrt(1 / (4 * (ROWS / 2 + 1)) / probes)
    assert abs(share - 0.5) < 4 * deviation
    np.testing.assert_allclose(error, deviation, rtol=0.3)
    below = np.sum(density.weights * (density.values < 2), axis=1)
    np.testing.assert_allclose(error, below.std(ddof=1) / np.sqrt(probes), rtol=1e-9)
    at = np.linspace(-2, 6, 2001)
    smooth, errors = density.density(at, 0.2)
    np.testing.assert_allclose(np.trapezoid(smooth, at), 1, rtol=1e-6)
    np.testing.assert_allclose(np.trapezoid(smooth[at < 2], at[at < 2]), share, rtol=1e-2)
    assert errors.shape == at.shape
    assert np.isnan(spectral_density(with_spectrum(exact), KEY, probes=1, steps=3).cumulative([2.0])[1]).all()


def test_condition_numbers_are_numpys_for_a_positive_matrix():
    own = with_spectrum(SPECTRA["low rank"])
    dense = np.asarray(own.chunks[0])
    d = 1e-3 * np.linalg.norm(dense, 2)
    numbers = condition_numbers(eigenvalues(own, KEY, steps=len(dense)), damping=d, ks=(1, 2))
    singular = np.linalg.svd(dense, compute_uv=False)
    np.testing.assert_allclose(numbers.damped, np.linalg.cond(dense + d * np.eye(len(dense))), rtol=1e-6)
    np.testing.assert_allclose(numbers.to[2], singular[0] / singular[1], rtol=1e-6)
    np.testing.assert_allclose(numbers.to_mean, singular[0] / singular.mean(), rtol=1e-6)
    assert numbers.to[1] == 1


def test_each_condition_number_by_hand():
    numbers = condition_numbers([-8.0, 4.0, 0.0, 2.0, 1e-20], damping=2.0, ks=(1, 2, 3, 4, 5, 6))
    assert numbers.damped == (8 + 2) / (0 + 2)
    assert numbers.numerical_range == 8 / 2
    assert numbers.to == {1: 1.0, 2: 2.0, 3: np.inf, 4: np.inf, 5: np.inf}
    assert numbers.to_mean == 8 / (14 / 5)
    assert condition_numbers([4.0, 0.0]).damped == np.inf
    assert condition_numbers([4.0, 1.0, 0.1], cutoff=0.2).numerical_range == 4.0


def test_errors_in_float32_have_its_rounding_in_them():
    """Whatever number of steps led to them; so a tolerance below it is never reached, and that is said."""
    exact = np.linspace(1, 2, ROWS)
    with pytest.warns(UserWarning, match="and not to 1.0e-12"):
        found = eigenvalues(with_spectrum(exact, np.float32), KEY, steps=ROWS - 1, tolerance=1e-12)
    assert (found.errors >= 1e-7).all()
    assert (distance_to_nearest(found.values, exact) <= found.errors).all()


def test_the_numerical_range_goes_by_the_dtype():
    values = [1.0, 1e-3, 1e-10]
    assert condition_numbers(np.array(values)).numerical_range == pytest.approx(1e10)
    assert condition_numbers(np.array(values, np.float32)).numerical_range == pytest.approx(1e3)
    assert np.isnan(condition_numbers(np.zeros(3)).numerical_range)
    assert condition_numbers([1.0] * 9 + [1e-15]).numerical_range == 1  # below 10 rounding units
    assert condition_numbers([1.0] * 9 + [3e-15]).numerical_range == pytest.approx(1 / 3e-15)


def test_some_eigenvalues_do_not_say_what_the_mean_of_all_is():
    some = Eigenvalues(np.array([1.0, 2.0, 4.0]), np.zeros(3), exact=False)
    numbers = condition_numbers(some, ks=(2,))
    assert np.isnan(numbers.to_mean)
    assert numbers.to[2] == 2
    assert numbers.damped == 4
    assert condition_numbers(Eigenvalues(some.values, some.errors, exact=True)).to_mean == 4 / (7 / 3)


def test_a_well_conditioned_problem_in_the_weights_stays_it_in_g_and_v():
    """Linear regression on white inputs: `H = 1` in the weights; in g and v `diag(1, (g/||v||)^2 M)`."""
    x = np.sqrt(8) * np.vstack([np.eye(8), -np.eye(8)])

    def loss(params, batch):
        return jnp.mean((batch @ params["w"]) ** 2) / 2

    node = wn.WeightNorm(jnp.array([3.0]), jnp.asarray(RANDOM.standard_normal(8)), (-1,))
    own = curvature.gauss_newton(lambda params, x: x @ params["w"].weight(), lambda z, x: jnp.mean(z**2) / 2)(
        {"w": node}, x
    )
    values = eigenvalues(own, KEY, steps=9).values
    scale = 9 / float(jnp.sum(node.v**2))
    np.testing.assert_allclose(values, np.sort([0, *[scale] * 7, 1]), atol=1e-12)
    plain = curvature.hessian(loss)({"w": node.weight()}, x)
    assert relative(eigenvalues(plain, KEY, steps=8).values, np.ones(8)) < 1e-12
