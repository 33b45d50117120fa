"""The experiment engine: configs and their errors, batches, one tiny run with everything it writes, and its ends."""

import ast
import functools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import wn_jax as wn
from experiments import cli, config, data, interrupt, models, report, step, step_time, timed_models

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "configs" / "digits.toml"
TINY = ["train.steps=8", "train.steps_per_record=4", "train.seeds=2", "model.hidden=[16]", "train.target_loss=2.0"]


def invoke(*args):
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


def settings(*changes):
    return [word for change in (*TINY, *changes) for word in ("--set", change)]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    result = invoke("compare", DIGITS, "--out", out, *settings())
    assert result.exit_code == 0, result.output
    return out, result.output


def test_a_run_writes_everything_that_it_took(finished_run):
    out, output = finished_run
    assert {path.name for path in out.iterdir()} == {
        "config.toml", "environment.json", "metrics.jsonl", "summary.json", "curves.png",
    }  # fmt: skip
    environment = json.loads((out / "environment.json").read_text())
    assert environment["packages"]["jax"] == jax.__version__
    assert environment["devices"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    for arm in ("plain", "weight_norm", "weight_norm_mean_only", "mean_only", "batch_norm"):
        assert arm in output


def test_metrics_hold_every_record_of_every_arm_and_seed(finished_run):
    records = report.read_metrics(finished_run[0] / "metrics.jsonl")
    assert sorted({(record["arm"], record["step"]) for record in records}) == sorted(
        (arm, step)
        for arm in ("plain", "weight_norm", "weight_norm_mean_only", "mean_only", "batch_norm")
        for step in (4, 8)
    )
    for record in records:
        assert all(len(record[key]) == 2 for key in ("train_loss", "test_loss", "test_error"))
        assert all(0 <= error <= 1 for error in record["test_error"])
        assert record["seconds_per_step"] > 0


def test_the_resolved_config_is_the_experiment_again(finished_run):
    assert config.load(finished_run[0] / "config.toml") == config.load(DIGITS, TINY)


def test_training_is_deterministic(finished_run, tmp_path):
    assert (
        invoke("train", finished_run[0] / "config.toml", "--arm", "weight_norm", "--out", tmp_path / "again").exit_code
        == 0
    )
    again = report.read_metrics(tmp_path / "again" / "metrics.jsonl")
    before = [r for r in report.read_metrics(finished_run[0] / "metrics.jsonl") if r["arm"] == "weight_norm"]
    for a, b in zip(again, before, strict=True):
        assert (a["train_loss"], a["test_error"]) == (b["train_loss"], b["test_error"])


def test_seeds_differ_and_do_not_depend_on_one_another():
    dataset = data.load(config.load(DIGITS).arms["plain"].data)
    arm = step.make_arm(config.load(DIGITS, TINY).arms["weight_norm"], dataset)
    keys = jax.vmap(jax.random.key)(jnp.arange(3))
    _, losses = jax.jit(lambda keys: jax.vmap(arm.advance)(jax.vmap(arm.init)(keys)))(keys)
    _, alone = jax.jit(lambda key: arm.advance(arm.init(key)))(keys[1])
    assert len({float(loss) for loss in losses}) == 3
    np.testing.assert_allclose(losses[1], alone, rtol=1e-5)


def start(name, *changes, seed=0):
    """An arm's configuration, its data, and its state before the first step."""
    arm = config.load(DIGITS, [*TINY, *changes]).arms[name]
    dataset = data.load(arm.data)
    return arm, dataset, jax.jit(step.make_arm(arm, dataset).init)(jax.random.key(seed))


def test_arms_of_a_seed_start_from_the_same_directions_and_see_the_same_batches():
    _, _, plain = start("plain")
    for name, arm in config.load(DIGITS, TINY).arms.items():
        _, _, state = start(name)
        for layer in ("Dense_0", "Dense_1"):
            kernel = state.params[layer]["kernel"]
            directions = kernel.v if arm.model.weight_norm else kernel
            drawn = plain.params[layer]["kernel"]
            np.testing.assert_allclose(directions, drawn, rtol=3e-7)  # from one program to another: 1 ulp
        np.testing.assert_array_equal(jax.random.key_data(state.key), jax.random.key_data(plain.key))


def test_without_data_weight_norm_starts_as_the_same_function():
    losses = []
    for name in ("plain", "weight_norm"):
        arm, dataset, state = start(name, "arms.weight_norm.model.init=framework")
        losses.append(step.make_arm(arm, dataset).evaluate(state)["test_loss"])
    np.testing.assert_allclose(*losses, rtol=1e-6)


@pytest.mark.parametrize("name", ["weight_norm", "weight_norm_mean_only"])
def test_initialized_from_data_each_seed_normalizes_its_first_batch(name):
    arm = config.load(DIGITS, [*TINY, "model.hidden=[16, 12]"]).arms[name]
    dataset = data.load(arm.data)
    model = models.build(arm.model, dataset.classes)
    keys = jax.vmap(jax.random.key)(jnp.arange(2))
    states = jax.jit(jax.vmap(step.make_arm(arm, dataset).init))(keys)
    for seed in range(2):
        state = jax.tree.map(lambda array, seed=seed: array[seed], states)
        batch = data.batch_indices(state.key, len(dataset.train_x), arm.data.batch_size, jnp.int32(0), 1)[0]
        variables = {"params": wn.reconstruct(state.params), "batch_stats": state.batch_stats}
        mutable = ["batch_stats", "intermediates"]
        x = dataset.train_x[batch]
        _, seen = model.apply(variables, x, train=True, mutable=mutable, capture_intermediates=True)
        outputs = seen["intermediates"]
        layers = {layer: np.asarray(outputs[layer]["__call__"][0]) for layer in outputs if layer != "__call__"}
        assert len(layers) == (3 if name == "weight_norm" else 5)
        for layer, output in layers.items():
            np.testing.assert_allclose(output.std(axis=0), 1, rtol=1e-4, err_msg=layer)
            if "Norm" in layer or name == "weight_norm" or layer == "Dense_2":  # where there is a bias, or a mean
                np.testing.assert_allclose(output.mean(axis=0), 0, atol=1e-5, err_msg=layer)


def test_batches_are_epochs_of_permutations_and_a_function_of_key_and_step():
    key, examples, size = jax.random.key(0), 23, 5
    whole = data.batch_indices(key, examples, size, jnp.int32(0), 12)
    assert whole.shape == (12, size)
    for epoch in range(3):
        seen = np.asarray(whole[4 * epoch : 4 * epoch + 4]).ravel()
        assert len(set(seen)) == 20
        assert set(seen) <= set(range(examples))
    assert not np.array_equal(whole[:4], whole[4:8])
    for first, steps in ((0, 1), (3, 5), (7, 2), (11, 1)):
        np.testing.assert_array_equal(
            data.batch_indices(key, examples, size, jnp.int32(first), steps), whole[first : first + steps]
        )


def test_digits_are_the_real_ones():
    dataset = data.load(config.DataConfig(name="digits", batch_size=10))
    assert dataset.train_x.shape == (1297, 64)
    assert dataset.test_x.shape == (500, 64)
    np.testing.assert_allclose(dataset.train_x.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(dataset.train_x.std(), 1, rtol=1e-5)
    assert (np.bincount(dataset.test_y) >= 48).all()


def test_a_summary_against_numbers_worked_out_by_hand():
    records = [
        {"arm": "a", "step": 10, "seconds_per_step": 1.0, "train_loss": [0.5, 0.1], "test_error": [0.2, 0.4]},
        {"arm": "b", "step": 10, "seconds_per_step": 1.5, "train_loss": [None, 0.1], "test_error": [0.9, 0.4]},
        {"arm": "a", "step": 20, "seconds_per_step": 2.0, "train_loss": [0.1, 0.05], "test_error": [0.1, 0.3]},
        {"arm": "b", "step": 20, "seconds_per_step": 2.0, "train_loss": [None, 0.1], "test_error": [0.9, 0.2]},
    ]
    a, b = report.summarize(records, target_loss=0.1)
    assert (a.test_error, a.test_error_se) == pytest.approx((0.2, 0.1))
    assert (a.reached, a.steps_to_target, a.steps_to_target_se) == (2, 15, 5)
    assert (a.relative_time, b.relative_time) == (1.0, 1.25)
    assert (b.train_loss, b.reached, b.steps_to_target, b.steps_to_target_se) == (None, 1, 10, None)


def test_a_diverging_arm_is_marked(tmp_path):
    changes = settings("optimizer.learning_rate=1e30")
    result = invoke("train", DIGITS, "--arm", "plain", "--out", tmp_path / "run", *changes)
    assert result.exit_code == 0, result.output
    assert "diverged" in result.output
    assert any(None in record["train_loss"] for record in report.read_metrics(tmp_path / "run" / "metrics.jsonl"))


def test_step_times_have_a_figure_for_each_arm_and_round(monkeypatch, tmp_path):
    monkeypatch.setattr(step_time, "_SECONDS_PER_TURN", 1e-4)
    tiny = {
        "dense": timed_models.Case(
            "dense",
            functools.partial(timed_models.mlp, width=4),
            (2, 4),
            target=1.5,
            equinox=functools.partial(timed_models.equinox_mlp, width=4),
        ),
        "bare": timed_models.Case("bare", lambda _: nn.Dense(3), (2, 4), target=1.5, layers_wrap=False),
    }
    monkeypatch.setattr(step_time, "CASES", tiny)
    result = invoke("step-time", "--rounds", 2, "--json", tmp_path / "times.json")
    assert result.exit_code == 0, result.output
    assert f"jax {jax.__version__}, cpu" in result.output
    dense, bare = json.loads((tmp_path / "times.json").read_text())["cases"]
    for times in (*dense["milliseconds"].values(), *bare["milliseconds"].values()):
        assert len(times) == 2
        assert min(times) > 0
    assert set(dense["milliseconds"]) == {"plain", "auto", "weight", "output", "flax", "plain equinox", "equinox"}
    assert [name for name, ratio in bare["ratios"].items() if ratio is None] == ["flax", "equinox"]
    assert set(bare["milliseconds"]) == {"plain", "auto", "weight", "output"}


def test_step_time_ratios_against_numbers_worked_out_by_hand():
    times = {"plain": [1.0, 2.0, 4.0], "auto": [1.1, 2.4, 4.0], "plain equinox": [2.0] * 3, "equinox": [3.0, 5.0, 8.0]}
    row = step_time.Row("x", 1.2, times)
    assert row.plain() == 2
    assert row.ratio("auto") == pytest.approx(1.1)  # the median of 1.1, 1.2 and 1
    assert row.ratio("equinox") == 2.5
    assert row.ratio("flax") is None


def test_the_timed_models_do_what_they_do_in_equinox():
    apply, params = timed_models.equinox_mlp(lambda layer: layer, width=4)
    kernels = {f"layers_{2 * i}": {"kernel": layer.weight.T, "bias": layer.bias} for i, layer in enumerate(params)}
    x = jax.random.normal(jax.random.key(0), (2, 4))
    expected = timed_models.mlp(lambda layer: layer, width=4).apply({"params": kernels}, x)
    np.testing.assert_allclose(apply(params, x), expected, rtol=1e-5, atol=1e-6)


def test_ctrl_c_leaves_readable_metrics_and_says_where(tmp_path):
    metrics = tmp_path / "run" / "metrics.jsonl"
    command = [sys.executable, "-m", "experiments", "train", str(DIGITS), "--out", str(tmp_path / "run")]
    command += settings("train.steps=400000")
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size > 2000) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"the metrics: {metrics}" in errors
    assert "Traceback" not in errors
    assert len(report.read_metrics(metrics)) > 5


def test_ctrl_c_before_the_first_record_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(interrupt, "_requested", False)
    previous = signal.getsignal(signal.SIGINT)
    try:
        interrupt.install()
        signal.raise_signal(signal.SIGINT)  # raises no KeyboardInterrupt here, where JAX could be compiling
    finally:
        signal.signal(signal.SIGINT, previous)
    result = invoke("train", DIGITS, "--out", tmp_path / "run", *settings())
    assert result.exit_code == 130
    assert "interrupted before the first record; nothing was written" in result.stderr
    assert not (tmp_path / "run").exists()


def test_help_reads():
    for arguments in ([], ["compare"], ["train"], ["step-time"]):
        assert invoke(*arguments, "--help").exit_code == 0


def test_experiments_import_only_public_names():
    for path in (ROOT / "experiments").rglob("*.py"):
        for statement in ast.walk(ast.parse(path.read_text())):
            if isinstance(statement, ast.ImportFrom) and (statement.module or "").split(".")[0] == "wn_jax":
                names = [*statement.module.split("."), *(alias.name for alias in statement.names)]
            elif isinstance(statement, ast.Import):
                names = [
                    part
                    for alias in statement.names
                    if alias.name.startswith("wn_jax")
                    for part in alias.name.split(".")
                ]
            elif (
                isinstance(statement, ast.Attribute)
                and isinstance(statement.value, ast.Name)
                and statement.value.id == "wn"
            ):
                names = [statement.attr]
            else:
                continue
            assert not any(name.startswith("_") and name != "__version__" for name in names), path


@pytest.mark.parametrize("folder", ["wn_jax", "experiments", "tests"])
def test_files_stay_short(folder):
    for path in (ROOT / folder).rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 300, path
