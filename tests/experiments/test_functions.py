"""The pure functions that train an arm, against NumPy: averages, marks, statistics, and what has no gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wn_jax as wn
from experiments import data, tasks
from experiments.config import toml_file
from experiments.engine import training
from experiments.engine.training import NOT_YET
from tests.experiments.commands import DIGITS

SMALL = ("model.hidden=[5]", "data.batch_size=8", "train.steps=60", "train.record_every=1")
MEMBER = training.Member(jnp.int32(3), jnp.float32(0.1))
LAYERS = ("Dense_0", "Dense_1")
# Without LLVM's optimization, which takes longer than what it saves here.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


@pytest.fixture(autouse=True)
def quick_random_numbers():
    """Of a kind that is compiled in no time."""
    with jax.default_prng_impl("unsafe_rbg"):
        yield


def examples(count=40, seed=0):
    random = np.random.default_rng(seed)
    x, y = random.normal(size=(count, 6)).astype(np.float32), random.integers(0, 3, count).astype(np.int32)
    return {"x": x, "y": y}


DATASET = data.Dataset(examples(), examples(20, seed=1), "test", 3)
ROWS = np.random.default_rng(2).integers(0, 40, (12, 8))


def start(arm, *settings):
    """An arm's config, its functions and its first state."""
    config = toml_file.load(DIGITS, [*SMALL, *settings]).arms[arm]
    functions = training.functions(config, DATASET)
    return config, functions, functions.start(MEMBER, DATASET.train)


FROZEN = "arms.weight_norm.model.weights=frozen_scale"
FRAMEWORK = "arms.weight_norm.model.init=framework"


@pytest.mark.slow
def test_a_frozen_scale_gets_no_gradient_and_does_not_move():
    config, functions, state = start("weight_norm", FROZEN, "optimizer.weight_decay={ weight=0.1, other=0.1 }")
    task, batch = tasks.build(config.model, DATASET), examples(8)
    grads, _ = jit(jax.grad(wn.wrap(task.loss), has_aux=True))(state.params, {}, batch, jax.random.key(0))
    weights = jit(jax.grad(task.loss, has_aux=True))(wn.reconstruct(state.params), {}, batch, jax.random.key(0))[0]
    after, _ = jit(functions.advance)(state, MEMBER, DATASET.train, jnp.asarray(ROWS[:1]))
    for layer in LAYERS:
        kernel, grad, moved = (tree[layer]["kernel"] for tree in (state.params, grads, after.params))
        assert (grad.scale == 0).all()
        np.testing.assert_allclose(grad.v, kernel.scale * weights[layer]["kernel"], rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(moved.scale, kernel.scale)
        assert np.abs(moved.v - kernel.v).max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["plain", "weight_norm"])
def test_the_moving_average_is_that_of_its_recursion_and_what_is_evaluated(arm):
    _, functions, state = start(arm, "train.ema=0.5", FRAMEWORK)
    advance, evaluate = jit(functions.advance), jit(functions.evaluate)
    average = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(state.params)]
    for step, rows in enumerate(ROWS):
        state, _ = advance(state, MEMBER, DATASET.train, jnp.asarray(rows)[None])
        decay = min(0.5, (1 + step) / (10 + step))  # from the ninth step on, it is 0.5
        new = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(state.params)]
        average = [decay * old + (1 - decay) * leaf for old, leaf in zip(average, new, strict=True)]
        for found, expected in zip(jax.tree.leaves(state.average), average, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert jax.tree.structure(state.average) == jax.tree.structure(state.params)
    mask = jnp.arange(20) < 15
    found = evaluate(state, MEMBER, DATASET.held_out, mask, 0)
    _, without, bare = start(arm, FRAMEWORK)
    assert bare.average == ()
    for params, same in ((state.average, True), (state.params, False)):
        expected = without.evaluate(state._replace(params=params, average=()), MEMBER, DATASET.held_out, mask, 0)
        assert np.allclose(found["loss"], expected["loss"], rtol=1e-5) == same


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_first_step_whose_loss_is_not_finite_is_marked(bad):
    _, functions, state = start("plain")
    train = examples()
    train["x"][0, 2] = bad
    rows = np.maximum(ROWS[:6], 1)
    rows[3, 5] = 0  # the bad example is in the fourth batch, and all is lost after it
    advance = jit(functions.advance)
    whole, figures = advance(state, MEMBER, train, jnp.asarray(rows))
    losses = figures["loss"]
    assert state.nonfinite_step == NOT_YET
    assert np.isfinite(losses).tolist() == [True] * 3 + [False] * 3
    assert (whole.nonfinite_step, whole.step) == (4, 6)
    marks = []
    for row, loss in zip(rows, losses, strict=True):  # step by step as in one call
        state, own = advance(state, MEMBER, train, jnp.asarray(row)[None])
        marks.append(int(state.nonfinite_step))
        np.testing.assert_allclose(own["loss"], [loss], rtol=1e-5)
    assert marks == [NOT_YET] * 3 + [4] * 3


def test_an_update_that_is_not_finite_is_marked_though_its_loss_is():
    _, functions, state = start("plain")
    train = {"x": 1e4 * DATASET.train["x"], "y": DATASET.train["y"]}
    member = training.Member(MEMBER.seed, jnp.float32(3e38))
    state, figures = jit(functions.advance)(state, member, train, functions.order(member, 0)[:1])
    assert np.isfinite(figures["loss"]).all()
    assert int(state.nonfinite_step) == 1


@pytest.mark.parametrize("weights", ["plain", "weight_norm", "frozen_scale"])
def test_statistics_are_means_over_the_features(weights):
    settings = [f"arms.weight_norm.model.weights={weights}", FRAMEWORK, "optimizer.schedule=linear_second_half"]
    _, functions, state = start("weight_norm", *settings)
    random = np.random.default_rng(3)
    params = jax.tree.map(lambda leaf: leaf * random.normal(size=leaf.shape).astype(np.float32), state.params)
    # After 45 steps of 60, of which 5 are an epoch, the last was of epoch 8 of 12: at 2 - 8 / 6 of the learning rate.
    figures = jit(functions.statistics)(state._replace(params=params, step=jnp.int32(45)), MEMBER)
    for layer in LAYERS:
        leaf = params[layer]["kernel"]
        v = np.asarray(getattr(leaf, "v", leaf), np.float64)
        length = np.linalg.norm(v, axis=0)
        if weights == "weight_norm":
            size = np.abs(leaf.g[0])
        else:
            size = length * np.abs(leaf.scale[0]) if weights == "frozen_scale" else length
        effective = 0.1 * (2 - 8 / 6) * np.mean(size / length**2)
        np.testing.assert_allclose(figures["norms"][f"{layer}/kernel"], length.mean(), rtol=1e-5)
        np.testing.assert_allclose(figures["effective_step"][f"{layer}/kernel"], effective, rtol=1e-5)
    assert set(figures) == {"norms", "effective_step"}
    assert all(set(figure) == {"Dense_0/kernel", "Dense_1/kernel"} for figure in figures.values())


@pytest.mark.parametrize("count", [8, 20])
def test_data_initialization_takes_a_batch_or_what_is_asked_for(count):
    settings = [] if count == 8 else [f"model.init_examples={count}"]
    _, _, state = start("weight_norm", *settings)
    order = data.batch_indices(training._key(MEMBER, "order"), 40, 4, jnp.int32(0), 10)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), wn.reconstruct(state.params))
    x = np.float64(DATASET.train["x"])[np.ravel(order)[:count]]
    hidden = x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    logits = np.maximum(hidden, 0) @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]
    for output in (hidden, logits):
        np.testing.assert_allclose(output.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(output.std(0), 1, rtol=1e-4)
