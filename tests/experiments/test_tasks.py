"""The paper's network for CIFAR-10: its shapes and numbers by hand, its noise, and how each arm starts."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import wn_jax as wn
from experiments import data, tasks
from experiments.config import toml_file
from experiments.engine import training
from experiments.parametrizations import FrozenScale
from tests.experiments.commands import ROOT

CIFAR10 = ROOT / "configs" / "cifar10.toml"
ARMS = ["plain", "weight_norm", "weight_norm_mean_only", "mean_only", "batch_norm"]
SMALL = ("model.width=4", "model.init_examples=30", "data.batch_size=10")
MEMBER = training.Member(jnp.int32(3), jnp.float32(0.003))


@pytest.fixture(autouse=True)
def quick_random_numbers():
    """Of a kind that is compiled in no time, as all of a network here runs operation by operation."""
    with jax.default_prng_impl("unsafe_rbg"):
        yield


def images(count, size=12, seed=0):
    """A data set of random images."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(count, size, size, 3)).astype(np.float32)
    y = random.integers(0, 10, count).astype(np.int32)
    return data.Dataset({"x": x, "y": y}, {"x": x[:10], "y": y[:10]}, "test", 10)


DATASET = images(60)


def load(arm, *settings):
    return toml_file.load(CIFAR10, settings).arms[arm]


@functools.cache
def start(arm):
    """An arm's task, functions and first state, at a small width on small images."""
    config = load(arm, *SMALL)
    functions = training.functions(config, DATASET)
    return tasks.build(config.model, DATASET), functions, functions.start(MEMBER, DATASET.train)


def probe(function, *args):
    """The result of a function of a network, and by layer its input and output."""
    seen = {}

    def look(call, args, kwargs, context):
        result = call(*args, **kwargs)
        if context.method_name == "__call__" and context.module.name:
            seen[context.module.name] = (args[0], result)
        return result

    with nn.intercept_methods(look):
        return function(*args), seen


# The paper's network on CIFAR-10: kernels, and the positions and features of the layers' outputs.
KERNELS = {
    "Conv_0": (3, 3, 3, 96),
    "Conv_1": (3, 3, 96, 96),
    "Conv_2": (3, 3, 96, 96),
    "Conv_3": (3, 3, 96, 192),
    "Conv_4": (3, 3, 192, 192),
    "Conv_5": (3, 3, 192, 192),
    "Conv_6": (3, 3, 192, 192),
    "Conv_7": (1, 1, 192, 192),
    "Conv_8": (1, 1, 192, 192),
    "Dense_0": (192, 10),
}
OUTPUTS = {f"Conv_{i}": (32, 32, 96) for i in range(3)} | {f"Conv_{i}": (16, 16, 192) for i in range(3, 6)}
OUTPUTS |= {f"Conv_{i}": (6, 6, 192) for i in range(6, 9)} | {"Dense_0": (10,)}
OUTPUTS |= {"Dropout_0": (16, 16, 96), "Dropout_1": (8, 8, 192)}
# 3*3*3*96 + 2 * 3*3*96*96 + 3*3*96*192 + 2 * 3*3*192*192 + 3*3*192*192 + 2 * 192*192 + 192*10
#     2592 +        165888 +     165888 +         663552 +       331776 +       73728 +   1920
WEIGHTS = 1_405_344
FEATURES = 1_450  # 3 * 96 + 6 * 192 + 10
# Of each arm: the kind of its kernels, what else there is of each feature by name, and where its biases are.
NUMBERS = {
    "plain": (FrozenScale, ["bias", "scale"], "layer", 0),
    "weight_norm": (wn.WeightNorm, ["bias", "g"], "layer", 0),
    "weight_norm_mean_only": (wn.WeightNorm, ["bias", "g"], "MeanOnlyBatchNorm", 1),
    "mean_only": (FrozenScale, ["bias", "scale"], "MeanOnlyBatchNorm", 1),
    "batch_norm": (jax.ShapeDtypeStruct, ["bias", "gain"], "BatchNorm", 2),
}


@pytest.mark.parametrize("arm", ARMS)
def test_the_paper_s_network_has_its_shapes_and_numbers(arm):
    dataset = images(600, size=32)
    state = jax.eval_shape(training.functions(load(arm), dataset).start, MEMBER, dataset.train)
    kind, names, biases, running = NUMBERS[arm]
    found = {"weights": 0, "bias": 0, "scale": 0, "g": 0, "gain": 0}
    for layer, leaves in state.params.items():
        if layer not in KERNELS:
            assert layer.startswith(biases)
            found["gain"] += leaves["scale"].size if biases == "BatchNorm" else 0
            found["bias"] += leaves["bias"].size
            continue
        kernel, shape = leaves["kernel"], KERNELS[layer]
        assert type(kernel) is kind
        assert (kernel if kind is jax.ShapeDtypeStruct else kernel.v).shape == shape, layer
        found["weights"] += np.prod(shape)
        for name in {"g", "scale"} & set(names):
            assert getattr(kernel, name).shape == (1,) * (len(shape) - 1) + shape[-1:], layer
            found[name] += getattr(kernel, name).size
        assert ("bias" in leaves) == (biases == "layer")
        found["bias"] += leaves["bias"].size if "bias" in leaves else 0
    assert KERNELS.keys() <= state.params.keys()
    assert found == dict.fromkeys(found, 0) | {"weights": WEIGHTS} | dict.fromkeys(names, FEATURES)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == 1_408_244 == WEIGHTS + 2 * FEATURES
    assert sum(leaf.size for leaf in jax.tree.leaves(state.model_state)) == running * FEATURES


@pytest.mark.parametrize("arm", ["plain", "mean_only", "batch_norm"])
def test_feature_maps_and_what_bfloat16_computes_in(arm):
    dataset = images(2, size=32)
    for dtype in ("float32", "bfloat16"):
        task = tasks.build(load(arm, f"model.dtype={dtype}").model, dataset)
        params, state = jax.eval_shape(task.init, jax.random.key(0), dataset.train)
        seen = {}

        def loss(*args, task=task, seen=seen):
            result, layers = probe(task.loss, *args)
            seen |= {name: jax.typeof(output) for name, (_, output) in layers.items()}
            return result

        gradient = jax.value_and_grad(loss, has_aux=True)
        kept = jax.eval_shape(gradient, params, state, dataset.train, jax.random.key(0))
        assert {leaf.dtype for leaf in jax.tree.leaves((params, state, kept))} == {jnp.dtype("float32")}
        for layer, shape in OUTPUTS.items():
            assert seen[layer].shape == (2, *shape), layer
        assert {output.dtype for output in seen.values()} == {jnp.dtype(dtype)}


@pytest.mark.slow
def test_bfloat16_gives_about_the_same_loss():
    _, _, state = start("weight_norm")
    params, losses = wn.reconstruct(state.params), []
    for dtype in ("float32", "bfloat16"):
        task = tasks.build(load("weight_norm", *SMALL, "model.noise=0", f"model.dtype={dtype}").model, DATASET)
        losses.append(float(task.loss(params, {}, DATASET.train, jax.random.key(0))[0]))
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.slow
def test_noise_and_dropout_act_in_training_alone_and_the_leak_always():
    task, _, state = start("plain")
    params = wn.reconstruct(state.params)
    (_, seen), (_, other) = (probe(task.loss, params, {}, DATASET.train, jax.random.key(key)) for key in range(2))
    noise = np.asarray(seen["Conv_0"][0] - DATASET.train["x"], np.float64)
    np.testing.assert_allclose(noise.std(), 0.15, rtol=0.02)
    assert scipy.stats.kstest(noise[:5].ravel() / 0.15, "norm").pvalue > 0.01
    assert not np.array_equal(seen["Conv_0"][0], other["Conv_0"][0])
    for layer in ("Dropout_0", "Dropout_1"):
        given, kept = map(np.asarray, seen[layer])
        dropped = kept == 0
        np.testing.assert_allclose(dropped.mean(), 0.5, atol=0.03)
        np.testing.assert_array_equal(kept[~dropped], 2 * given[~dropped])
        assert not np.array_equal(dropped, np.asarray(other[layer][1]) == 0)
    (first, evaluated), (second, _) = (probe(task.evaluate, params, {}, DATASET.train, None) for _ in range(2))
    np.testing.assert_array_equal(evaluated["Conv_0"][0], DATASET.train["x"])
    np.testing.assert_array_equal(*evaluated["Dropout_0"])
    np.testing.assert_array_equal(*evaluated["Dropout_1"])
    np.testing.assert_array_equal(first["loss"], second["loss"])
    for layers in (seen, evaluated):
        before, after = np.asarray(layers["Conv_0"][1]), np.asarray(layers["Conv_1"][0])
        np.testing.assert_allclose(after, np.where(before > 0, before, 0.1 * before), rtol=1e-6)


@pytest.mark.slow
def test_without_noise_and_dropout_training_computes_what_evaluation_does():
    params = wn.reconstruct(start("plain")[2].params)
    task = tasks.build(load("plain", *SMALL, "model.noise=0", "model.dropout=0").model, DATASET)
    loss, _ = task.loss(params, {}, DATASET.train, jax.random.key(1))
    figures, layers = probe(task.evaluate, params, {}, DATASET.train, None)
    np.testing.assert_allclose(loss, np.mean(figures["loss"]), rtol=1e-6)
    logits = np.asarray(layers["Dense_0"][1], np.float64)
    own = logits[np.arange(60), DATASET.train["y"]]
    np.testing.assert_allclose(figures["loss"], np.log(np.exp(logits).sum(1)) - own, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(figures["error"], logits.max(1) > own)


@pytest.mark.slow
def test_all_arms_of_a_seed_draw_the_same_kernels_from_the_paper_s_normal():
    drawn = start("batch_norm")[2].params
    for layer in KERNELS:
        kernel = np.asarray(drawn[layer]["kernel"], np.float64).ravel() / 0.05
        np.testing.assert_allclose(kernel.std(), 1, atol=4 / np.sqrt(2 * kernel.size), err_msg=layer)
        for arm in ARMS[:-1]:
            other = start(arm)[2].params[layer]["kernel"].v
            np.testing.assert_allclose(other, drawn[layer]["kernel"], rtol=1e-5, err_msg=layer)
    kernels = np.concatenate([np.ravel(drawn[layer]["kernel"]) for layer in KERNELS])
    assert scipy.stats.kstest(kernels / 0.05, "norm").pvalue > 0.01
    for layer in drawn.keys() - KERNELS.keys():
        assert (drawn[layer]["bias"] == 0).all()
        assert (drawn[layer]["scale"] == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("pair", [("plain", "weight_norm"), ("mean_only", "weight_norm_mean_only")])
def test_frozen_scales_and_weight_norm_start_as_the_same_function(pair):
    examples, figures = images(60, seed=1).train, []
    for arm in pair:
        task, functions, state = start(arm)
        figures.append(functions.evaluate(state, MEMBER, examples, jnp.arange(60) < 50, 0))
        alone = task.evaluate(wn.reconstruct(state.params), state.model_state, examples, None)
        for name, values in alone.items():  # the mask leaves the last ten out
            np.testing.assert_allclose(figures[-1][name], np.sum(values[:50]), rtol=1e-5)
    np.testing.assert_allclose(figures[0]["loss"], figures[1]["loss"], rtol=1e-5)
    assert figures[0]["error"] == figures[1]["error"]


@pytest.mark.slow
@pytest.mark.parametrize("arm", ARMS[:-1])
def test_data_initialization_normalizes_what_it_saw_with_noise_and_dropout_on(arm):
    task, _, state = start(arm)
    order = data.batch_indices(training._key(MEMBER, "order"), 60, 10, jnp.int32(0), 6)
    first = np.ravel(order)[:30]  # `init_examples`: the first three batches
    batch = {name: array[first] for name, array in DATASET.train.items()}
    key = training._key(MEMBER, "init from data")
    _, seen = probe(task.loss, wn.reconstruct(state.params), state.model_state, batch, key)
    normalizes = ("MeanOnlyBatchNorm",) if "mean_only" in arm else ("Conv", "Dense")
    outputs = {
        name: np.asarray(output, np.float64) for name, (_, output) in seen.items() if name.startswith(normalizes)
    }
    assert len(outputs) == 10
    for name, output in outputs.items():
        pre_activations = output.reshape(-1, output.shape[-1])
        np.testing.assert_allclose(pre_activations.mean(0), 0, atol=2e-5, err_msg=name)
        np.testing.assert_allclose(pre_activations.std(0), 1, rtol=1e-4, err_msg=name)
    biases = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.params) if "bias" in str(path[-1])]
    assert len(biases) == 10
    assert all((bias == 0).all() for bias in biases) == ("mean_only" in arm)
