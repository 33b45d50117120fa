"""Instruments for the curvature of a loss, in any parametrization, on trees with or without nodes.

Matrices are linear operators, of which only products with vectors are computed: `hessian`, `gauss_newton`, `fisher`,
`empirical_fisher`, `gradient_covariance`. From such products come `eigenvalues`, `spectral_density`, `trace`,
`diagonal`, `condition_numbers` and the `natural_gradient`. `weight_step` says what a parametrization makes of a
gradient, at one and the same function; `cosine` compares two such steps, and `norm_growth` checks what the paper says
of `||v||`. (The effective learning rate is in `wn_jax.optim.direction_stats`.)

>>> import flax.linen as nn, jax, jax.numpy as jnp, optax
>>> import wn_jax as wn
>>> from wn_jax import curvature
>>> model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)])
>>> x, y = jax.random.normal(jax.random.key(1), (32, 5)), jnp.arange(32) % 3
>>> plain = model.init(jax.random.key(0), x)
>>> nodes = wn.reparameterize(plain, wn.infer_axes(model.apply)(plain, x))
>>> def apply(params, batch):
...     return model.apply(params, batch[0])
>>> def loss(params, batch):
...     return optax.softmax_cross_entropy_with_integer_labels(apply(params, batch), batch[1]).mean()

How well conditioned is it in the weights, and how well in g and v? (With `v = w`, the Fisher matrix in (g, v) has the
eigenvalues of the other, and a 0 for each of the 11 vectors; so the largest over the tenth is the same.)

>>> for params in (plain, nodes):
...     F = curvature.fisher(wn.wrap(apply), "categorical")(params, (x, y))
...     values = curvature.eigenvalues(F, jax.random.key(0), steps=F.size)
...     print(F.size, f"{curvature.condition_numbers(values, ks=(10,)).to[10]:.1f}")
75 10.2
86 10.2

Where does a step of gradient descent on g and v move the weights: as one on these, or as the natural gradient?

>>> F = curvature.fisher(apply, "categorical")(plain, (x, y))
>>> gradient = jax.grad(loss)(plain, (x, y))
>>> natural = curvature.natural_gradient(F, gradient, damping=1e-2)
>>> step = curvature.weight_step(loss)(nodes, (x, y))
>>> for other in (gradient, natural.value):
...     print(f"{curvature.cosine(step, other):.2f}")
1.00
0.40
"""

from wn_jax.curvature._conditioning import ConditionNumbers, condition_numbers
from wn_jax.curvature._estimates import Estimate, diagonal, trace
from wn_jax.curvature._lanczos import Eigenvalues, SpectralDensity, eigenvalues, spectral_density
from wn_jax.curvature._matrices import empirical_fisher, fisher, gauss_newton, gradient_covariance, hessian
from wn_jax.curvature._natural import NaturalGradient, natural_gradient
from wn_jax.curvature._operators import LinearOperator
from wn_jax.curvature._weight_steps import cosine, norm_growth, weight_step

__all__ = [
    "ConditionNumbers",
    "Eigenvalues",
    "Estimate",
    "LinearOperator",
    "NaturalGradient",
    "SpectralDensity",
    "condition_numbers",
    "cosine",
    "diagonal",
    "eigenvalues",
    "empirical_fisher",
    "fisher",
    "gauss_newton",
    "gradient_covariance",
    "hessian",
    "natural_gradient",
    "norm_growth",
    "spectral_density",
    "trace",
    "weight_step",
]


def __dir__() -> list[str]:
    return __all__
