"""Code as a user of wn_jax writes it, with every public name: the type checker must take it, and it must run.

`reportUnnecessaryTypeIgnoreComment` makes an error of each `pyright: ignore` below that stands where nothing is wrong:
so the lines with one are the mistakes that types have to find.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import wn_jax as wn
from wn_jax.curvature import ConditionNumbers, Eigenvalues, Estimate, LinearOperator, NaturalGradient, SpectralDensity
from wn_jax.torch import Array


def model(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """A layer."""
    return x @ params["kernel"] + params["bias"]


def squared(y: jax.Array, target: jax.Array) -> jax.Array:
    """Half the mean square of the errors."""
    return 0.5 * jnp.mean((y - target) ** 2)


class Doubled:
    """A node of one's own: nothing of wn_jax is in it."""

    def __init__(self, half: jax.Array) -> None:
        self.half = half

    def weight(self) -> jax.Array:
        """Twice what it holds."""
        return 2 * self.half

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """The same as a product."""
        return self.half, jnp.full((1, self.half.shape[-1]), 2.0)


PLAIN = {"kernel": jnp.array([[3.0, 0.0], [4.0, 1.0]]), "bias": jnp.zeros(2)}
X = jnp.array([[1.0, 2.0], [0.5, -1.0], [2.0, 0.0]])
Y = jnp.ones((3, 2))


def core() -> None:
    """The names of `wn_jax` itself."""
    axes: dict[str, tuple[int, ...]] = wn.infer_axes(model)(PLAIN, X)
    for use in wn.weight_uses(model)(PLAIN, X):
        print(use.path, use.reduction, use.scale, use.reason)
    assert axes == wn.kernel_axes(PLAIN)
    nodes = wn.reparameterize(PLAIN, axes)
    wn.reparameterize(PLAIN, lambda path, leaf: -2 if leaf.ndim == 2 else None)
    nodes = wn.init_from_data(model, init_scale=0.5)(nodes, X)

    apply: Callable[..., jax.Array] = wn.wrap(model)
    y: jax.Array = apply(nodes, X)
    wn.wrap(model, argnums=(0,), scale="output", strict=True)(nodes, X)
    if not y.size:
        wn.wrap(model, scale="outptu")  # pyright: ignore[reportArgumentType]
        wn.wrap("model")  # pyright: ignore[reportArgumentType]

    plain: dict[str, jax.Array] = wn.reconstruct(PLAIN)
    node: wn.WeightNorm = nodes["kernel"]
    weight: jax.Array = node.weight()
    either: wn.Node = wn.WeightNorm.from_weight(weight, axes=-2)
    direction, scale = either.factors()
    own: wn.Node = Doubled(plain["kernel"])
    assert own.weight().shape == direction.shape
    assert scale.shape == (1, 2)
    assert wn.labels(nodes)["bias"] == "other"

    print(wn.__version__)
    spec = jax.sharding.PartitionSpec()
    specs = wn.shardings(nodes, spec)
    wn.in_shard_map(nodes, specs)
    with tempfile.TemporaryDirectory() as folder:
        wn.save(Path(folder) / "params.safetensors", nodes)
        wn.load(f"{folder}/params.safetensors", target=nodes)
    node = nodes["kernel"]
    wn.nodes_from_dicts({"kernel": {"g": node.g, "v": node.v}}, {"kernel": -2})


def optimizers() -> None:
    """The names of `wn_jax.optim`."""
    nodes = wn.reparameterize(PLAIN, {"kernel": -2})
    decay = optax.add_decayed_weights(1e-2, mask=wn.optim.weight_decay_mask)
    tx = optax.chain(decay, optax.sgd(0.1), wn.optim.project_directions())
    state = tx.init(nodes)
    kept = wn.optim.ProjectDirectionsState({"kernel": nodes["kernel"].g})
    grads = jax.grad(lambda params: squared(wn.wrap(model)(params, X), Y))(nodes)
    _, state = tx.update(grads, state, nodes)
    wn.optim.transfer_state(optax.adam(1e-3).init(PLAIN), PLAIN, nodes)
    print(wn.optim.direction_stats(nodes, reduce=None)["kernel"]["v_norm"], kept.norms)


def linen() -> None:
    """The names of `wn_jax.linen`."""
    layer = wn.linen.MeanOnlyBatchNorm(use_running_average=False)
    layer.init_with_output(jax.random.key(0), X)
    theirs = flax.linen.Sequential([flax.linen.WeightNorm(flax.linen.Dense(2))])
    wn.linen.from_weight_norm(theirs.init(jax.random.key(0), X))


def objects() -> None:
    """The names of `wn_jax.nnx`."""
    layer = nnx.Linear(2, 2, rngs=nnx.Rngs(0))

    def call(model: nnx.Linear, x: jax.Array) -> jax.Array:
        return model(x)

    wrapped = wn.nnx.WeightNormed(layer, wn.nnx.infer_axes(call)(layer, X), scale="auto")
    if not X.size:
        wn.nnx.WeightNormed(layer, {"kernel": -2}, scale="weigth")  # pyright: ignore[reportArgumentType]
    wrapped = wn.nnx.init_from_data(call)(wrapped, X)
    graph, params = wn.nnx.split(wrapped)
    wn.nnx.update(wrapped, params)
    nnx.merge(graph, wn.reconstruct(params))
    nnx.Optimizer(wrapped, wn.nnx.on_nodes(optax.sgd(0.1), wrapped), wrt=nnx.Param)
    wn.nnx.from_weight_norm(nnx.WeightNorm(layer, rngs=nnx.Rngs(0)))
    wn.nnx.MeanOnlyBatchNorm(2, rngs=nnx.Rngs(0))(X)


def pytorch() -> None:
    """The names of `wn_jax.torch`."""
    state = {"up.weight_g": np.ones((4, 1)), "up.weight_v": np.eye(4, 3), "up.bias": np.zeros(4)}
    tree = wn.torch.from_state_dict(state)
    target = {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)}
    names = {"up": {"weight": Array("kernel", "o i -> i o"), "bias": Array("bias")}}
    params = wn.torch.to_flax(tree, target, names)
    wn.torch.to_state_dict(wn.torch.from_flax(params, names), "old")
    if not tree:
        wn.torch.to_state_dict(tree, "newest")  # pyright: ignore[reportArgumentType]
    layers = [wn.torch.linear("a"), wn.torch.conv("b"), wn.torch.conv_transpose("c"), wn.torch.embedding("d")]
    layers += [wn.torch.norm("e"), wn.torch.batch_norm("f", "g"), wn.torch.lstm("h")]
    print(len(layers))


def curvatures() -> None:
    """The names of `wn_jax.curvature`."""
    curvature = wn.curvature

    def loss(params: dict[str, jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        return squared(model(params, batch[0]), batch[1])

    def losses(params: dict[str, jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        return 0.5 * jnp.sum((model(params, batch[0]) - batch[1]) ** 2, -1)

    def outputs(params: dict[str, jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        return model(params, batch[0])

    def distance(y: jax.Array, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        return squared(y, batch[1])

    batch, key = (X, Y), jax.random.key(0)
    hessian: LinearOperator = curvature.hessian(loss)(PLAIN, batch)
    fisher: LinearOperator = curvature.fisher(outputs, "normal")(PLAIN, batch)
    curvature.gauss_newton(outputs, distance)(PLAIN, batch)
    curvature.empirical_fisher(losses)(PLAIN, batch)
    curvature.gradient_covariance(losses)(PLAIN, batch)

    values: Eigenvalues = curvature.eigenvalues(hessian, key, steps=6)
    numbers: ConditionNumbers = curvature.condition_numbers(values, damping=1e-3, ks=(2,))
    density: SpectralDensity = curvature.spectral_density(hessian, key, probes=1, steps=3)
    estimate: Estimate = curvature.trace(hessian, key)
    curvature.diagonal(hessian, key)
    print(values.values, numbers.damped, density.weights, estimate.value)

    gradient = jax.grad(loss)(PLAIN, batch)
    natural: NaturalGradient = curvature.natural_gradient(fisher, gradient, damping=1e-2)
    nodes = wn.reparameterize(PLAIN, {"kernel": -2})
    step = curvature.weight_step(wn.wrap(loss))(nodes, batch)
    print(curvature.cosine(step, natural.value), curvature.norm_growth(nodes, nodes))


EVERYTHING = (core, optimizers, linen, objects, pytorch, curvatures)
