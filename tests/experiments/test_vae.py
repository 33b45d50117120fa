"""The variational autoencoder as a task of the engine: on images that are made up here, from config to report."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from PIL import Image

import experiments.data as data
import wn_jax as wn
from experiments import tasks
from experiments.config import toml_file
from experiments.data import Dataset
from experiments.engine import arm, training
from experiments.run_folder import pictures
from experiments.run_folder.record import read_records
from experiments.tasks.vae import VAEConfig
from tests.experiments.commands import invoke, run_once
from tests.experiments.vaes import CONVOLUTIONS, SMALL, TINY, config, settings, stripes, stripes_are_a_data_set  # noqa: F401


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_once(tmp_path_factory, "vae", "compare", SMALL, *settings())


@pytest.mark.slow
def test_a_run_records_the_bound_and_its_terms(run):
    records = read_records(run[0] / "metrics.jsonl")
    assert {record["arm"] for record in records} == {"plain", "weight_norm"}
    for record in records:
        for kind in ("train", "test") if record["step"] % 2 == 0 else ("train",):
            terms = np.add(record[f"{kind}_reconstruction"], record[f"{kind}_kl"])
            np.testing.assert_allclose(record[f"{kind}_loss"], terms, rtol=1e-5)
        assert ("test_log_likelihood" in record) == (record["step"] == 4)
        assert not any("bits" in name for name in record)


def in_parts(dataset, sizes, filled):
    """The held-out examples in parts of these sizes, each filled up with examples that do not count."""
    first, parts = 0, []
    for size in sizes:
        rows = np.resize(np.arange(first, first + size), max(size, filled))
        parts.append(({"x": dataset.held_out["x"][rows]}, np.arange(len(rows)) < size))
        first += size
    return parts


@pytest.fixture(scope="module")
def trained():
    own = arm.build(toml_file.select(toml_file.load(SMALL, TINY), ["weight_norm"]))["weight_norm"]
    own.prepare()
    own.advance()
    return own


@pytest.mark.slow
def test_the_log_likelihood_is_that_of_the_mean_over_the_draws(trained):
    weights = np.stack(
        [
            jax.vmap(trained.functions.log_weight, (0, 0, None, None, None))(
                trained.states[0], trained._groups[0], trained.placement.dataset.held_out, 0, draw
            )
            for draw in range(3)
        ]
    ).astype(float)
    assert weights.shape == (3, 2, 10)
    assert len(np.unique(weights)) == weights.size, "each draw, seed and image has its own noise"
    expected = (scipy.special.logsumexp(weights, axis=0) - np.log(3)).mean(axis=-1)
    checks = []
    found = trained.log_likelihood(lambda: checks.append(1))["log_likelihood"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert len(checks) == 3


@pytest.mark.slow
def test_what_is_evaluated_does_not_depend_on_what_is_evaluated_together(trained, monkeypatch):
    """As another mesh has it: in parts of other sizes, filled up to whole ones."""
    whole = {**trained.evaluate(), **trained.log_likelihood(lambda: None)}
    monkeypatch.setattr(trained.placement, "held_out", lambda: in_parts(trained.placement.dataset, [5, 5], 5))
    halves = {**trained.evaluate(), **trained.log_likelihood(lambda: None)}
    assert halves.keys() == {"loss", "reconstruction", "kl", "log_likelihood"}
    for name, values in whole.items():
        np.testing.assert_allclose(halves[name], values, rtol=1e-5, err_msg=name)
    monkeypatch.setattr(trained.placement, "held_out", lambda: in_parts(trained.placement.dataset, [10], 13))
    for name, values in {**trained.evaluate(), **trained.log_likelihood(lambda: None)}.items():
        np.testing.assert_allclose(values, whole[name], rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_pictures_are_written_at_each_evaluation(run):
    for name in ("plain", "weight_norm"):
        folder = run[0] / "pictures" / name / "0.002"
        kinds = {"samples": (4, 12), "reconstructions": (4, 12), "interpolations": (4, 12)}
        names = [f"{kind}-000000{step}.png" for kind in kinds for step in (2, 4)]
        assert sorted(path.name for path in folder.iterdir()) == sorted(names)
        for kind, (rows, columns) in kinds.items():
            with Image.open(folder / f"{kind}-0000004.png") as image:
                assert image.size == (9 * columns - 1, 9 * rows - 1)
    with Image.open(folder / "reconstructions-0000004.png") as image:
        shown = np.asarray(image)
    held_out = data.load(config("plain").data).held_out["x"]
    for column in range(10):  # the first row is what there is to see, black and white
        np.testing.assert_array_equal(shown[:8, 9 * column : 9 * column + 8, 0], 255 * held_out[column, ..., 0])


@pytest.mark.slow
def test_the_report_has_them_and_the_steps_to_each_loss(run):
    page, printed = (run[0] / "report.html").read_text(), run[1]
    assert page.count('<img class="grid" src="data:image/png;base64,') == 6
    for heading in (
        "Samples",
        "Reconstructions",
        "Interpolations",
        "The terms of the loss",
        "Steps to training losses",
    ):
        assert f">{heading}</h2>" in page
    assert "over the first arm&#39;s" in page
    assert re.search(r"weight_norm +1000 +1 ± 0 +1.00 ± 0.00", printed), printed
    assert (run[0] / "curves.png").exists()
    summary = json.loads((run[0] / "summary.json").read_text())
    assert [target["reached"] for target in summary[1]["targets"]] == [2, 0]
    assert summary[1]["targets"][0]["ratio"] == 1, "both are below at the first record"
    figures = {figure["metric"] for figure in summary[0]["others"]}
    assert figures == {"test_reconstruction", "test_kl", "test_log_likelihood"}


@pytest.mark.slow
def test_a_resumed_run_is_the_whole_one(tmp_path):
    """Stopped after its second record: what came later is removed, and made again as it was."""
    out, command = (
        tmp_path / "run",
        ("train", SMALL, "--arm", "weight_norm", *settings("model.widths=[2]", "model.latents=[3,2]")),
    )
    assert invoke(*command, "--out", out).exit_code == 0
    late = pictures.last(out, "weight_norm", 0.002)[0].path
    content, records = late.read_bytes(), (out / "metrics.jsonl").read_bytes()
    for step in (3, 4):
        for path in (out / "checkpoints").glob(f"{step}*"):
            path.rename(tmp_path / path.name)
    late.with_name("samples-0000009.png").write_bytes(b"left over")
    result = invoke(*command, "--out", out, "--resume")
    assert result.exit_code == 0, result.output
    assert "going on after step 2 of 4" in result.output
    assert late.read_bytes() == content
    assert not late.with_name("samples-0000009.png").exists()
    assert (out / "metrics.jsonl").read_bytes() == records


@pytest.mark.slow
def test_both_arms_see_the_same_batches_binary_images_and_noise():
    """Started as the same function they have the same loss in the first step, and at its end the same evaluation."""
    changes = ["data.binarize=dynamic", "arms.weight_norm.model.init=framework", "optimizer.learning_rate=1e-9"]
    plain, weight_norm = arm.build(toml_file.load(SMALL, [*TINY, *changes])).values()
    for own in (plain, weight_norm):
        own.prepare()
    np.testing.assert_allclose(*(own.advance().figures["train_loss"] for own in (plain, weight_norm)), rtol=1e-6)
    np.testing.assert_allclose(*(own.evaluate()["kl"] for own in (plain, weight_norm)), rtol=1e-5)


@pytest.mark.slow
def test_both_arms_start_from_the_same_kernels():
    started = {}
    for name in ("plain", "weight_norm"):
        own = config(name, *CONVOLUTIONS)
        functions = training.functions(own, data.load(own.data))
        member = training.Member(jnp.int32(0), jnp.float32(0.002))
        started[name] = functions.start(member, data.load(own.data).train).params
    directions = jax.tree.map(
        lambda leaf: leaf.v if isinstance(leaf, wn.WeightNorm) else leaf,
        started["weight_norm"],
        is_leaf=lambda leaf: isinstance(leaf, wn.WeightNorm),
    )
    pairs = zip(*(jax.tree_util.tree_leaves_with_path(tree) for tree in (started["plain"], directions)), strict=True)
    kernels = [(one, other) for (path, one), (_, other) in pairs if "kernel" in str(path)]
    assert len(kernels) == 19
    for one, other in kernels:
        np.testing.assert_allclose(one, other, rtol=1e-6)


def task(likelihood="bernoulli", dataset=None, **changes):
    fields = {"name": "vae", "widths": (), "dense": 0, "latents": (2,), "likelihood": likelihood}
    x = np.zeros((3, 2, 2, 1), np.float32)
    return tasks.build(VAEConfig(**{**fields, **changes}), dataset or Dataset({"x": x}, {"x": x}, "test", 1))


def test_free_bits_and_the_weight_of_the_divergence():
    outputs = {"reconstruction": jnp.array([10.0, 20.0]), "kl": jnp.array([[1.0, 0.1], [3.0, 0.3]])}
    # The means over the batch are 2 and 0.2; each example has 10 or 20 beside.
    for changes, expected in (
        ({}, [11.1, 23.3]),
        ({"kl_weight": 0.5}, [10.55, 21.65]),
        ({"kl_weight": 0.0}, [10, 20]),
        ({"free_bits": 0.5}, [12.5, 22.5]),
        ({"free_bits": 3.0, "kl_weight": 0.5}, [13.0, 23.0]),
    ):
        np.testing.assert_allclose(task(**changes).losses(outputs, {}), expected, rtol=1e-6)
        terms = task(**changes).terms(outputs, {})
        np.testing.assert_allclose(terms["kl"], [1.1, 3.3])
        np.testing.assert_allclose(terms["reconstruction"], [10, 20])


def test_free_bits_stop_the_gradient_of_a_latent_that_has_fewer():
    own = task(free_bits=0.5)
    kl = jnp.array([[1.0, 0.1], [3.0, 0.3]])
    gradient = jax.grad(lambda kl: own.losses({"reconstruction": jnp.zeros(2), "kl": kl}, {}).mean())(kl)
    np.testing.assert_allclose(gradient, [[0.5, 0], [0.5, 0]])


def test_grey_images_are_drawn_anew_in_training():
    """Each pixel that is drawn white costs 7 nats where the network is sure of black; the drawn number is binomial."""
    own = task(dataset=Dataset({"x": np.full((4, 30, 30, 1), 0.3, np.float32)}, {"x": np.zeros((1, 30, 30, 1))}, "", 1))
    examples = {"x": jnp.full((4, 30, 30, 1), 0.3)}
    params, _ = own.init(jax.random.key(0), examples)
    params["decoder"]["unfold"] = {"kernel": jnp.zeros((2, 900)), "bias": jnp.full(900, -7.0)}
    found = [own.predict(params, {}, examples, jax.random.key(seed))[0]["reconstruction"] for seed in (0, 1)]
    white = (np.array(found) - 900 * np.log1p(np.exp(-7))) / 7
    np.testing.assert_allclose(white, white.round(), atol=1e-3)
    assert (abs(white - 270) < 5 * np.sqrt(900 * 0.3 * 0.7)).all()
    assert len(np.unique(white.round())) > 4


def test_bits_per_dimension_are_those_of_bytes():
    x = np.full((3, 2, 2, 1), 0.5 / 128, np.float32)
    own = task("logistic", dataset=Dataset({"x": x}, {"x": x}, "test", 1))
    params, _ = own.init(jax.random.key(0), {"x": x})
    figures = own.evaluate(params, {}, {"x": x}, jax.random.split(jax.random.key(1), 3))
    np.testing.assert_allclose(figures["bits_per_dim"], figures["loss"] / 4 / np.log(2), rtol=1e-6)


@pytest.mark.slow
def test_the_scale_goes_where_the_weights_are_used_whichever_side_it_is_on():
    own = config("weight_norm", "model.init=framework", *CONVOLUTIONS)
    built = tasks.build(own.model, data.load(own.data))
    examples = {"x": jnp.asarray(stripes(4, 3))}
    params, _ = built.init(jax.random.key(0), examples)
    axes = wn.infer_axes(built.loss)(params, {}, examples, jax.random.key(1))
    nodes = wn.reparameterize(params, axes)
    plain = built.loss(params, {}, examples, jax.random.key(1))[0]
    for scale in ("auto", "weight", "output"):
        loss = jax.jit(wn.wrap(built.loss, scale=scale))(nodes, {}, examples, jax.random.key(1))[0]
        np.testing.assert_allclose(loss, plain, rtol=1e-5)


def test_a_mosaic_has_each_image_in_its_place():
    grid = np.arange(2 * 3 * 2 * 2 * 1, dtype=np.uint8).reshape(2, 3, 2, 2, 1)
    found = pictures.mosaic(grid)
    assert found.shape == (5, 8, 3)
    for row in range(2):
        for column in range(3):
            own = found[3 * row : 3 * row + 2, 3 * column : 3 * column + 2]
            np.testing.assert_array_equal(own, np.broadcast_to(grid[row, column], (2, 2, 3)))
    assert (found[2] == 128).all()
