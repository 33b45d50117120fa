"""The experiment engine: configs and their errors, batches, one tiny run with everything it writes, and its ends."""

import ast
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import wn_jax as wn
from experiments import cli, config, data, interrupt, report, step

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


def test_arms_of_a_seed_start_from_the_same_kernels_and_see_the_same_batches():
    experiment = config.load(DIGITS, TINY)
    dataset = data.load(experiment.arms["plain"].data)
    arms = {name: step.make_arm(arm, dataset) for name, arm in experiment.arms.items()}
    states = {name: jax.jit(arm.init)(jax.random.key(0)) for name, arm in arms.items()}
    plain = states["plain"].params
    for state in states.values():
        kernels = wn.reconstruct(state.params)
        for layer in ("Dense_0", "Dense_1"):
            np.testing.assert_allclose(
                kernels[layer]["kernel"], plain[layer]["kernel"], rtol=3e-7
            )  # jit to eager: 1 ulp
        np.testing.assert_array_equal(jax.random.key_data(state.key), jax.random.key_data(states["plain"].key))
    a, b = (arms[name].evaluate(states[name])["test_loss"] for name in ("plain", "weight_norm"))
    np.testing.assert_allclose(a, b, rtol=1e-6)  # the same function


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
    for arguments in ([], ["compare"], ["train"]):
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
