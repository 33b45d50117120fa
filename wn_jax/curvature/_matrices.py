"""The matrices there are, and how each is multiplied with a vector.

What an operator is, and what is checked before there is one, is `_operators`' to say.

Sources: Pearlmutter 1994 (products with the Hessian), Schraudolph 2002 (with the Gauss-Newton matrix), Martens 2014,
arXiv 1412.1193 (which Fisher matrix is which).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp

from wn_jax._types import Params, PyTree
from wn_jax.curvature._operators import LinearOperator, Product, Whole, check_derivatives, operator_of
from wn_jax.curvature._trees import inner

Outputs = TypeVar("Outputs")

Loss = Callable[[Params, PyTree], jax.Array]
"""`(params, batch) -> loss`, a scalar, or a vector with the loss of each example."""

Likelihood = Literal["categorical", "bernoulli", "normal"]

Divergence = Callable[[jax.Array, jax.Array], jax.Array]
"""`(outputs, others) -> scalar`: the divergence of what the others predict from what the outputs do."""


def hessian(loss: Loss, batch_size: int | None = None) -> Callable[[Params, PyTree], LinearOperator]:
    """The Hessian of `loss(params, batch)`.

    For a network of ReLUs this is the Hessian of the linear piece that the parameters lie in: that of the smooth
    parts, without what happens at the kinks, where there is none.

    Arguments:
        loss: returns a scalar. It gets the parameters as they are: for trees with nodes, `wn_jax.wrap(loss)`.
        batch_size: how many examples (along the leading axis of every array of the batch) a product takes at once;
            the loss must then be a mean over examples. Default: all.

    Returns:
        `(params, batch) -> LinearOperator`. It raises `ValueError` where the parameters hold integers or numbers of
        less than 32 bits, the batch does not divide, or the loss is not a scalar, not finite, or not twice
        differentiable in reverse mode (a `lax.while_loop` is not; `lax.scan` is).

    >>> H = hessian(lambda params, batch: params["w"][0] ** 3 * batch)({"w": jnp.array([2.0])}, 5.0)
    >>> H({"w": jnp.array([1.0])})
    {'w': Array([60.], dtype=float32)}
    """

    def product(whole: Whole, arrays: Params, batch: PyTree, vector: Params) -> Params:
        # Forward over reverse: reverse mode once, and no pass backward through a pass backward (Pearlmutter 1994).
        gradient = jax.grad(lambda arrays: loss(whole(arrays), batch))
        return jax.jvp(gradient, (arrays,), (vector,))[1]

    return operator_of("hessian", loss, _check_scalar, product, batch_size)


def gauss_newton(
    model: Callable[[Params, PyTree], Outputs],
    loss: Callable[[Outputs, PyTree], jax.Array],
    batch_size: int | None = None,
) -> Callable[[Params, PyTree], LinearOperator]:
    """The generalized Gauss-Newton matrix `J' H J` of `loss(model(params, batch), batch)`.

    J is the Jacobian of the model's outputs, H the Hessian of the loss in these. It is positive semidefinite where the
    loss is convex in the outputs, and it is the Hessian where the model is linear or fits perfectly.

    Arguments:
        model: `(params, batch) -> outputs`, a tree of arrays; `wn_jax.wrap(model)` for trees with nodes.
        loss: `(outputs, batch) -> scalar`.
        batch_size: as in `hessian`.

    Returns and raises: as `hessian`. The model must also have a forward mode (a `jax.custom_vjp` has none).

    >>> model, loss = lambda params, x: x @ params, lambda outputs, x: 0.5 * jnp.mean(outputs**2)
    >>> x = jnp.array([[1.0, 0.0], [0.0, 3.0]])
    >>> gauss_newton(model, loss)(jnp.ones(2), x).dense()
    Array([[0.5, 0. ],
           [0. , 4.5]], dtype=float32)
    """

    def value(params: Params, batch: PyTree) -> jax.Array:
        return loss(model(params, batch), batch)

    return operator_of("gauss_newton", value, _check_scalar, _gauss_newton_product(model, loss), batch_size)


def fisher(
    model: Callable[[Params, PyTree], jax.Array], likelihood: Likelihood | Divergence, batch_size: int | None = None
) -> Callable[[Params, PyTree], LinearOperator]:
    """The Fisher information matrix of the model's own predictions, averaged over the inputs of the batch.

    It is the expectation of `grad log p(y|x) grad log p(y|x)'` over labels y that the model predicts, not over those of
    the data (see `empirical_fisher`). For the named likelihoods it equals the Gauss-Newton matrix of the negative
    log-likelihood.

    Arguments:
        model: `(params, batch) -> outputs` with a leading axis of examples; `wn_jax.wrap(model)` for trees with nodes.
        likelihood: what the outputs are: "categorical" (logits, along the last axis), "bernoulli" (logits) or "normal"
            (means, of variance 1). Or a function `(outputs, others) -> scalar`: the Kullback-Leibler divergence of what
            the others predict from what the outputs do, as a mean over examples.
        batch_size: as in `hessian`.

    Returns and raises: as `gauss_newton`.

    >>> F = fisher(lambda params, x: x * params, "bernoulli")(jnp.array([0.0]), jnp.array([[2.0]]))
    >>> F(jnp.array([1.0]))  # x^2 p (1 - p)
    Array([1.], dtype=float32)
    """
    if not callable(likelihood) and likelihood not in _DIVERGENCES:
        raise ValueError(f"likelihood {likelihood!r} is not known; use {', '.join(_DIVERGENCES)} or a divergence")
    divergence = likelihood if callable(likelihood) else _DIVERGENCES[likelihood]

    def from_own_predictions(outputs: jax.Array, _batch: PyTree) -> jax.Array:
        # 0, with gradient 0, wherever it is taken; its Hessian in the outputs is the Fisher matrix of the likelihood.
        return divergence(jax.lax.stop_gradient(outputs), outputs)

    def value(params: Params, batch: PyTree) -> jax.Array:
        outputs = model(params, batch)
        _check_has_examples(outputs)
        return from_own_predictions(outputs, batch)

    return operator_of("fisher", value, _check_scalar, _gauss_newton_product(model, from_own_predictions), batch_size)


def empirical_fisher(losses: Loss, batch_size: int | None = None) -> Callable[[Params, PyTree], LinearOperator]:
    """The mean over examples of `grad_i grad_i'`, the uncentred second moment of the gradients.

    It is made of the data's labels, and near a fit it vanishes where the Fisher matrix does not (Kunstner, Balles &
    Hennig 2019, arXiv 1905.12558). A product costs about as much as one with the Gauss-Newton matrix; no example's
    gradient is ever formed.

    Arguments:
        losses: `(params, batch) -> (examples,)`, the loss of each; `wn_jax.wrap(losses)` for trees with nodes.
        batch_size: as in `hessian`.

    Returns and raises: as `gauss_newton`. The losses must be a vector, and no scalar.

    >>> losses = lambda params, x: 0.5 * (x @ params) ** 2
    >>> empirical_fisher(losses)(jnp.array([1.0, 1.0]), jnp.array([[1.0, 0.0], [0.0, 2.0]])).dense()
    Array([[0.5, 0. ],
           [0. , 8. ]], dtype=float32)
    """

    def product(whole: Whole, arrays: Params, batch: PyTree, vector: Params) -> Params:
        along, pull_back = _both_modes(lambda arrays: losses(whole(arrays), batch), arrays, vector)
        return pull_back(along / along.size)

    return operator_of("empirical_fisher", losses, _check_vector, product, batch_size)


def gradient_covariance(losses: Loss, batch_size: int | None = None) -> Callable[[Params, PyTree], LinearOperator]:
    """The covariance over examples of the gradients, `mean((grad_i - grad) (grad_i - grad)')`.

    On a tree of nodes this is equation 4 of the paper at work: where C is the covariance for a weight vector w, that
    for its v is `(g/||v||)^2 M C M`, with `M = I - w w'/||w||^2`.

    Arguments, returns and raises: as `empirical_fisher`.

    >>> losses = lambda params, x: x @ params
    >>> gradient_covariance(losses)(jnp.ones(2), jnp.array([[1.0, 5.0], [3.0, 5.0]])).dense()
    Array([[1., 0.],
           [0., 0.]], dtype=float32)
    """

    def product(whole: Whole, arrays: Params, batch_and_mean: tuple[PyTree, Params], vector: Params) -> Params:
        # First the factors (grad_i - mean)'vector; then their sum with the gradients, less their total times the mean.
        # The total is 0 for the whole batch, but not for one part of it.
        batch, mean = batch_and_mean
        along, pull_back = _both_modes(lambda arrays: losses(whole(arrays), batch), arrays, vector)
        centred = (along - inner(mean, vector)) / along.size
        total = jnp.sum(centred)
        return jax.tree.map(lambda moment, own: moment - total * own, pull_back(centred), mean)

    def mean_gradient(whole: Whole, arrays: Params, batch: PyTree, _vector: Params) -> Params:
        return jax.grad(lambda arrays: jnp.mean(losses(whole(arrays), batch)))(arrays)

    means_of = operator_of("gradient_covariance", losses, _check_vector, mean_gradient, batch_size)

    def at(params: Params, batch: PyTree) -> LinearOperator:
        # A first pass over the parts of the batch averages the gradients; each part then carries their mean along.
        means = means_of(params, batch)
        mean = means(means.params)
        chunks = tuple((chunk, mean) for chunk in means.chunks)
        covariance = dataclasses.replace(means, chunks=chunks, product=product)
        check_derivatives("gradient_covariance", covariance)
        return covariance

    return at


def _gauss_newton_product(
    model: Callable[[Params, PyTree], Outputs], loss: Callable[[Outputs, PyTree], jax.Array]
) -> Product:
    """The product with `J' H J`, from right to left (Schraudolph 2002)."""

    def product(whole: Whole, arrays: Params, batch: PyTree, vector: Params) -> Params:
        def outputs_of(arrays: Params) -> Outputs:
            return model(whole(arrays), batch)

        along, pull_back = _both_modes(outputs_of, arrays, vector)
        outputs = outputs_of(arrays)
        gradient = jax.grad(lambda outputs: loss(outputs, batch))
        return pull_back(jax.jvp(gradient, (outputs,), (along,))[1])

    return product


def _both_modes(
    function: Callable[[Params], Outputs], arrays: Params, vector: Params
) -> tuple[Outputs, Callable[[Outputs], Params]]:
    """The derivative of a function along a vector, and its transpose. XLA computes what the two share once."""
    _, pull_back = jax.vjp(function, arrays)
    _, along = jax.jvp(function, (arrays,), (vector,))
    return along, lambda cotangent: pull_back(cotangent)[0]


def _check_scalar(name: str, value: PyTree) -> None:
    if not _is_real(value) or value.shape != ():
        raise ValueError(
            f"{name}: the loss must return a real scalar, such as a mean over examples; it returns {_described(value)}"
        )


def _check_vector(name: str, value: PyTree) -> None:
    if not _is_real(value) or len(value.shape) != 1:
        raise ValueError(
            f"{name}: losses must return a vector with the loss of each example, and no mean; it returns "
            f"{_described(value)}"
        )


def _check_has_examples(outputs: PyTree) -> None:
    if not getattr(outputs, "shape", ()):
        raise ValueError(
            "fisher: the model must return one array with a leading axis of examples; it returns "
            f"{'a scalar' if hasattr(outputs, 'shape') else 'a ' + type(outputs).__name__}"
        )


def _is_real(value: PyTree) -> bool:
    """Whether an abstract value is one array of real numbers."""
    return isinstance(value, jax.ShapeDtypeStruct) and jnp.issubdtype(value.dtype, jnp.floating)


def _described(value: PyTree) -> str:
    """An abstract value, for a message."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return f"an array of shape {value.shape} and dtype {value.dtype}"
    return f"a {type(value).__name__}; leave auxiliary outputs out"


def _categorical(outputs: jax.Array, others: jax.Array) -> jax.Array:
    log_p, log_q = jax.nn.log_softmax(outputs), jax.nn.log_softmax(others)
    possible = log_p > -jnp.inf  # logits of -inf rule a class out, and 0 times -inf would be NaN
    return jnp.sum(jnp.where(possible, jnp.exp(log_p) * (log_p - log_q), 0)) / len(outputs)


def _bernoulli(outputs: jax.Array, others: jax.Array) -> jax.Array:
    p = jax.nn.sigmoid(outputs)
    # By log_sigmoid of plus and minus the logits: log(p) and log(1 - p) would be infinite where p rounds to 0 or 1.
    of_one = p * (jax.nn.log_sigmoid(outputs) - jax.nn.log_sigmoid(others))
    of_zero = (1 - p) * (jax.nn.log_sigmoid(-outputs) - jax.nn.log_sigmoid(-others))
    return jnp.sum(of_one + of_zero) / len(outputs)


def _normal(outputs: jax.Array, others: jax.Array) -> jax.Array:
    return 0.5 * jnp.sum(jnp.square(outputs - others)) / len(outputs)


_DIVERGENCES: dict[str, Divergence] = {"categorical": _categorical, "bernoulli": _bernoulli, "normal": _normal}
