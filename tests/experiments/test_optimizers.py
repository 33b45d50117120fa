"""Optimizers by name against the formulas of their papers in float64; schedules, clipping and decay by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pydantic
import pytest

import wn_jax as wn
from experiments import optimizers
from experiments.config import toml_file
from experiments.errors import ConfigError
from experiments.optimizers import OptimizerConfig
from experiments.parametrizations import FrozenScale
from tests.experiments.commands import ROOT

CIFAR10 = ROOT / "configs" / "cifar10.toml"
STEPS, STEPS_PER_EPOCH = 40, 4  # ten epochs
EPOCHS = STEPS // STEPS_PER_EPOCH
# Without LLVM's optimization, which takes longer than what it saves here.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


def gradients(steps=STEPS):
    """Of very different sizes, some of them near the square root of 1e-8, as the paper's epsilon shows there."""
    sizes = 10.0 ** np.linspace(-6, 1, 12).reshape(4, 3)
    return np.random.default_rng(0).normal(size=(steps, 4, 3)) * sizes


def run(config, rate, grads, params=None, steps=STEPS):
    """The parameters after each step with these gradients; from 0, unless they are given."""
    params = jnp.zeros(grads.shape[1:]) if params is None else params

    def trajectory(rate):
        optimizer = optimizers.build(config, rate, steps, STEPS_PER_EPOCH)

        def step(carry, grad):
            params, state = carry
            updates, state = optimizer.update(grad, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(step, (params, optimizer.init(params)), jax.tree.map(jnp.asarray, grads))[1]

    return jit(jax.vmap(trajectory) if np.ndim(rate) else trajectory)(jnp.asarray(rate))


def paper_adam(grads, rate):
    """The published code's Adam, its learning rate stepped per epoch and its first moment lowered at half time."""
    x, m, v, path = 0.0, 0.0, 0.0, []
    for t, g in enumerate(np.asarray(grads, np.float64), start=1):
        epoch = (t - 1) // STEPS_PER_EPOCH
        b1, b2 = (0.9 if epoch < EPOCHS / 2 else 0.5), 0.999
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        x = x - rate * min(2 - epoch / (EPOCHS / 2), 1) * m_hat / np.sqrt(v_hat + 1e-8)
        path.append(x)
    return np.stack(path)


@pytest.mark.parametrize("arm", ["plain", "weight_norm"])
def test_the_paper_s_adam(arm):
    config = toml_file.load(CIFAR10).arms[arm].optimizer
    found = np.asarray(run(config, 0.003, gradients()), np.float64)
    expected = paper_adam(gradients(), 0.003)
    assert config.learning_rate == (0.0003, 0.001, 0.003, 0.01)
    steps, wanted = np.diff(found, axis=0), np.diff(expected, axis=0)
    np.testing.assert_allclose(steps, wanted, rtol=1e-3, atol=1e-8)  # a difference of float32 sums
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-7)


def test_the_paper_s_adam_at_several_rates_at_once():
    config = toml_file.load(CIFAR10).arms["plain"].optimizer
    found = run(config, config.learning_rate, gradients())
    for rate, path in zip(config.learning_rate, found, strict=True):
        np.testing.assert_allclose(path, paper_adam(gradients(), rate), rtol=2e-5, atol=1e-6 * rate / 0.003)


def test_adamax_is_kingma_and_ba_s():
    """Algorithm 2 of arXiv 1412.6980, with optax's epsilon beside |g|."""
    x, m, u, path = 0.0, 0.0, 0.0, []
    for t, g in enumerate(gradients(), start=1):
        m = 0.5 * m + (1 - 0.5) * g
        u = np.maximum(0.99 * u, np.abs(g) + 1e-8)
        x = x - 0.002 / (1 - 0.5**t) * m / u
        path.append(x)
    config = OptimizerConfig(name="adamax", learning_rate=0.002, options={"b1": 0.5, "b2": 0.99})
    np.testing.assert_allclose(run(config, 0.002, gradients()), np.stack(path), rtol=2e-5, atol=1e-7)


# Factors on the learning rate by step, worked out by hand for 40 steps of 10 epochs.
SCHEDULES = {
    "constant": ({}, {0: 1, 20: 1, 39: 1}),
    "linear_second_half": (
        {"schedule": "linear_second_half"},
        {0: 1, 19: 1, 20: 1, 23: 1, 24: 0.8, 27: 0.8, 28: 0.6, 32: 0.4, 36: 0.2, 39: 0.2},
    ),
    "cosine": ({"schedule": "cosine"}, {0: 1, 10: 0.5 + 0.5**1.5, 20: 0.5, 30: 0.5 - 0.5**1.5, 40: 0}),
    "warm-up": ({"warmup_steps": 4}, {0: 0.2, 1: 0.4, 2: 0.6, 3: 0.8, 4: 1, 5: 1, 39: 1}),
    "warm-up and cosine": ({"schedule": "cosine", "warmup_steps": 19}, {0: 0.05, 10: 0.55 * (0.5 + 0.5**1.5), 20: 0.5}),
    "warm-up and linear": (
        {"schedule": "linear_second_half", "warmup_steps": 31},
        {0: 1 / 32, 15: 0.5, 24: 0.8 * 25 / 32, 36: 0.2},
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_by_hand(name):
    options, factors = SCHEDULES[name]
    config = OptimizerConfig(name="sgd", learning_rate=0.5, **options)
    factor = optimizers.schedule(config, STEPS, STEPS_PER_EPOCH)
    steps, expected = jnp.asarray(list(factors)), list(factors.values())
    np.testing.assert_allclose(jax.vmap(factor)(steps), expected, rtol=1e-6, atol=1e-7)
    path = np.diff(run(config, 0.5, np.ones((STEPS, 1))), axis=0, prepend=0)  # what the optimizer makes of it
    for step, value in factors.items():
        if step < STEPS:
            np.testing.assert_allclose(path[step], -0.5 * value, rtol=1e-4)


def test_a_long_schedule_is_as_exact_as_a_short_one():
    config = OptimizerConfig(name="sgd", learning_rate=0.5, schedule="linear_second_half")
    factor = optimizers.schedule(config, 100_000, 500)
    epochs = np.arange(200)
    found = jax.vmap(factor)(jnp.asarray(500 * epochs + 499))
    np.testing.assert_allclose(found, np.minimum(2 - epochs / 100, 1), rtol=0, atol=2e-7)


def test_clipping_is_by_the_norm_of_the_whole_tree():
    config = OptimizerConfig(name="sgd", learning_rate=0.5, clip_norm=2.0)
    grads = {"a": np.array([[3.0, 0.0], [0.3, 0.4]]), "b": np.array([[4.0], [0.0]])}  # norms 5 and 0.5
    path = run(config, 0.5, grads, {"a": jnp.zeros(2), "b": jnp.zeros(1)})
    np.testing.assert_allclose(path["a"][0], [-0.5 * 3 * 2 / 5, 0], rtol=1e-6)
    np.testing.assert_allclose(path["b"][0], [-0.5 * 4 * 2 / 5], rtol=1e-6)
    np.testing.assert_allclose(path["a"][1] - path["a"][0], [-0.5 * 0.3, -0.5 * 0.4], rtol=1e-6)


def tree():
    """A parameter of every kind, as a network's."""
    random = np.random.default_rng(1)
    arrays = [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in [(1, 3), (4, 3), (4, 3), (4, 3), (3,)]]
    scale = jnp.array([[0.5, 0.0, 2.0]])
    node, frozen = wn.WeightNorm(arrays[0], arrays[1], (-2,)), FrozenScale(arrays[2], scale, (-2,))
    return {"node": node, "frozen": frozen, "kernel": arrays[3], "bias": arrays[4]}


def moved(config, grad, steps):
    """The tree after so many steps, each with this gradient at all leaves but the frozen scale, where it is 0."""
    params = tree()
    grads = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(grad), (steps, *leaf.shape)), params)
    grads["frozen"] = FrozenScale(grads["frozen"].v, 0 * grads["frozen"].scale, (-2,))
    return jax.tree.map(lambda leaf: leaf[-1], run(config, config.learning_rate[0], grads, params))


def test_weight_decay_has_a_rate_for_each_label():
    decay = {"g": 0.1, "v": 0.2, "weight": 0.3, "other": 0.4}
    config = OptimizerConfig(name="sgd", learning_rate=0.5, weight_decay=decay, warmup_steps=1)
    before, after = tree(), moved(config, 0.0, 2)

    def shrunk(rate):  # the first step at half the learning rate
        return (1 - 0.25 * rate) * (1 - 0.5 * rate)

    np.testing.assert_allclose(after["node"].g, shrunk(0.1) * before["node"].g, rtol=1e-6)
    np.testing.assert_allclose(after["node"].v, shrunk(0.2) * before["node"].v, rtol=1e-6)
    np.testing.assert_allclose(after["kernel"], shrunk(0.3) * before["kernel"], rtol=1e-6)
    np.testing.assert_allclose(after["frozen"].v, shrunk(0.3) * before["frozen"].v, rtol=1e-6)
    np.testing.assert_allclose(after["bias"], shrunk(0.4) * before["bias"], rtol=1e-6)
    np.testing.assert_array_equal(after["frozen"].scale, before["frozen"].scale)


@pytest.mark.parametrize("label", ["g", "v", "weight", "other"])
def test_weight_decay_is_decoupled_and_of_one_label_alone(label):
    plain = OptimizerConfig(name="adam", learning_rate=0.5)
    decaying = OptimizerConfig(name="adam", learning_rate=0.5, weight_decay={label: 0.1})
    before, free, decayed = tree(), moved(plain, 0.25, 1), moved(decaying, 0.25, 1)
    wanted = {"g": [before["node"].g], "v": [before["node"].v], "other": [before["bias"]]}
    wanted["weight"] = [before["kernel"], before["frozen"].v]
    for start, a, b in zip(*map(jax.tree.leaves, (before, free, decayed)), strict=True):
        rate = 0.1 if any(np.array_equal(start, leaf) for leaf in wanted[label]) else 0.0
        np.testing.assert_allclose(b, a - 0.5 * rate * start, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adam", "adamax", "adamw", "rmsprop", "lamb"])
def test_a_frozen_scale_stays_whatever_divides_by_zero_around_it(name):
    zeros = {"eps": 0.0, "eps_root": 0.0} if name == "adam" else {"eps": 0.0}
    decay = dict.fromkeys(["g", "v", "weight", "other"], 0.1)
    config = OptimizerConfig(name=name, learning_rate=0.5, options=zeros, weight_decay=decay, clip_norm=1.0)
    before, after = tree(), moved(config, 0.25, 3)
    np.testing.assert_array_equal(after["frozen"].scale, before["frozen"].scale)
    for start, end in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.isfinite(end).all()
        assert start is before["frozen"].scale or (start != end).all()


@pytest.mark.parametrize("name", ["sgd", "adamw", "lion", "rmsprop", "adabelief", "muon", "lamb", "radam", "adafactor"])
def test_optimizers_by_name_really_step(name):
    config = OptimizerConfig(name=name, learning_rate=0.01)
    params = tree()
    optimizer = optimizers.build(config, jnp.float32(0.01), STEPS, STEPS_PER_EPOCH)

    @jit
    def step(params):
        def loss(params):
            return sum(jnp.sum((leaf - 1) ** 2) for leaf in jax.tree.leaves(wn.reconstruct(params)))

        before, grads = jax.value_and_grad(loss)(params)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return before, loss(optax.apply_updates(params, updates)), updates

    before, after, updates = step(params)
    assert after < before
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        assert (np.abs(update).max() == 0) == (jax.tree_util.keystr(path) == "['frozen'].scale")


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("lbfgs", "'value', 'grad', and 'value_fn'"),
        ("momo", "'value'"),
        ("momo_adam", "'value'"),
        ("sophia", "obj_fn must be provided"),
        ("dpsgd", "'l2_norm_clip'"),
    ],
)
def test_optimizers_that_need_more_than_gradients_are_refused(name, cause):
    with pytest.raises(
        pydantic.ValidationError, match=f"optax's {name} cannot be used here with these options.*{cause}"
    ):
        OptimizerConfig(name=name, learning_rate=0.01)


@pytest.mark.parametrize("name", ["adamm", "scale_by_adam", "schedule_free_adamw", "chain", "Callable", ""])
def test_what_is_no_optimizer_is_refused(name):
    with pytest.raises(pydantic.ValidationError, match=f"unknown optimizer {name!r}.*; optimizers: .*adam, .*sgd"):
        OptimizerConfig(name=name, learning_rate=0.01)


def test_options_are_the_optimizer_s_own():
    """Nesterov's momentum, whose first two steps from a constant gradient are lr (1 + m) and lr (1 + m + m^2)."""
    config = OptimizerConfig(name="sgd", learning_rate=1.0, options={"momentum": 0.5, "nesterov": True})
    np.testing.assert_allclose(run(config, 1.0, np.ones((2, 1))), [[-1.5], [-1.5 - 1.75]], rtol=1e-6)


def test_kept_norms_are_those_of_the_start():
    config = OptimizerConfig(name="sgd", learning_rate=0.5, keep_norms=True)
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    optimizer = optimizers.build(config, 0.5, STEPS, STEPS_PER_EPOCH)
    params = {"w": wn.WeightNorm.from_weight(weight, -2)}
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    moved = optax.apply_updates(params, updates)["w"].v
    expected = np.asarray(weight) - 0.5
    expected *= np.linalg.norm(weight, axis=0) / np.linalg.norm(expected, axis=0)
    np.testing.assert_allclose(moved, expected, rtol=1e-5)


def test_only_weight_norm_has_norms_to_keep():
    with pytest.raises(ConfigError, match=r"plain: .*keep_norms keeps the norms of v"):
        toml_file.load(CIFAR10, ["arms.plain.optimizer.keep_norms=true"])
