"""The paper's network for CIFAR-10: its shapes and numbers by hand, its noise, its start, and what trains of it."""

import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import wn_jax as wn
from experiments import data, tasks, toml_file, training
from experiments.parametrizations import FrozenScale

CIFAR10 = Path(__file__).parent.parent / "configs" / "cifar10.toml"
ARMS = ["plain", "weight_norm", "weight_norm_mean_only", "mean_only", "batch_norm"]
SMALL = ["model.width=4", "model.init_examples=30", "data.batch_size=10", "train.record_every=1"]
# Without LLVM's optimization, which takes longer than what it would save here.
OPTIONS = {"xla_backend_optimization_level": "0"}
MEMBER = training.Member(jnp.int32(3), jnp.float32(0.003))


def images(count, size=12, seed=0):
    """A data set of random images."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(count, size, size, 3)).astype(np.float32)
    y = random.integers(0, 10, count).astype(np.int32)
    return data.Dataset({"x": x, "y": y}, {"x": x[:10], "y": y[:10]}, "test", 10)


def load(arm, *settings):
    return toml_file.load(CIFAR10, settings).arms[arm]


@functools.cache
def start(arm, *settings):
    """An arm's config, task, functions and first state, at a small width on 60 small images."""
    config, dataset = load(arm, *SMALL, *settings), images(60)
    functions = training.functions(config, dataset)
    state = jax.jit(functions.init, compiler_options=OPTIONS)(MEMBER, dataset.train)
    return config, tasks.build(config.model, dataset), functions, state


def probe(function, *args):
    """What a function of a network returns, and by layer its input and output."""
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
#     2592 +        165888 +     165888 +         663552 +      331776 +       73728 +   1920
KERNEL_COUNT = 1_405_344
FEATURES = 1_450  # 3 * 96 + 6 * 192 + 10


@pytest.mark.parametrize("arm", ARMS)
def test_the_paper_s_network_has_its_shapes_and_numbers(arm):
    config, dataset = load(arm), images(600, size=32)
    state = jax.eval_shape(training.functions(config, dataset).init, MEMBER, dataset.train)
    kinds = {"batch_norm": jax.ShapeDtypeStruct, "plain": FrozenScale, "mean_only": FrozenScale}
    count = {"kernel": 0, "g": 0, "frozen": 0, "bias": 0, "gain": 0}
    for layer, kernel in KERNELS.items():
        leaf = state.params[layer]["kernel"]
        assert type(leaf) is kinds.get(arm, wn.WeightNorm), layer
        assert (leaf if arm == "batch_norm" else leaf.v).shape == kernel, layer
        per_feature = (1,) * (len(kernel) - 1) + kernel[-1:]
        count["kernel"] += np.prod(kernel)
        for name, extra in (("g", getattr(leaf, "g", None)), ("frozen", getattr(leaf, "scale", None))):
            if extra is not None:
                assert extra.shape == per_feature, layer
                count[name] += extra.size
        assert ("bias" in state.params[layer]) == (config.model.norm == "none"), layer
        count["bias"] += state.params[layer]["bias"].size if config.model.norm == "none" else 0
    for layer in state.params.keys() - KERNELS.keys():
        assert layer.startswith({"batch": "BatchNorm_", "mean_only": "MeanOnlyBatchNorm_"}[config.model.norm])
        count["bias"] += state.params[layer]["bias"].size
        count["gain"] += state.params[layer]["scale"].size if config.model.norm == "batch" else 0
    extra = {"plain": "frozen", "mean_only": "frozen", "batch_norm": "gain"}.get(arm, "g")
    wanted = dict.fromkeys(count, 0) | {"kernel": KERNEL_COUNT, "bias": FEATURES, extra: FEATURES}
    assert count == wanted
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == 1_408_244 == sum(wanted.values())
    running = {"none": 0, "mean_only": 1, "batch": 2}[config.model.norm]
    assert sum(leaf.size for leaf in jax.tree.leaves(state.model_state)) == running * FEATURES


@pytest.mark.parametrize("arm", ["plain", "batch_norm"])
def test_feature_maps_and_what_bfloat16_computes_in(arm):
    dataset = images(2, size=32)
    for dtype in ("float32", "bfloat16"):
        task = tasks.build(load(arm, f"model.dtype={dtype}").model, dataset)
        params, state = jax.eval_shape(task.init, jax.random.key(0), dataset.train)
        assert {leaf.dtype for leaf in jax.tree.leaves((params, state))} == {jnp.dtype("float32")}
        seen = {}

        def loss(*args, task=task, seen=seen):
            result, layers = probe(task.loss, *args)
            seen |= {name: jax.typeof(output) for name, (_, output) in layers.items()}
            return result

        value, after = jax.eval_shape(loss, params, state, dataset.train, jax.random.key(0))
        for layer, shape in OUTPUTS.items():
            assert seen[layer].shape == (2, *shape), layer
            assert seen[layer].dtype == dtype, layer
        assert {leaf.dtype for leaf in jax.tree.leaves((value, after))} == {jnp.dtype("float32")}


def test_bfloat16_trains_float32_parameters_to_about_the_same_loss():
    losses = {}
    for dtype in ("float32", "bfloat16"):
        _, _, functions, state = start("weight_norm", f"model.dtype={dtype}")
        advance = jax.jit(functions.advance, compiler_options=OPTIONS)
        for _ in range(2):
            state, loss = advance(state, MEMBER, images(60).train, jnp.arange(10)[None])
            losses.setdefault(dtype, []).append(float(loss[0]))
        assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
        assert loss.dtype == jnp.float32
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=3e-2)
    assert losses["bfloat16"] != losses["float32"]


def test_noise_and_dropout_act_in_training_alone_and_the_leak_always():
    _, task, _, state = start("plain")
    params, examples = wn.reconstruct(state.params), images(60).train
    (_, seen), (_, other) = (probe(task.loss, params, {}, examples, jax.random.key(key)) for key in range(2))
    noise = np.asarray(seen["Conv_0"][0] - examples["x"], np.float64)
    np.testing.assert_allclose(noise.std(), 0.15, rtol=0.02)
    assert abs(noise.mean()) < 4 * 0.15 / np.sqrt(noise.size)
    assert scipy.stats.kstest(noise[:3].ravel() / 0.15, "norm").pvalue > 0.01
    assert not np.array_equal(seen["Conv_0"][0], other["Conv_0"][0])
    for layer in ("Dropout_0", "Dropout_1"):
        given, kept = map(np.asarray, seen[layer])
        dropped = kept == 0
        np.testing.assert_allclose(dropped.mean(), 0.5, atol=0.03)
        np.testing.assert_array_equal(kept[~dropped], 2 * given[~dropped])
        assert not np.array_equal(dropped, np.asarray(other[layer][1]) == 0)
    (first, evaluated), (second, _) = (probe(task.evaluate, params, {}, examples) for _ in range(2))
    np.testing.assert_array_equal(evaluated["Conv_0"][0], examples["x"])
    np.testing.assert_array_equal(*evaluated["Dropout_0"])
    np.testing.assert_array_equal(*evaluated["Dropout_1"])
    np.testing.assert_array_equal(first["loss"], second["loss"])
    for layers in (seen, evaluated):
        before, after = np.asarray(layers["Conv_0"][1]), np.asarray(layers["Conv_1"][0])
        np.testing.assert_allclose(after, np.where(before > 0, before, np.float32(0.1) * before), rtol=1e-6)


def test_without_noise_and_dropout_training_computes_what_evaluation_does():
    dataset = images(20)
    task = tasks.build(load("plain", *SMALL, "model.noise=0", "model.dropout=0").model, dataset)
    params, state = jax.jit(task.init, compiler_options=OPTIONS)(jax.random.key(0), dataset.train)
    loss, _ = task.loss(params, state, dataset.train, jax.random.key(1))
    figures = task.evaluate(params, state, dataset.train)
    np.testing.assert_allclose(loss, np.mean(figures["loss"]), rtol=1e-6)
    (_, layers) = probe(task.evaluate, params, state, dataset.train)
    logits = np.asarray(layers["Dense_0"][1], np.float64)
    own = logits[np.arange(20), dataset.train["y"]]
    np.testing.assert_allclose(figures["loss"], np.log(np.exp(logits).sum(1)) - own, rtol=1e-5)
    np.testing.assert_array_equal(figures["error"], logits.max(1) > own)


def test_kernels_are_normal_and_of_the_paper_s_size():
    dataset = images(2)
    task = tasks.build(load("batch_norm", "model.width=16").model, dataset)
    params, _ = jax.jit(task.init, compiler_options=OPTIONS)(jax.random.key(0), dataset.train)
    for layer in KERNELS:
        kernel = np.asarray(params[layer]["kernel"]).ravel() / 0.05
        assert scipy.stats.kstest(kernel, "norm").pvalue > 0.01, layer
        np.testing.assert_allclose(kernel.std(), 1, atol=4 / np.sqrt(2 * kernel.size), err_msg=layer)
    assert all((leaf["bias"] == 0).all() for layer, leaf in params.items() if "Norm" in layer)
    assert all((leaf["scale"] == 1).all() for layer, leaf in params.items() if "Norm" in layer)


def test_all_arms_of_a_seed_draw_the_same_kernels():
    drawn = {layer: start("batch_norm")[3].params[layer]["kernel"] for layer in KERNELS}
    for arm in ARMS[:-1]:
        for layer, kernel in drawn.items():
            np.testing.assert_allclose(start(arm)[3].params[layer]["kernel"].v, kernel, rtol=3e-7, err_msg=layer)


@pytest.mark.parametrize("pair", [("plain", "weight_norm"), ("mean_only", "weight_norm_mean_only")])
def test_frozen_scales_and_weight_norm_start_as_the_same_function(pair):
    figures = []
    for arm in pair:
        _, task, functions, state = start(arm)
        evaluate = jax.jit(functions.evaluate, compiler_options=OPTIONS)
        figures.append(evaluate(state, images(40, seed=1).train, jnp.arange(40) < 30))
        examples = {name: array[:30] for name, array in images(40, seed=1).train.items()}
        alone = task.evaluate(wn.reconstruct(state.params), state.model_state, examples)
        for name, values in alone.items():  # the mask leaves the last ten out
            np.testing.assert_allclose(figures[-1][name], np.sum(values), rtol=1e-4)
    np.testing.assert_allclose(figures[0]["loss"], figures[1]["loss"], rtol=1e-5)
    assert figures[0]["error"] == figures[1]["error"]
    assert figures[0]["loss"] > 1


@pytest.mark.parametrize("arm", ARMS[:-1])
def test_data_initialization_normalizes_what_it_saw_with_noise_and_dropout_on(arm):
    config, task, _, state = start(arm)
    order = data.batch_indices(training._key(MEMBER, "order"), 60, 10, jnp.int32(0), 6)
    spreads = {}
    for count in (30, 10):  # `init_examples` is 30: the first three batches
        rows = np.asarray(order).ravel()[:count]
        batch = {name: array[rows] for name, array in images(60).train.items()}
        key = training._key(MEMBER, "init from data")
        _, seen = probe(task.loss, wn.reconstruct(state.params), state.model_state, batch, key)
        normalized = "Norm" if config.model.norm != "none" else ("Conv", "Dense")
        outputs = {name: np.asarray(output, np.float64) for name, (_, output) in seen.items()}
        outputs = {name: output for name, output in outputs.items() if any(kind in name for kind in normalized)}
        spreads[count] = [output.std(axis=tuple(range(output.ndim - 1))) for output in outputs.values()]
        if count == 30:
            assert len(outputs) == 10
            for output in outputs.values():
                np.testing.assert_allclose(output.mean(axis=tuple(range(output.ndim - 1))), 0, atol=2e-4)
    np.testing.assert_allclose(np.concatenate(spreads[30]), 1, rtol=2e-3)
    assert np.abs(np.concatenate(spreads[10]) - 1).mean() > 0.02
    biases = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.params) if "bias" in str(path[-1])]
    assert all((bias == 0).all() for bias in biases) == (config.model.norm == "mean_only")


def test_a_frozen_scale_gets_no_gradient_and_does_not_move():
    _, task, functions, state = start("plain")
    batch = {name: array[:10] for name, array in images(60).train.items()}
    gradient = jax.jit(jax.grad(wn.wrap(task.loss), has_aux=True), compiler_options=OPTIONS)
    grads, _ = gradient(state.params, state.model_state, batch, jax.random.key(0))
    after, _ = jax.jit(functions.advance, compiler_options=OPTIONS)(
        state, MEMBER, images(60).train, jnp.arange(10)[None]
    )
    for layer in KERNELS:
        kernel, grad, moved = (tree[layer]["kernel"] for tree in (state.params, grads, after.params))
        assert (grad.scale == 0).all()
        assert np.abs(grad.v).max() > 0
        np.testing.assert_array_equal(moved.scale, kernel.scale)
        assert np.abs(moved.v - kernel.v).max() > 0
