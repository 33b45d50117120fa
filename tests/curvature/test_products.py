"""The matrices, against dense ones by definition; and in parts of a batch, in float32, on many devices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wn_jax as wn
from tests.curvature.problems import flat, operator, problem, relative
from wn_jax import curvature

PROBLEMS = list(itertools.product(["tanh", "relu"], ["cross_entropy", "squared"], ["plain", "nodes"]))
MATRICES = ["hessian", "gauss_newton", "fisher", "empirical_fisher", "gradient_covariance"]


def unless(often, *values):
    """A parameter of a test that is slow for most, as each compiles."""
    return pytest.param(*values, marks=[] if often else pytest.mark.slow)


CASES = [
    unless(of == ("tanh", "cross_entropy", "nodes") and name in ("hessian", "fisher"), name, of)
    for name in MATRICES
    for of in PROBLEMS
]
SAMPLED = [unless(name == "gradient_covariance", name) for name in MATRICES]


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def gauss_newton_by_definition(p):
    """`J' H J` with H of the softmax (`diag(q) - q q'`) or of the squares (1)."""
    if p.batch[1].ndim == 1:
        q = np.exp(p.outputs) / np.exp(p.outputs).sum(-1, keepdims=True)
        inner = q[:, :, None] * np.eye(3) - q[:, :, None] * q[:, None]
    else:
        inner = np.broadcast_to(np.eye(3), (len(p.outputs), 3, 3))
    return np.einsum("nap,nab,nbq->pq", p.jacobian, inner, p.jacobian) / len(p.outputs)


def by_definition(name, p):
    if name == "hessian":
        return p.hessian
    if name == "gauss_newton":
        return gauss_newton_by_definition(p)
    if name == "fisher":
        return fisher_by_definition(p, "categorical")
    n = len(p.gradients)
    return p.gradients.T @ p.gradients / n if name == "empirical_fisher" else np.cov(p.gradients.T, bias=True)


def tempered(outputs, others):
    """The divergence of one softmax at temperature 1/2 from another."""
    log_p, log_q = jax.nn.log_softmax(2 * outputs), jax.nn.log_softmax(2 * others)
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1))


def one_hot(outputs):
    return np.broadcast_to(np.eye(3)[:, None], (3, *outputs.shape))


def binary(outputs):
    return np.broadcast_to(np.array(list(itertools.product([0.0, 1.0], repeat=3)))[:, None], (8, *outputs.shape))


def quadrature(outputs):
    """Labels that stand for all real ones: the points of Gauss and Hermite, exact for the products of two scores."""
    points = np.polynomial.hermite_e.hermegauss(2)[0]
    return outputs + np.array(list(itertools.product(points, repeat=3)))[:, None]  # all of one weight


LIKELIHOODS = {  # which labels there are, and the logarithm of their probability at given outputs, up to a constant
    "categorical": (one_hot, lambda o, y: jnp.sum(y * jax.nn.log_softmax(o), -1)),
    "bernoulli": (binary, lambda o, y: jnp.sum(y * o - jnp.log1p(jnp.exp(o)), -1)),
    "normal": (quadrature, lambda o, y: -jnp.sum((y - o) ** 2, -1) / 2),
    tempered: (one_hot, lambda o, y: jnp.sum(y * jax.nn.log_softmax(2 * o), -1)),
}


def fisher_by_definition(p, likelihood):
    """The mean over inputs of `sum_y p(y|x) grad log p(y|x) grad log p(y|x)'`."""
    labels, log_p = LIKELIHOODS[likelihood]
    y = labels(p.outputs)
    by_outputs = jax.vmap(jax.vmap(jax.grad(log_p)), (None, 0))(p.outputs, y)
    scores = np.einsum("yna,nap->ynp", by_outputs, p.jacobian)
    p_y = np.exp(log_p(p.outputs, y))
    p_y /= p_y.sum(0)
    return np.einsum("yn,ynp,ynq->pq", p_y, scores, scores) / len(p.outputs)


def assert_products(own, expected):
    """With three random vectors, which no other matrix would pass."""
    for vector in np.random.default_rng(1).standard_normal((3, len(expected))):
        product = flat(own(own.unravel(jnp.asarray(vector))))
        assert product.dtype == np.float64
        assert relative(product, expected @ vector) < 1e-10


@pytest.mark.parametrize(("name", "of"), CASES)
def test_the_matrix_is_that_of_its_definition(name, of, x64):
    p = problem(*of)
    expected = by_definition(name, p)
    assert operator(name, p).size == len(expected)
    assert_products(operator(name, p), expected)


def test_the_whole_matrix(x64):
    p = problem("tanh", "cross_entropy", "nodes")
    dense = operator("hessian", p).dense()
    assert dense.dtype == np.float64
    assert relative(dense, p.hessian) < 1e-10


@pytest.mark.parametrize(
    "likelihood",
    [unless(name in ("bernoulli", tempered), name) for name in LIKELIHOODS],
    ids=lambda likelihood: getattr(likelihood, "__name__", likelihood),  # the same in each process
)
def test_the_fisher_matrix_is_the_mean_over_labels_of_the_model(likelihood, x64):
    p = problem("tanh", "squared", "nodes")
    own = curvature.fisher(wn.wrap(p.apply), likelihood)(p.params, p.batch)
    assert_products(own, fisher_by_definition(p, likelihood))


def test_the_hessian_of_relus_is_that_of_the_linear_piece(x64):
    """The masks of the units, fixed where they are, in place of ReLUs; with squares, where the Hessian has no kinks."""
    p = problem("relu", "squared", "plain")
    on = p.batch[0] @ p.params[0]["kernel"] + p.params[0]["bias"] > 0

    def piece(params, batch):
        hidden = on * (batch[0] @ params[0]["kernel"] + params[0]["bias"])
        outputs = hidden @ params[1]["kernel"] + params[1]["bias"]
        return jnp.mean(jnp.sum((outputs - batch[1]) ** 2, -1)) / 2

    assert_products(operator("hessian", p), jax.jit(jax.hessian(p.flat(piece)))(p.vector))


@pytest.mark.parametrize("name", SAMPLED)
def test_parts_of_a_batch_give_what_all_of_it_gives(name, x64):
    p = problem("tanh", "cross_entropy", "nodes")
    whole, parts = operator(name, p), operator(name, p, batch_size=4)
    vector = whole.unravel(jnp.asarray(np.random.default_rng(1).standard_normal(whole.size)))
    assert len(parts.chunks) == 3
    assert relative(flat(parts(vector)), flat(whole(vector))) < 1e-12
    np.testing.assert_array_equal(flat(parts(vector)), flat(parts(vector)))  # the vector was not overwritten


@pytest.mark.parametrize("name", SAMPLED)
def test_float32_agrees_with_float64(name, x64):
    p = problem("tanh", "cross_entropy", "nodes")
    vector = np.random.default_rng(1).standard_normal(p.vector.size)
    own = operator(name, p.float32())
    product = flat(own(own.unravel(jnp.asarray(vector, jnp.float32))))
    assert product.dtype == np.float32
    assert relative(product, by_definition(name, p) @ vector) < 1e-5


@pytest.mark.parametrize("batch_size", [None, 4])
def test_the_covariance_of_gradients_survives_a_large_mean(batch_size):
    """In float32, gradients near 1000 that scatter by 0.1."""
    gradients = (1000 + np.random.default_rng(0).standard_normal((12, 5)) / 10).astype(np.float32)
    own = curvature.gradient_covariance(lambda params, batch: batch @ params, batch_size)(jnp.zeros(5), gradients)
    assert relative(own.dense(), np.cov(gradients.astype(np.float64).T, bias=True)) < 0.05


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["hessian", "gradient_covariance"])
def test_a_batch_on_many_devices_gives_what_one_does(name, x64):
    p = problem("tanh", "cross_entropy", "nodes")
    batch = jax.tree.map(lambda rows: jnp.concatenate([rows, rows])[:16], p.batch)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    over, everywhere = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("data",), ()))
    many = operator(name, p.at(jax.device_put(p.params, everywhere), jax.device_put(batch, over)))
    one = operator(name, p.at(p.params, batch))
    assert relative(flat(many(many.params)), flat(one(one.params))) < 1e-10


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_eigenvalues_with_parameters_on_many_devices(x64):
    def loss(params, scales):
        return jnp.sum(scales * params**2) / 2

    scales = jnp.arange(1.0, 65.0)
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    over = jax.NamedSharding(mesh, jax.P("model"))
    own = curvature.hessian(loss)(jax.device_put(jnp.ones(64), over), jax.device_put(scales, over))
    found = curvature.eigenvalues(own, jax.random.key(0), steps=50, tolerance=1e-8)
    np.testing.assert_allclose(found.values[[0, -1]], [1, 64], rtol=1e-7)


def test_an_operator_is_an_argument_of_a_compiled_function(x64):
    p = problem("tanh", "cross_entropy", "nodes")
    quotient = jax.jit(lambda own, vector: flat_vdot(vector, own(vector)))
    vector = p.unravel(jnp.asarray(np.random.default_rng(1).standard_normal(p.vector.size)))
    expected = flat(vector) @ p.hessian @ flat(vector)
    np.testing.assert_allclose(quotient(operator("hessian", p), vector), expected, rtol=1e-10)


def test_an_operator_is_made_within_a_compiled_function(x64):
    p = problem("tanh", "cross_entropy", "nodes")
    make = curvature.hessian(wn.wrap(p.loss), batch_size=4)
    quotient = jax.jit(lambda params, batch, vector: flat_vdot(vector, make(params, batch)(vector)))
    vector = p.unravel(jnp.asarray(np.random.default_rng(1).standard_normal(p.vector.size)))
    expected = flat(vector) @ p.hessian @ flat(vector)
    np.testing.assert_allclose(quotient(p.params, p.batch, vector), expected, rtol=1e-10)


def flat_vdot(first, second):
    return sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


@pytest.mark.slow
def test_many_vectors_at_once(x64):
    p = problem("tanh", "cross_entropy", "nodes")
    own = operator("hessian", p)
    vectors = np.random.default_rng(1).standard_normal((3, own.size))
    products = jax.vmap(own)(jax.vmap(own.unravel)(vectors))
    assert (
        relative(jax.vmap(lambda tree: jax.flatten_util.ravel_pytree(tree)[0])(products), vectors @ p.hessian) < 1e-10
    )


def test_a_class_that_is_ruled_out_has_no_part_in_the_fisher_matrix():
    """Logits of -inf, as masks make them: the matrix of the classes that are left."""

    def masked(params, x):
        return jnp.concatenate([x @ params, jnp.full((len(x), 1), -jnp.inf)], axis=1)

    params, x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3))), jnp.ones((4, 2))
    own = curvature.fisher(masked, "categorical")(params, x).dense()
    np.testing.assert_allclose(own, curvature.fisher(lambda p, x: x @ p, "categorical")(params, x).dense(), atol=1e-6)


def test_the_mere_shape_of_an_array_is_none_to_differentiate_by():
    params = {"w": jnp.array([2.0]), "cache": jax.ShapeDtypeStruct((3,), jnp.bfloat16)}
    matrix = curvature.hessian(lambda params, batch: params["w"][0] ** 3 * params["cache"].shape[0])(params, None)
    product = matrix({"w": jnp.array([1.0]), "cache": None})
    assert product == {"w": jnp.array([36.0]), "cache": None}  # the second derivative of 3 w^3
