"""The decoder and the bigram model, and runs that write text."""

import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import data, tasks
from experiments.config import toml_file
from experiments.data import text
from experiments.data.load import _windows
from experiments.devices import mesh
from experiments.devices.placement import Placement
from experiments.engine import training
from experiments.engine.arm import Arm
from experiments.run_folder.record import read_records
from experiments.tasks import gpt, language
from tests.experiments.commands import ROOT, fails, invoke, run_once

GPT = ROOT / "configs" / "gpt_tiny.toml"
SMALL = [
    *("model.layers=2", "model.width=16", "model.heads=2", "data.window=12", "data.train_examples=48"),
    *("data.test_examples=10", "data.batch_size=8", "train.steps=4", "train.record_every=2"),
    *("train.evaluate_every=2", "train.seeds=2", "mesh.data=1"),
]
SETTINGS = [word for change in SMALL for word in ("--set", change)]


def arm_config(name, *changes):
    return toml_file.load(GPT, [*SMALL, *changes]).arms[name]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["model.heads=3"], "width (16) must be a multiple of twice the heads (3)"),
        (["model.prompt=''"], "prompt is empty"),
        (
            ["model.prompt='more than twelve bytes'"],
            "model.prompt: its bytes (22) leave nothing of the window (12) to write",
        ),
        (["model={name='mlp',hidden=[4]}"], "mlp classifies, and the examples have no labels; choose 'gpt'"),
        (["model={name='linear'}"], "linear predicts numbers, and the examples are text; choose 'gpt'"),
        (["arms.bigram.model.weights='weight_norm'"], "the network has no weights that 'weight_norm' could write"),
        (["data.whiten=true"], "whiten has no meaning for text"),
        (["data.test_examples=10000000"], "more than the"),
        (["data={name='digits',batch_size=8}"], "gpt models text, and the examples are none; set data.name = 'text'"),
        (["data={name='digits',batch_size=8,path='x'}"], "path has no meaning for digits"),
    ],
)
def test_what_does_not_fit_is_an_error(tmp_path, changes, said):
    arm = "bigram" if "bigram" in changes[0] else "plain"
    settings = [word for change in changes for word in ("--set", change)]
    assert said in fails("train", GPT, "--arm", arm, "--out", tmp_path / "run", *SETTINGS, *settings)


# The bigram model


def test_the_bigram_model_is_the_table_of_counts():
    """By hand, of "abab" and "baba" as windows of three predictions each, three symbols."""
    windows = np.array([[0, 1, 0, 1], [1, 0, 1, 0]], np.uint8)
    expected = np.log([[1 / 6, 4 / 6, 1 / 6], [4 / 6, 1 / 6, 1 / 6], [1 / 3, 1 / 3, 1 / 3]])
    np.testing.assert_allclose(language.bigram_logits(windows, 3), expected, rtol=1e-6)


def test_its_loss_is_the_cross_entropy_of_the_counts():
    config = arm_config("bigram")
    dataset = data.load(config.data)
    task = tasks.build(config.model, dataset)
    table = language.bigram_logits(dataset.train["tokens"], 256).astype(np.float64)
    tokens = dataset.held_out["tokens"].astype(int)
    expected = [-np.mean([table[a, b] for a, b in itertools.pairwise(row)]) for row in tokens]
    np.testing.assert_allclose(task.evaluate({}, {}, dataset.held_out, None)["loss"], expected, rtol=1e-5)


# The decoder


def test_rotary_positions_by_complex_numbers():
    """Each pair is a complex number, turned by its place times its frequency."""
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 8))
    turned = np.asarray(gpt.rotated(jnp.asarray(x, jnp.float32)), np.float64)
    pairs = x[..., :4] + 1j * x[..., 4:]
    angles = np.arange(5)[:, None, None] * 10000.0 ** (-np.arange(4) / 4)
    expected = pairs * np.exp(1j * angles)
    np.testing.assert_allclose(turned[..., :4] + 1j * turned[..., 4:], expected, atol=1e-5)


@functools.cache
def network():
    net = gpt.GPT(layers=3, width=16, heads=2, symbols=7, dtype=jnp.float32, gather=lambda params: params)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 7, (2, 9)))
    return net, net.init(jax.random.key(0), tokens), tokens


def test_what_comes_after_a_place_has_no_influence_on_it():
    net, variables, tokens = network()
    changed = tokens.at[:, 6:].set((tokens[:, 6:] + 1) % 7)
    before, after = (net.apply(variables, each) for each in (tokens, changed))
    np.testing.assert_allclose(before[:, :6], after[:, :6], atol=1e-6)
    assert np.abs(before[:, 6:] - after[:, 6:]).max() > 1e-2


def test_the_decoder_in_numpy():
    """The same function, layer by layer in float64, with no library of networks."""
    net, variables, tokens = network()
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * scale

    def rotated(x):
        angles = np.arange(9)[:, None, None] * 10000.0 ** (-np.arange(4) / 4)
        pairs = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)
        return np.concatenate([pairs.real, pairs.imag], -1)

    def gelu(x):
        return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    x = p["embed"]["embedding"][np.asarray(tokens)]
    for layer in range(3):
        own = jax.tree.map(lambda a, layer=layer: a[layer], p["blocks"])
        y = norm(x, own["before_attention"]["scale"])
        query, key, value = ((y @ own[name]["kernel"]).reshape(2, 9, 2, 8) for name in ("query", "key", "value"))
        scores = np.einsum("bqhd,bkhd->bhqk", rotated(query), rotated(key)) / math.sqrt(8)
        scores = np.where(np.tril(np.ones((9, 9), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("bhqk,bkhd->bqhd", weights, value).reshape(2, 9, 16) @ own["out"]["kernel"]
        y = norm(x, own["before_perceptron"]["scale"])
        x = x + gelu(y @ own["up"]["kernel"]) @ own["down"]["kernel"]
    expected = norm(x, p["norm"]["scale"]) @ p["head"]["kernel"]
    np.testing.assert_allclose(net.apply(variables, tokens), expected, rtol=2e-4, atol=2e-4)


def test_all_kernels_are_weight_normalized_by_their_axes():
    config = arm_config("weight_norm")
    dataset = data.load(config.data)
    uses = training.weight_uses(tasks.build(config.model, dataset), dataset, config)
    kernels = [*(f"blocks/{name}/kernel" for name in ("query", "key", "value", "out", "up", "down")), "head/kernel"]
    assert {use.path: use.reduction for use in uses if use.reduction} == dict.fromkeys(kernels, (-2,))


def test_what_is_unlikely_is_drawn_as_often_as_it_should_be():
    """Also of logits in bfloat16: one symbol with probability 0.9, and 255 that share the rest."""
    logits = jnp.log(jnp.array([0.9] + [0.1 / 255] * 255)).astype(jnp.bfloat16)
    keys = jax.random.split(jax.random.key(0), 20_000)
    others = np.mean(np.asarray(jax.vmap(lambda key: language.drawn(key, logits, 1.0))(keys)) > 0)
    expected = 1 - float(jax.nn.softmax(logits.astype(jnp.float32))[0])
    assert abs(others - expected) < 5 * math.sqrt(expected / 20_000)


@pytest.mark.slow
def test_each_byte_of_a_sample_is_the_likeliest_at_a_low_temperature():
    """Written byte by byte here, by the logits of what is there so far."""
    config = arm_config("weight_norm", "model.temperature=1e-6", "model.prompt='def '")
    dataset = data.load(config.data)
    functions, member = training.functions(config, dataset), training.Member(jnp.int32(0), jnp.float32(0.1))
    state = functions.start(member, dataset.train)
    written = bytes(functions.sample(state, member))
    assert len(written) == 12
    task = tasks.build(config.model, dataset)
    params = training.wn.reconstruct(state.params)
    predict, tokens = jax.jit(task.predict), list(b"def ")
    while len(tokens) < 12:
        padded = np.zeros((1, 13), np.uint8)
        padded[0, : len(tokens)] = tokens
        logits, _ = predict(params, {}, {"tokens": jnp.asarray(padded)}, None)
        tokens.append(int(logits[0, len(tokens) - 1].argmax()))
    assert written == bytes(tokens)


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_on_a_mesh_the_losses_are_those_of_one_device():
    """Parameters shared out over two axes, gathered layer by layer."""
    config = arm_config("weight_norm")

    def losses(shape):
        own = Arm(config, Placement(data.load(config.data), mesh.build(mesh.Shape(*shape))))
        own.prepare()
        return [own.advance().figures["train_loss"] for _ in range(2)], own.evaluate()["loss"], own

    expected, found = losses((1, 1, 1)), losses((2, 2, 2))
    for a, b in zip(expected[:2], found[:2], strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5)
    kernel = found[2].states[0].params["blocks"]["up"]["kernel"]
    assert kernel.v.sharding.spec == jax.sharding.PartitionSpec(None, None, "fsdp", "model")


# Runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_once(tmp_path_factory, "gpt", "train", GPT, "--arm", "weight_norm", *SETTINGS)


@pytest.mark.slow
def test_a_run_writes_samples_and_shows_them(run):
    out, output = run
    samples = read_records(out / "samples.jsonl")
    assert [(sample["arm"], sample["step"]) for sample in samples] == [("weight_norm", 2), ("weight_norm", 4)]
    assert all(len(sample["texts"]) == 2 and sample["texts"][0][0] == "\n" for sample in samples)
    page = (out / "report.html").read_text()
    assert "Samples" in page
    assert "weight_norm, step 4" in page
    assert "test loss" in output


@pytest.mark.slow
def test_a_resumed_run_writes_the_samples_of_a_whole_one(run, tmp_path):
    whole, out = run[0], tmp_path / "run"
    command = ("train", GPT, "--arm", "weight_norm", "--out", out, *SETTINGS)
    assert invoke(*command).exit_code == 0
    (out / "checkpoints" / "4").rename(tmp_path / "gone")
    assert invoke(*command, "--resume").exit_code == 0

    def sorted_(path):
        return sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda r: (r["arm"], r["step"]))

    assert sorted_(out / "samples.jsonl") == sorted_(whole / "samples.jsonl")


def test_a_run_does_not_go_on_with_another_text(tmp_path):
    path, out = tmp_path / "text", tmp_path / "run"
    path.write_bytes(b"To be, or not to be: " * 100)
    command = ("train", GPT, "--arm", "bigram", "--out", out, *SETTINGS, "--set", f"data.path={path}")
    assert invoke(*command).exit_code == 0
    assert invoke(*command, "--resume").exit_code == 0
    path.write_bytes(b"To be, or not to sea: " * 100)
    _windows.cache_clear()  # a resumed run is another process
    assert "holds a run on another text than data.path" in fails(*command, "--resume")


@pytest.mark.slow
def test_a_mapped_file_trains_as_one_in_memory(tmp_path):
    """Batches are fed from the file, a step at a time."""
    path = tmp_path / "text"
    path.write_bytes(bytes(text.standard_library()[:20_000]))
    config = arm_config("plain", f"data.path={path}", "train.seeds=1")
    dataset = data.load(config.data)
    losses = []
    for fed in (None, False):
        arm = Arm(config, Placement(dataset, mesh.build(mesh.Shape(1, 1, 1)), fed))
        assert arm.placement.fed == (fed is None)
        arm.prepare()
        losses.append([arm.advance().figures["train_loss"] for _ in range(2)])
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_an_arm_of_another_network_has_what_all_networks_have():
    """The config of an arm with another `model.name`: of the base's keys, those that the other network knows too."""
    arms = toml_file.load(GPT, [*SMALL, "model.dtype='bfloat16'"]).arms
    assert arms["plain"].model.dtype == arms["bigram"].model.dtype == "bfloat16"
    assert not hasattr(arms["bigram"].model, "layers")
