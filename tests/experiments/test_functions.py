"""The pure functions that train an arm, against NumPy: averages, marks, statistics, and what has no gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wn_jax as wn
from experiments import data, tasks
from experiments.config import toml_file
from experiments.devices.layout import Layout
from experiments.engine import training
from experiments.engine.training import NOT_YET
from tests.experiments.commands import DIGITS, ROOT

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


# One by one


def test_the_order_is_the_same_for_all_arms_and_rates_of_a_seed_and_goes_on_at_any_step():
    other_rate, other_seed = MEMBER._replace(learning_rate=jnp.float32(1)), MEMBER._replace(seed=jnp.int32(4))
    made = {}
    for arm in ("plain", "weight_norm"):
        config = toml_file.load(DIGITS, [*SMALL, "train.record_every=6"]).arms[arm]
        made[arm] = training.functions(config, DATASET)
    whole = made["plain"].order(MEMBER, jnp.int32(0))
    assert whole.shape == (6, 8)
    for functions, member in ((made["weight_norm"], MEMBER), (made["plain"], other_rate)):
        np.testing.assert_array_equal(functions.order(member, jnp.int32(0)), whole)
    assert not np.array_equal(made["plain"].order(other_seed, jnp.int32(0)), whole)
    np.testing.assert_array_equal(made["plain"].order(MEMBER, jnp.int32(4))[:2], whole[4:])


def test_init_looks_at_what_training_sees_first_or_at_shapes_alone():
    _, functions, _ = start("weight_norm")
    np.testing.assert_array_equal(functions.first(MEMBER), functions.order(MEMBER, jnp.int32(0))[0])
    _, plain, _ = start("plain")
    assert plain.first(MEMBER).tolist() == [0]


def gradients(params, x, y):
    """Of the mean cross-entropy of a perceptron with one hidden layer with ReLU, in float64; and the loss."""
    one, two = (params[layer] for layer in LAYERS)
    before = x @ one["kernel"] + one["bias"]
    hidden = np.maximum(before, 0)
    logits = hidden @ two["kernel"] + two["bias"]
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    loss = -np.log(probabilities[np.arange(len(y)), y]).mean()
    by_logits = (probabilities - np.eye(logits.shape[1])[y]) / len(y)
    by_before = by_logits @ two["kernel"].T * (before > 0)
    return loss, {
        "Dense_0": {"kernel": x.T @ by_before, "bias": by_before.sum(axis=0)},
        "Dense_1": {"kernel": hidden.T @ by_logits, "bias": by_logits.sum(axis=0)},
    }


@pytest.mark.parametrize("arm", ["plain", "weight_norm"])
def test_a_step_is_that_of_gradient_descent_by_hand(arm):
    """Of weight normalization by equation 3 of Salimans & Kingma 2016, arXiv 1602.07868."""
    _, functions, state = start(arm, FRAMEWORK)
    after, figures = jit(functions.step)(state, MEMBER, DATASET.train, jnp.asarray(ROWS[0]))
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), wn.reconstruct(state.params))
    loss, grads = gradients(weights, np.float64(DATASET.train["x"])[ROWS[0]], DATASET.train["y"][ROWS[0]])
    np.testing.assert_allclose(figures["loss"], loss, rtol=1e-5)
    assert set(figures) == {"loss"}
    for layer in LAYERS:
        before, now, grad = state.params[layer], after.params[layer], grads[layer]
        np.testing.assert_allclose(now["bias"], before["bias"] - 0.1 * grad["bias"], rtol=1e-4, atol=1e-6)
        old, new = before["kernel"], now["kernel"]
        if arm == "plain":
            np.testing.assert_allclose(new, old - 0.1 * grad["kernel"], rtol=1e-4, atol=1e-6)
            continue
        v, g = np.asarray(old.v, np.float64), np.asarray(old.g, np.float64)
        norm = np.linalg.norm(v, axis=0, keepdims=True)
        by_g = np.sum(grad["kernel"] * v, axis=0, keepdims=True) / norm
        by_v = g / norm * grad["kernel"] - g * by_g / norm**2 * v
        np.testing.assert_allclose(new.g, g - 0.1 * by_g, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(new.v, v - 0.1 * by_v, rtol=1e-4, atol=1e-6)
    assert (after.step, after.nonfinite_step, after.average) == (1, NOT_YET, ())


def test_figures_are_sums_over_the_examples_where_the_mask_is_1():
    _, functions, state = start("plain")
    mask = np.arange(20) % 3 == 0
    found = jit(functions.evaluate)(state, MEMBER, DATASET.held_out, mask, 0)
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.params)
    x, y = np.float64(DATASET.held_out["x"])[mask], DATASET.held_out["y"][mask]
    np.testing.assert_allclose(found["loss"], mask.sum() * gradients(weights, x, y)[0], rtol=1e-5)
    hidden = np.maximum(x @ weights["Dense_0"]["kernel"] + weights["Dense_0"]["bias"], 0)
    logits = hidden @ weights["Dense_1"]["kernel"] + weights["Dense_1"]["bias"]
    assert found["error"] == np.sum(logits.argmax(axis=1) != y)


def test_the_logarithm_of_a_mean_over_draws_is_summed_over_examples():
    _, functions, state = start("plain")
    random = np.random.default_rng(5)
    weights = random.normal(size=(4, 20)).astype(np.float32)  # as if drawn: logarithms of four weights of each example

    def log_weight(params, model_state, examples, keys):
        return examples["drawn"]

    drawing = dataclasses.replace(
        functions, task=dataclasses.replace(functions.task, log_weight=log_weight, draws=len(weights))
    )
    mask, log_sum = np.arange(20) < 15, jnp.full(20, -jnp.inf)
    for draw, own in enumerate(weights):
        log_sum = drawing.add_weight(log_sum, state, MEMBER, {"drawn": jnp.asarray(own)}, 0, draw)
    expected = np.log(np.exp(weights.astype(np.float64)).mean(axis=0))[:15].sum()
    np.testing.assert_allclose(drawing.log_mean(log_sum, mask), expected, rtol=1e-5)


@pytest.mark.parametrize(("model", "convolves"), [("name='mlp', hidden=[5]", False), ("name='conv', widths=[2]", True)])
def test_whether_a_network_convolves_is_read_from_its_program(model, convolves):
    dataset = data.Dataset({"x": np.zeros((8, 4, 4, 1), np.float32), "y": np.zeros(8, np.int32)}, {}, "test", 3)
    config = toml_file.load(DIGITS, ["data.batch_size=8", f"model={{{model}}}"]).arms["plain"]
    assert training.functions(config, dataset).convolves == convolves


class Noting(Layout):
    """A layout that notes what it is asked for."""

    def __init__(self):
        self.asked = []

    def gather_layer(self, stack, params, uses, /):
        self.asked.append((stack, uses))
        return params


def test_a_task_is_built_once_and_gathers_layers_once_their_uses_are_known(monkeypatch):
    built, build = [], tasks.build
    monkeypatch.setattr(tasks, "build", lambda *args: built.append(args) or build(*args))
    tokens = {"tokens": np.zeros((4, 9), np.uint8)}
    settings = ["model.layers=2", "model.width=8", "model.heads=2", "data.batch_size=2", "train.record_every=1"]
    config = toml_file.load(ROOT / "configs" / "gpt_tiny.toml", settings).arms["weight_norm"]
    layout = Noting()
    functions = training.functions(config, data.Dataset(tokens, tokens, "test", 7), layout)
    assert (len(built), layout.asked) == (1, [])
    state = jax.eval_shape(functions.start, MEMBER, tokens)
    jax.eval_shape(functions.step, state, MEMBER, tokens, jnp.arange(2))
    assert layout.asked
    assert all(stack == "blocks" and uses is functions.uses for stack, uses in layout.asked)


def test_a_compiled_method_is_traced_once():
    _, functions, state = start("plain")
    traced, losses = [], functions.task.losses

    def counted(*args):
        traced.append(args)
        return losses(*args)

    counting = dataclasses.replace(functions, task=dataclasses.replace(functions.task, losses=counted))
    advance = jit(counting.advance)
    for rows in ROWS[:3]:
        state, _ = advance(state, MEMBER, DATASET.train, jnp.asarray(rows)[None])
    assert len(traced) == 1
    assert state.step == 3
