"""`python -m experiments conditioning`: the parametrizations, what is measured in them, and what bad input says."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wn_jax as wn
from experiments import data, tasks
from experiments.conditioning import coordinates
from experiments.conditioning.along import Along
from experiments.config import toml_file
from experiments.engine import training
from tests.experiments.commands import ROOT, fails, invoke

DIGITS, LINEAR = (ROOT / "configs" / f"conditioning_{name}.toml" for name in ("digits", "linear"))
TINY = [
    "train.steps=20", "train.evaluate_every=20", "train.seeds=2", "optimizer.learning_rate=[0.1, 0.5]",
    "conditioning.steps=[0, 20]", "conditioning.learning_rate=0.1", "conditioning.lanczos_steps=6",
    "conditioning.probes=1", "conditioning.norms=[2.0]", "conditioning.examples=40",
]  # fmt: skip


SMALL = ["model.hidden=[8]", "conditioning.matrices=['fisher']"]


def settings(*changes):
    return [word for change in (*TINY, *changes) for word in ("--set", change)]


def arms(network):
    """By normalization, the task of this network and the axes of its weights; and examples."""
    tables = {"mlp": '{name="mlp", hidden=[5, 4]}', "conv": '{name="conv", widths=[3, 4]}'}
    config = toml_file.load(ROOT / "configs" / "conditioning_digits.toml", [*TINY, f"model={tables[network]}"]).arms
    dataset = data.load(config["plain"].data)
    built = {}
    for norm, arm in (("none", "plain"), ("mean_only", "weight_norm_mean_only"), ("batch", "batch_norm")):
        task = tasks.build(config[arm].model, dataset)
        uses = training.weight_uses(task, dataset, config[arm])
        built[norm] = (task, {use.path: use.reduction for use in uses if use.reduction is not None})
    return built, {name: jnp.asarray(x[:30]) for name, x in dataset.train.items()}


@pytest.mark.slow
@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_all_parametrizations_compute_the_plain_function_and_give_its_weights_back(network):
    built, examples = arms(network)
    plain_task, axes = built["none"]
    params, _ = plain_task.init(jax.random.key(0), examples)
    # Biases and a scale of their own, as after training: at the start all biases are 0.
    params = jax.tree.map(lambda x: 1.3 * x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), params)
    expected, _ = plain_task.predict(params, {}, examples, jax.random.key(0))
    for own in [
        coordinates.plain(plain_task),
        *coordinates.weight_norm(plain_task, axes, (0.3, 2.0)),
        coordinates.weight_norm_mean_only(plain_task, *built["mean_only"]),
        coordinates.batch_norm(plain_task, *built["batch"]),
    ]:
        start = own.start(params, examples)
        np.testing.assert_allclose(own.predict(start, examples), expected, atol=2e-5, err_msg=own.name)
        found = own.weights(start, examples)
        assert jax.tree.structure(found) == jax.tree.structure(params), own.name
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5, err_msg=own.name)
        # Also away from the start, the weights are those of the plain network that computes the same.
        moved = jax.tree.map(lambda x: x * 1.1 + 0.01, start)
        through, _ = plain_task.predict(own.weights(moved, examples), {}, examples, jax.random.key(0))
        np.testing.assert_allclose(through, own.predict(moved, examples), atol=5e-5, err_msg=own.name)


def test_one_norm_for_all_vectors_of_a_layer():
    built, examples = arms("mlp")
    task, axes = built["none"]
    params, _ = task.init(jax.random.key(0), examples)
    as_it_is, equal = coordinates.weight_norm(task, axes, (3.0,))
    kernel = np.asarray(params["Dense_0"]["kernel"])
    np.testing.assert_array_equal(as_it_is.start(params, examples)["Dense_0"]["kernel"].v, kernel)
    lengths = np.linalg.norm(equal.start(params, examples)["Dense_0"]["kernel"].v, axis=0)
    expected = 3 * np.sqrt(np.mean(np.sum(kernel**2, axis=0)))
    np.testing.assert_allclose(lengths, np.full(5, expected), rtol=1e-5)


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """A run of linear regression, where a matrix of 21 rows is diagonalized as a whole."""
    path = tmp_path_factory.mktemp("linear") / "run"
    changes = ["conditioning.examples=1000", "conditioning.lanczos_steps=40", "conditioning.damping=1e-6"]
    result = invoke("conditioning", LINEAR, "--out", path, *settings(*changes))
    assert result.exit_code == 0, result.output
    return path


def records(path):
    return [json.loads(line) for line in (path / "conditioning.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_condition_number_of_linear_regression_is_that_of_the_covariance(linear):
    """The Hessian is the inputs' covariance, of eigenvalues from 1 to 1/100, and 1 for the bias."""
    own = [record for record in records(linear) if record["coordinates"] == "plain"]
    assert [(record["seed"], record["step"]) for record in own] == [(0, 0), (1, 0), (0, 20), (1, 20)]
    eigenvalues = np.append(np.geomspace(1, 0.01, 20), 1)
    for record in own:
        for name in ("hessian", "fisher"):
            matrix = record["matrices"][name]
            assert matrix["size"] == 21
            np.testing.assert_allclose(matrix["numerical_range"], 100, rtol=1e-3)
            np.testing.assert_allclose(matrix["to_mean"], 1 / eigenvalues.mean(), rtol=1e-3)
            np.testing.assert_allclose(matrix["to"]["20"], 1 / np.sort(eigenvalues)[1], rtol=1e-3)


@pytest.mark.slow
def test_the_natural_gradient_solves_linear_regression_in_one_step(linear):
    """To the noise: what is left is the loss of least squares, which 1,000 examples of noise 0.1 put near 0.005."""
    for record in records(linear):
        if record["coordinates"] == "natural gradient":
            np.testing.assert_allclose(record["loss"] * (1 - record["decrease"]), 0.005, rtol=0.15)
            assert record["residual"] < 1e-3
            np.testing.assert_allclose(record["matrices"]["fisher"]["to_mean"], 1, atol=1e-3)


@pytest.mark.slow
def test_weight_norm_with_v_as_w_moves_the_weights_as_plain_does(linear):
    """J J' is w w'/||w||^2 + (g/||v||)^2 (1 - w w'/||w||^2), the identity where g = ||v||."""
    for record in records(linear):
        assert record["difference"] < 1e-6
        if record["coordinates"] == "weight norm, v = w":
            assert record["cosine_gradient"] == pytest.approx(1, abs=1e-5)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("digits") / "run"
    result = invoke("conditioning", DIGITS, "--out", path, *settings(*SMALL))
    assert result.exit_code == 0, result.output
    return path


@pytest.mark.slow
def test_a_run_measures_all_parametrizations_at_all_places(digits):
    places = [(record["seed"], record["step"]) for record in records(digits)]
    names = list(dict.fromkeys(record["coordinates"] for record in records(digits)))
    assert names == [
        "plain", "weight norm, v = w", "weight norm, ‖v‖ = 2 rms‖w‖", "weight norm + mean-only batch norm",
        "batch norm", "natural gradient",
    ]  # fmt: skip
    assert sorted(set(places)) == [(0, 0), (0, 20), (1, 0), (1, 20)]
    assert len(places) == len(names) * 4
    assert all(record["difference"] < 1e-5 for record in records(digits))


@pytest.mark.slow
def test_the_path_is_the_training_of_its_arm(digits):
    """The loss at its end is what plain weights trained at that rate have on these examples."""
    experiment = toml_file.load(DIGITS, [*TINY, *SMALL, "optimizer.learning_rate=0.1"])
    config = experiment.arms["plain"]
    functions = training.functions(config, dataset := data.load(config.data))
    member, train = training.Member(jnp.int32(1), jnp.float32(0.1)), jax.tree.map(jnp.asarray, dataset.train)
    state = functions.start(member, train)
    for first in (0, 10):
        state, _ = functions.advance(state, member, train, functions.order(member, jnp.int32(first)))
    task = tasks.build(config.model, dataset)
    examples = {name: x[:40] for name, x in train.items()}
    expected = task.loss(wn.reconstruct(state.params), {}, examples, jax.random.key(0))[0]
    (found,) = {
        record["loss"]
        for record in records(digits)
        if (record["seed"], record["step"], record["coordinates"]) == (1, 20, "plain")
    }
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_cut_off(digits):
    """In the middle of a place, whose records are then made again."""
    whole = records(digits)
    lines = (digits / "conditioning.jsonl").read_text().splitlines(keepends=True)
    (digits / "conditioning.jsonl").write_text("".join(lines[:15]) + lines[15][:40])
    result = invoke("conditioning", DIGITS, "--out", digits, "--resume", *settings(*SMALL))
    assert result.exit_code == 0, result.output
    last = {(record["coordinates"], record["seed"], record["step"]): record for record in records(digits)}
    for record in whole:
        again = last[record["coordinates"], record["seed"], record["step"]]
        assert again["loss"] == pytest.approx(record["loss"], rel=1e-5)
        assert again["cosine_natural"] == pytest.approx(record["cosine_natural"], rel=1e-3)


@pytest.mark.slow
def test_the_report_shows_it(digits):
    page = (digits / "report.html").read_text()
    for words in ("Curvature at the same function", "How badly conditioned the loss is", "natural gradient"):
        assert words in page
    assert {path.stem for path in (digits / "figures").iterdir()} == {
        "condition", "spectrum", "alignment", "decrease", "learning-rate",
    }  # fmt: skip
    rows = json.loads((digits / "curvature.json").read_text())
    (row,) = [
        row
        for row in rows
        if (row["parametrization"], row["quantity"], row["step"]) == ("plain", "cosine with natural gradient", 20)
    ]
    own = [r["cosine_natural"] for r in records(digits) if (r["coordinates"], r["step"]) == ("plain", 20)]
    assert row["mean"] == pytest.approx(np.mean(own[-2:]))
    assert row["se"] == pytest.approx(abs(own[-1] - own[-2]) / 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("conditioning.steps=[0, 15]", "conditioning.steps: 15 must be a multiple of train.record_every"),
        ("conditioning.steps=[0, 700]", "conditioning.steps: 700 must be"),
        ("conditioning.steps=[]", "conditioning.steps"),
        ("conditioning.steps=[10, 10]", "names one of them twice"),
        ("conditioning.path=plian", "did you mean 'plain'"),
        ("conditioning.path=batch_norm", "has a normalization"),
        ("conditioning.examples=5000", "conditioning.examples: 5000 is more than the 1000 training examples"),
        ("conditioning.matrices=['hesian']", "did you mean 'hessian'"),
        ("conditioning.norms=[0.0]", "greater than 0"),
        ("conditioning.probess=3", "did you mean 'probes'"),
    ],
)
def test_a_wrong_table_is_refused(change, message, tmp_path):
    error = fails("conditioning", DIGITS, "--out", tmp_path / "run", "--set", change)
    assert message in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_path_that_diverges_is_said_and_what_was_measured_stays(tmp_path):
    changes = ["conditioning.learning_rate=1e9", "conditioning.lanczos_steps=2", "train.seeds=1"]
    error = fails("conditioning", LINEAR, "--out", tmp_path / "run", *settings(*changes), code=1)
    assert "(arm 'plain', learning rate 1e+09, seed 0) has no finite loss at step 20" in error
    assert {record["step"] for record in records(tmp_path / "run")} == {0}
    assert (tmp_path / "run" / "report.html").exists()


def test_a_config_without_the_table_is_refused():
    assert "[conditioning]" in fails("conditioning", ROOT / "configs" / "digits.toml")


@pytest.mark.slow
def test_other_commands_take_a_config_with_the_table(tmp_path):
    result = invoke("train", LINEAR, "--out", tmp_path / "run", *settings())
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "run" / "conditioning.jsonl").exists()
    assert toml_file.load(tmp_path / "run" / "config.toml").conditioning == toml_file.load(LINEAR, TINY).conditioning


def test_a_classifier_needs_labels(tmp_path):
    error = fails("train", DIGITS, "--set", "data={name='linear', batch_size=10}", "--out", tmp_path / "run")
    assert "the examples have no labels" in error


def test_spread_scales_each_vector_and_leaves_its_direction():
    config = toml_file.load(DIGITS, [*TINY, "optimizer.learning_rate=0.1"]).arms["plain"]
    dataset = data.load(config.data)
    wide = config.model_copy(update={"model": config.model.model_copy(update={"init_spread": 2.0})})
    member = training.Member(jnp.int32(0), jnp.float32(0.1))
    plain, scaled = (training.functions(c, dataset).start(member, dataset.train).params for c in (config, wide))
    factors = []
    for layer in plain:
        ratio = np.asarray(scaled[layer]["kernel"] / plain[layer]["kernel"])
        np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:1], ratio.shape), rtol=1e-5)
        np.testing.assert_array_equal(scaled[layer]["bias"], plain[layer]["bias"])
        factors += list(np.log(ratio[0]))
    assert len(factors) == 16 + 16 + 10
    assert np.std(factors) == pytest.approx(2, abs=0.5)
    assert np.mean(factors) == pytest.approx(0, abs=0.9)


def test_a_place_is_measured_again_unless_all_of_it_is_there():
    along = Along(toml_file.load(LINEAR, [*TINY, "train.seeds=1"]))
    assert along.left([]) == {(0, 0), (0, 20)}
    names = ["plain", "weight norm, v = w", "weight norm, ‖v‖ = 2 rms‖w‖", "natural gradient"]
    own = [{"seed": 0, "step": 0, "coordinates": name} for name in names]
    assert along.left([*own[:3], own[0]]) == {(0, 0), (0, 20)}
    assert along.left(own) == {(0, 20)}


@pytest.mark.slow
def test_a_path_may_be_that_of_any_arm_without_normalization_and_of_any_precision():
    for change in ("conditioning.path=weight_norm_kept_norms", "model.dtype=bfloat16"):
        along = Along(toml_file.load(DIGITS, [*TINY, *SMALL, "train.seeds=1", "conditioning.steps=[0]", change]))
        (records,) = along.records(along.left([]))
        assert all(record["difference"] < 1e-5 for record in records)


@pytest.mark.slow
def test_a_damaged_record_is_named(linear):
    with (linear / "conditioning.jsonl").open("a") as file:
        file.write("{}\n")
    changes = ["conditioning.examples=1000", "conditioning.lanczos_steps=40", "conditioning.damping=1e-6"]
    error = fails("conditioning", LINEAR, "--out", linear, "--resume", *settings(*changes))
    assert "has no seed, step or coordinates; remove or mend the line" in error
