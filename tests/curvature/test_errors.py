"""Bad input: what is wrong is said, with the remedy, before there is a number."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.curvature.problems import with_spectrum
from wn_jax import curvature

KEY = jax.random.key(0)
PARAMS = {"w": jnp.array([1.0, 2.0])}
BATCH = jnp.arange(12.0).reshape(6, 2)


def loss(params, batch):
    return jnp.mean((batch @ params["w"]) ** 2)


def losses(params, batch):
    return (batch @ params["w"]) ** 2


def model(params, batch):
    return batch @ params["w"]


def of_outputs(outputs, batch):
    return jnp.mean(outputs**2)


MAKERS = {
    "hessian": functools.partial(curvature.hessian, loss),
    "gauss_newton": functools.partial(curvature.gauss_newton, model, of_outputs),
    "fisher": functools.partial(curvature.fisher, model, "normal"),
    "empirical_fisher": functools.partial(curvature.empirical_fisher, losses),
    "gradient_covariance": functools.partial(curvature.gradient_covariance, losses),
}
every_matrix = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (losses, r"must return a real scalar.* shape \(6,\)"),
        (lambda params, batch: (loss(params, batch), {}), "tuple; leave auxiliary outputs out"),
        (lambda params, batch: loss(params, batch).astype(int), "real scalar.* dtype int32"),
        (lambda params, batch: loss(params, batch) + 0j, "real scalar.* dtype complex64"),
        (lambda params, batch: loss(params, batch) * jnp.nan, "is nan, so it has no curvature"),
        (lambda params, batch: jnp.exp(1e3 * loss(params, batch)), "is inf, so it has no curvature"),
    ],
)
def test_a_loss_is_one_finite_real_number(wrong, said):
    with pytest.raises(ValueError, match=f"hessian: .*{said}"):
        curvature.hessian(wrong)(PARAMS, BATCH)
    with pytest.raises(ValueError, match=f"gauss_newton: .*{said}"):
        curvature.gauss_newton(lambda params, batch: params, wrong)(PARAMS, BATCH)


@pytest.mark.parametrize("name", ["empirical_fisher", "gradient_covariance"])
def test_losses_are_a_finite_vector(name):
    make = getattr(curvature, name)
    with pytest.raises(ValueError, match=rf"{name}: losses must return a vector.*shape \(\)"):
        make(loss)(PARAMS, BATCH)
    with pytest.raises(ValueError, match=rf"{name}: .*tuple; leave auxiliary outputs out"):
        make(lambda params, batch: (losses(params, batch), 0))(PARAMS, BATCH)
    with pytest.raises(ValueError, match=rf"{name}: .*nan.*no curvature"):
        make(lambda params, batch: jnp.log(-losses(params, batch)))(PARAMS, BATCH)


def test_the_part_of_a_batch_that_is_not_finite_is_named():
    with pytest.raises(ValueError, match="in part 2 of the batch is inf"):
        curvature.hessian(loss, batch_size=2)(PARAMS, BATCH.at[5].set(jnp.inf))


def in_a_while_loop(params, batch):
    return jax.lax.while_loop(lambda z: jnp.sum(z) < 100, lambda z: z * 2 + batch @ params["w"], jnp.ones(6))


@jax.custom_vjp
def square(x):
    return x**2


square.defvjp(lambda x: (x**2, x), lambda x, z: (2 * x * z,))


def test_a_while_loop_has_no_reverse_mode():
    said = "while_loop.*lax.scan"
    with pytest.raises(ValueError, match=f"hessian: .*{said}"):
        curvature.hessian(lambda params, batch: jnp.mean(in_a_while_loop(params, batch)))(PARAMS, BATCH)
    with pytest.raises(ValueError, match=f"fisher: .*{said}"):
        curvature.fisher(in_a_while_loop, "normal")(PARAMS, BATCH)
    with pytest.raises(ValueError, match=f"gradient_covariance: .*{said}"):
        curvature.gradient_covariance(in_a_while_loop)(PARAMS, BATCH)


def test_a_custom_vjp_has_no_forward_mode():
    """Yet its backward rule has, which is all that a Hessian asks for."""

    def squares(params, batch):
        return square(batch @ params["w"])

    said = "custom_vjp.*jax.custom_jvp has both"
    with pytest.raises(ValueError, match=f"gauss_newton: .*{said}"):
        curvature.gauss_newton(squares, of_outputs)(PARAMS, BATCH)
    with pytest.raises(ValueError, match=f"fisher: .*{said}"):
        curvature.fisher(squares, "normal")(PARAMS, BATCH)
    with pytest.raises(ValueError, match=f"empirical_fisher: .*{said}"):
        curvature.empirical_fisher(squares)(PARAMS, BATCH)
    with pytest.raises(ValueError, match=f"gradient_covariance: .*{said}"):
        curvature.gradient_covariance(squares)(PARAMS, BATCH)
    own = curvature.hessian(lambda params, batch: jnp.mean(squares(params, batch)))(PARAMS, BATCH)
    np.testing.assert_allclose(own.dense(), 2 * BATCH.T @ BATCH / 6, rtol=1e-6)


@every_matrix
@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"w": jnp.array([1, 2])}, "'w' has shape .* dtype int32.*no derivative"),
        ({"w": PARAMS["w"], "more": {"steps": np.int64(3)}}, "'more/steps'.* dtype int64"),
        ({"w": PARAMS["w"].astype(bool)}, "'w' .* dtype bool"),
        ({"w": PARAMS["w"].astype(jnp.bfloat16)}, "'w' .* dtype bfloat16.*float32"),
        ({"w": PARAMS["w"].astype(jnp.float16)}, "'w' .* dtype float16.*float32"),
        ({"w": PARAMS["w"].astype(complex)}, "'w' .* dtype complex64"),
        ({"w": None, "f": jnp.tanh}, "no array"),
        ({"w": PARAMS["w"], "name": ["unhashable", {1}]}, "cannot be hashed"),
    ],
)
def test_parameters_are_real_numbers_of_enough_bits(make, params, said):
    with pytest.raises(ValueError, match=said):
        make()(params, BATCH)


@every_matrix
def test_a_batch_divides_or_a_size_near_that_divides_is_named(make):
    with pytest.raises(ValueError, match=r"4 does not divide the 6 examples.*use 2 or 3"):
        make(batch_size=4)(PARAMS, BATCH)
    for size in (0, -3):
        with pytest.raises(ValueError, match=f"batch_size {size} does not divide.*use 1 or 2"):
            make(batch_size=size)(PARAMS, BATCH)


def test_a_batch_that_is_split_has_one_leading_axis():
    make = curvature.hessian(lambda params, batch: loss(params, batch["x"]), batch_size=2)
    with pytest.raises(ValueError, match=r"leading axis.*\[6, 8\].*leave batch_size out"):
        make(PARAMS, {"x": BATCH, "y": jnp.zeros(8)})
    with pytest.raises(ValueError, match=r"leading axis.*\[6, 'missing'\].*leave batch_size out"):
        make(PARAMS, {"x": BATCH, "y": 0.5})
    with pytest.raises(ValueError, match=r"leading axis.*\['missing'\]"):
        make(PARAMS, 0.5)


@pytest.mark.parametrize(
    "vector",
    [{}, {"w": jnp.ones(2), "b": 1.0}, {"v": jnp.ones(2)}, jnp.ones(2), {"w": jnp.ones(3)}, {"w": jnp.ones((1, 2))}],
)
def test_a_vector_is_a_tree_like_the_parameters(vector):
    own = curvature.hessian(loss)(PARAMS, BATCH)
    with pytest.raises(ValueError, match="no tree like the parameters"):
        own(vector)
    with pytest.raises(ValueError, match="no tree like the parameters"):
        curvature.natural_gradient(own, vector, damping=1.0)


def test_what_can_be_no_number_of_steps_or_probes():
    own = with_spectrum(np.arange(20.0), np.float32)
    for steps, count in ((0, 1), (-1, None), (5, 0)):
        with pytest.raises(ValueError, match="must be 1 or more"):
            curvature.eigenvalues(own, KEY, steps, count)
    for probes, steps in ((0, 5), (5, 0)):
        with pytest.raises(ValueError, match="must be 1 or more"):
            curvature.spectral_density(own, KEY, probes, steps)
    for estimate in (curvature.trace, curvature.diagonal):
        with pytest.raises(ValueError, match="probes must be 1 or more; got 0"):
            estimate(own, KEY, 0)


@pytest.mark.parametrize("damping", [-1e-9, float("nan")])
def test_damping_is_0_or_more(damping):
    own = curvature.hessian(loss)(PARAMS, BATCH)
    with pytest.raises(ValueError, match="damping must be 0 or more"):
        curvature.natural_gradient(own, PARAMS, damping)
    with pytest.raises(ValueError, match="damping must be 0 or more"):
        curvature.condition_numbers([1.0, 2.0], damping)


def test_condition_numbers_are_of_finite_eigenvalues():
    for values in ([], [1.0, np.nan], [np.inf]):
        with pytest.raises(ValueError, match="finite eigenvalues, at least one"):
            curvature.condition_numbers(values)


def test_an_unknown_likelihood_is_answered_with_those_known():
    with pytest.raises(ValueError, match="'gaussian' is not known; use categorical, bernoulli, normal or a divergence"):
        curvature.fisher(model, "gaussian")


def test_a_gradient_is_finite():
    own = curvature.hessian(loss)(PARAMS, BATCH)
    with pytest.raises(ValueError, match="gradient is not finite"):
        curvature.natural_gradient(own, {"w": jnp.array([1.0, jnp.nan])}, damping=1.0)


@pytest.mark.parametrize("steps", [5, 8])
def test_products_that_overflow_are_said(steps):
    """A finite loss of an infinite curvature: the second derivative of `p^1.5` at 0."""
    own = curvature.hessian(lambda params, batch: jnp.sum(params**1.5))(jnp.zeros(8), None)
    with pytest.raises(ValueError, match="a product with the matrix is not finite"):
        curvature.eigenvalues(own, KEY, steps)
    with pytest.raises(ValueError, match="a product with the matrix is not finite"):
        curvature.spectral_density(own, KEY, 2, steps)
    with pytest.warns(UserWarning, match="did not converge"):
        solution = curvature.natural_gradient(own, jnp.ones(8), damping=1.0)
    assert not solution.converged
    assert np.isfinite(solution.value).all()
    for estimate in (curvature.trace, curvature.diagonal):
        with pytest.raises(ValueError, match="a product with the matrix is not finite"):
            estimate(own, KEY, steps)


def test_a_batch_has_examples():
    with pytest.raises(ValueError, match="the batch has no examples"):
        curvature.hessian(loss, batch_size=2)(PARAMS, jnp.zeros((0, 2)))


@pytest.mark.parametrize(("outputs", "said"), [(jnp.sum, "a scalar"), (lambda x: (x, x), "a tuple")])
def test_the_fisher_matrix_needs_outputs_of_examples(outputs, said):
    with pytest.raises(ValueError, match=f"one array with a leading axis of examples; it returns {said}"):
        curvature.fisher(lambda params, batch: outputs(model(params, batch)), "normal")(PARAMS, BATCH)
