"""The variational autoencoder as a task of the engine: on images that are made up here, from config to report."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import experiments.data as data
import wn_jax as wn
from experiments import arm, pictures, tasks, toml_file, training
from experiments.data import Dataset
from experiments.data.source import Raw, Source
from experiments.errors import ConfigError
from experiments.report import report
from experiments.run_folder import read_records
from experiments.tasks.vae import VAEConfig
from tests.experiments import ROOT, fails, invoke, run_once
from tests.messages import pattern

SMALL = ROOT / "configs" / "vae_mnist_small.toml"
TINY = [
    *("data.name=stripes", "data.batch_size=8", "data.test_examples=10", "model.widths=[]", "model.dense=5"),
    *("model.latents=[3]", "model.importance_samples=3", "train.steps=4", "train.record_every=1", "mesh.data=1"),
    *("train.evaluate_every=2", "train.seeds=2", "train.target_loss=[1000.0,1.0]"),
]
CONVOLUTIONS = ["model.widths=[2,3]", "model.latents=[3,2]"]


def stripes(count, seed):
    """Images 8 x 8 of grey stripes of random direction and place."""
    random = np.random.default_rng(seed)
    angle, place = random.uniform(0, np.pi, (2, count, 1, 1))
    y, x = np.mgrid[:8, :8]
    return (0.5 + 0.5 * np.sin(x * np.cos(angle) + y * np.sin(angle) + 2 * place))[..., None].astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def stripes_are_a_data_set():
    labels = np.zeros(40, np.int32)
    raw = Raw(stripes(40, 0), labels, stripes(20, 1), labels[:20], classes=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.SOURCES, "stripes", Source("stripes", lambda _: raw))
        patch.setattr(data, "NAMES", (*data.NAMES, "stripes"))
        yield


def settings(*changes):
    return [word for change in (*TINY, *changes) for word in ("--set", change)]


def config(name, *changes):
    return toml_file.load(SMALL, [*TINY, *changes]).arms[name]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_once(tmp_path_factory, "vae", "compare", SMALL, *settings())


def test_a_run_records_the_bound_and_its_terms(run):
    records = read_records(run[0] / "metrics.jsonl")
    assert {record["arm"] for record in records} == {"plain", "weight_norm"}
    for record in records:
        for kind in ("train", "test") if record["step"] % 2 == 0 else ("train",):
            terms = np.add(record[f"{kind}_reconstruction"], record[f"{kind}_kl"])
            np.testing.assert_allclose(record[f"{kind}_loss"], terms, rtol=1e-5)
        assert ("test_log_likelihood" in record) == (record["step"] == 4)
        assert not any("bits" in name for name in record)


def test_the_estimate_of_the_log_likelihood_is_above_the_bound(run):
    """In the mean, over ten images and three draws: the draws are others than those of the bound."""
    last = [record for record in read_records(run[0] / "metrics.jsonl") if record["step"] == 4]
    for record in last:
        assert (np.array(record["test_log_likelihood"]) > -np.array(record["test_loss"]) - 1).all()


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
    out, command = tmp_path / "run", ("train", SMALL, "--arm", "weight_norm", *settings(*CONVOLUTIONS))
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
def test_both_arms_see_the_same_noise_and_start_from_the_same_kernels():
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
    figures = own.evaluate(params, {}, {"x": x}, jax.random.key(1))
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


BAD = {
    "no latents": (["model.latents=[]"], "model.latents: .*at least 1"),
    "a layer of none": (["model.latents=[0]"], "model.latents.*greater than 0"),
    "more layers than places": (["model.latents=[3,2]"], "latents has 2 layers, and the decoder places for 1: one on"),
    "strides": (
        ["model.widths=[2,2,2,2,2]"],
        "model.widths: 5 stages halve images 4 times, and 8 x 8 pixels cannot be divided by 16; leave out some",
    ),
    "a negative weight": (["model.kl_weight=-0.1"], "model.kl_weight: .*greater than or equal to 0"),
    "negative free bits": (["model.free_bits=-1.0"], "model.free_bits: .*greater than or equal to 0"),
    "no draws": (["model.importance_samples=0"], "model.importance_samples: .*greater than 0"),
    "grey": (["data.binarize=none"], "model.likelihood: 'bernoulli': pixels are grey, and bernoulli has 0 and 1: set"),
    "another likelihood": (
        ["model.likelihood=poisson"],
        "model.likelihood: 'poisson' is not allowed; allowed: bernoulli, logistic, normal",
    ),
    "whitened": (["data.whiten=true"], "whiten makes of pixels other numbers than the 0 to 1 of binarize; leave one"),
    "text": (
        ["data.name=text", "data.binarize=none", "data.window=32"],
        "model.name: vae models images, and the examples are text; choose 'gpt'",
    ),
    "binarized text": (["data.name=text"], "binarize has no meaning for text; leave it out"),
    "vectors": (
        ["data.name=linear", "data.binarize=none", "model.likelihood=normal"],
        "model.name: vae models images, and the examples have the shape (20,); choose 'mlp'",
    ),
    "a bad target": (["train.target_loss=[3.0,-1.0]"], "train.target_loss.*greater than 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, tmp_path):
    changes, message = BAD[case]
    error = fails("compare", SMALL, *settings(*changes), "--out", tmp_path / "run")
    assert re.search(pattern(message), error), error
    assert not (tmp_path / "run").exists()


def test_a_bound_that_is_not_finite_names_step_arm_and_term(tmp_path):
    changes = ["optimizer.learning_rate=1e30", "train.seeds=1", "train.ema=0.0"]
    error = fails("train", SMALL, "--arm", "plain", *settings(*changes), "--out", tmp_path / "run", code=1)
    assert re.search(
        r"the (reconstruction|kl|kl and reconstruction) of arm 'plain' \(learning rate 1e\+30, seed 0\) was", error
    )
    assert "not finite at step 2; no checkpoint was made before" in error


def test_what_is_at_fault():
    steps = {
        "loss": np.array([[1, np.nan], [np.inf, 1]]),
        "reconstruction": np.array([[1, 1], [np.inf, 1]]),
        "kl": np.array([[1, np.nan], [np.nan, 1]]),
    }
    assert arm._at_fault(steps, 0, 1) == ("kl",)
    assert arm._at_fault(steps, 1, 0) == ("reconstruction", "kl")
    assert arm._at_fault({"loss": steps["loss"]}, 0, 1) == ("loss",)
    assert arm._at_fault(steps, 0, 0) == (), "the update was"
    assert arm._at_fault(steps, 0, 2) == (), "that was in an earlier record"


def test_a_seed_that_diverges_is_marked_with_the_term(tmp_path):
    changes = ["optimizer.learning_rate=1e30", "train.ema=0.0"]
    arguments = ("train", SMALL, "--arm", "plain", *settings(*changes), "--out", tmp_path / "run")
    assert invoke(*arguments).exit_code == 0
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [record["nonfinite_step"] for record in records if "nonfinite_step" in record] == 3 * [[2, 2]]
    (noted,) = [record["at_fault"] for record in records if "at_fault" in record]
    assert noted.keys() == {"0", "1"}
    assert f"at step 2 seeds 0 ({noted['0']}), 1 ({noted['1']})" in (tmp_path / "run" / "report.html").read_text()


def test_curvature_needs_a_likelihood(tmp_path):
    table = tmp_path / "it.toml"
    table.write_text(SMALL.read_text() + "\n[conditioning]\nsteps = [0]\npath = 'plain'\n")
    error = fails("conditioning", table, *settings(), "--out", tmp_path / "run")
    assert "conditioning.path: the loss of arm 'plain' is no log-likelihood of what its network predicts" in error


def test_a_damaged_picture_is_named(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    bad = pictures.last(tmp_path / "run", "plain", 0.002)[0].path
    bad.write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=pattern(f"{bad}: cannot be read.*remove it")):
        report([tmp_path / "run"])


def test_a_mosaic_has_each_image_in_its_place():
    grid = np.arange(2 * 3 * 2 * 2 * 1, dtype=np.uint8).reshape(2, 3, 2, 2, 1)
    found = pictures.mosaic(grid)
    assert found.shape == (5, 8, 3)
    for row in range(2):
        for column in range(3):
            own = found[3 * row : 3 * row + 2, 3 * column : 3 * column + 2]
            np.testing.assert_array_equal(own, np.broadcast_to(grid[row, column], (2, 2, 3)))
    assert (found[2] == 128).all()
