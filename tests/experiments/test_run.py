"""A tiny run with everything it writes; seeds and rates in one program; losses that are not finite; Ctrl-C."""

import json
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tomli_w

from experiments import data
from experiments.cli import interrupt
from experiments.config import toml_file
from experiments.engine import arm, training
from experiments.run_folder.record import read_records
from tests.experiments.commands import DIGITS, ROOT, TINY, arm_config, fails, invoke, run_once, settings

ARMS = ("plain", "weight_norm", "weight_norm_mean_only", "mean_only", "batch_norm")


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    return run_once(tmp_path_factory, "tiny", "compare", DIGITS, *settings())


def test_a_run_writes_everything_that_it_took(finished_run):
    out, output = finished_run
    assert {path.name for path in out.iterdir()} == {
        ".lock", "config.toml", "environment.json", "metrics.jsonl", "times.jsonl", "checkpoints",
        "summary.json", "curves.png", "report.html",
    }  # fmt: skip
    environment = json.loads((out / "environment.json").read_text())
    assert environment["packages"]["jax"] == jax.__version__
    assert environment["devices"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["4", "8"]
    for name in ARMS:
        assert name in output


def test_metrics_hold_every_record_of_every_arm_and_seed(finished_run):
    records = read_records(finished_run[0] / "metrics.jsonl")
    expected = sorted((name, step) for name in ARMS for step in (2, 4, 6, 8))
    assert sorted((record["arm"], record["step"]) for record in records) == expected
    for record in records:
        assert len(record["train_loss"]) == 2
        evaluated = {"test_loss", "test_error", "norms", "effective_step"}
        assert evaluated & set(record) == (evaluated if record["step"] % 4 == 0 else set())
        assert all(0 <= error <= 1 for error in record.get("test_error", []))
    times = read_records(finished_run[0] / "times.jsonl")
    assert sorted((record["arm"], record["step"]) for record in times) == expected
    assert all(record["seconds_per_step"] > 0 for record in times)


def test_the_resolved_config_is_the_experiment_again(finished_run):
    assert toml_file.load(finished_run[0] / "config.toml") == toml_file.load(DIGITS, TINY)


@pytest.mark.slow
def test_a_run_of_one_arm_learns_what_it_learns_among_others(finished_run, tmp_path):
    again = tmp_path / "again"
    assert invoke("train", finished_run[0] / "config.toml", "--arm", "weight_norm", "--out", again).exit_code == 0
    before = [r for r in read_records(finished_run[0] / "metrics.jsonl") if r["arm"] == "weight_norm"]
    assert read_records(again / "metrics.jsonl") == before


def losses(config, *, steps=1):
    own = next(iter(arm.build(config).values()))
    own.prepare()
    return np.stack([own.advance().figures["train_loss"] for _ in range(steps)], axis=1)


def one_arm(*changes):
    return toml_file.select(toml_file.load(DIGITS, [*TINY, *changes]), ["weight_norm"])


@pytest.mark.slow
def test_members_are_what_they_are_alone():
    together = losses(one_arm("optimizer.learning_rate=[0.1, 0.02]"), steps=2)
    assert len({float(loss) for loss in together[:, -1]}) == 4
    for member, (rate, seed) in enumerate([(0.1, 0), (0.1, 1), (0.02, 0), (0.02, 1)]):
        changes = [f"optimizer.learning_rate={rate}", "train.seeds=1", f"train.first_seed={seed}"]
        np.testing.assert_allclose(losses(one_arm(*changes), steps=2)[0], together[member], rtol=2e-5)


@pytest.mark.slow
def test_calls_may_be_smaller():
    changes = ["train.steps_per_call=1", "train.members_per_call=1"]
    np.testing.assert_allclose(losses(one_arm(*changes), steps=2), losses(one_arm(), steps=2), rtol=2e-5)


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_eight_devices_give_the_losses_of_one():
    """Over 50 steps, with a batch that is shared out among them, and normalized. Others are in `test_devices.py`."""
    curves = []
    for devices in (1, 8):
        changes = ["data.batch_size=96", "train.record_every=1", "train.steps=50", f"mesh.data={devices}"]
        config = toml_file.load(DIGITS, [*TINY, "train.evaluate_every=50", "optimizer.learning_rate=0.05", *changes])
        curves.append(losses(toml_file.select(config, ["batch_norm"]), steps=50))
    np.testing.assert_allclose(*curves, rtol=1e-5)


def test_as_many_devices_as_divide_the_batch_are_used():
    for size, count in ((96, 8), (100, 5), (97, 1)):
        built = arm.build(toml_file.load(DIGITS, ["data.batch_size=" + str(size)]))
        assert {own.placement.mesh.size for own in built.values()} == {min(count, jax.device_count())}


@pytest.mark.slow
def test_evaluation_is_the_mean_over_all_examples(monkeypatch):
    own = next(iter(arm.build(one_arm("data.test_examples=499")).values()))
    own.prepare()
    whole = own.evaluate()
    monkeypatch.setattr(own.placement, "held_out", lambda: parts(own.placement.dataset, 64))
    small = own.evaluate()
    for name in ("loss", "error"):
        np.testing.assert_allclose(small[name], whole[name], rtol=1e-5)


def parts(dataset, size):
    """The held-out examples in smaller parts than the engine makes."""
    x, y = dataset.held_out["x"], dataset.held_out["y"]
    cut = [
        ({"x": x[i : i + size], "y": y[i : i + size]}, np.ones(len(x[i : i + size]), bool)) for i in range(0, 448, size)
    ]
    rest = np.resize(np.arange(448, len(x)), size)
    return [*cut, ({"x": x[rest], "y": y[rest]}, np.arange(size) < len(x) - 448)]


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


@pytest.mark.slow
def test_arms_of_a_seed_start_from_the_same_directions_and_see_the_same_batches():
    member = training.Member(jnp.int32(3), jnp.float32(0.1))
    started = {}
    for name in ARMS:
        config = arm_config(name)
        dataset = data.load(config.data)
        functions = training.functions(config, dataset)
        started[name] = jax.jit(functions.start)(member, dataset.train).params, functions.order(member, jnp.int32(5))
    plain, order = started["plain"]
    for params, own_order in started.values():
        np.testing.assert_array_equal(own_order, order)
        for layer in ("Dense_0", "Dense_1"):
            kernel = params[layer]["kernel"]
            drawn = plain[layer]["kernel"]
            np.testing.assert_allclose(getattr(kernel, "v", kernel), drawn, rtol=1e-5)  # between programs: 1 ulp


def test_a_loss_that_is_not_finite_stops_the_run_of_one_member(tmp_path):
    changes = settings("optimizer.learning_rate=1e30", "train.seeds=1")
    error = fails("train", DIGITS, "--arm", "plain", "--out", tmp_path / "run", *changes, code=1)
    assert (
        "the loss of arm 'plain' (learning rate 1e+30, seed 0), or its update, was not finite at step 2; no ch" in error
    )
    (record,) = read_records(tmp_path / "run" / "metrics.jsonl")
    assert (record["train_loss"], record["nonfinite_step"]) == ([None], [2])


def test_the_last_good_checkpoint_is_named(tmp_path):
    """Momentum explodes in the second half of the eight steps: after the checkpoint at the fourth."""
    changes = ["optimizer.second_half.momentum=1e30", "train.seeds=1", "train.checkpoint_every=2"]
    error = fails("train", DIGITS, "--arm", "plain", "--out", tmp_path / "run", *settings(*changes), code=1)
    assert f"the last good checkpoint: {tmp_path / 'run' / 'checkpoints' / '4'}. Begin anew" in error
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["2", "4"]


@pytest.mark.slow
def test_in_a_sweep_it_marks_the_member_and_goes_on(tmp_path):
    two = toml_file.select(toml_file.load(DIGITS, TINY), ["plain", "weight_norm"])
    (tmp_path / "two.toml").write_text(tomli_w.dumps(toml_file.to_dict(two)))
    rates = ["--learning-rates", "1e30,0.05"]
    result = invoke("sweep", tmp_path / "two.toml", "--out", tmp_path / "run", *rates)
    assert result.exit_code == 0, result.output
    last = {(r["arm"], r["learning_rate"]): r for r in read_records(tmp_path / "run" / "metrics.jsonl")}
    assert len(last) == 4
    for (name, rate), record in last.items():
        if rate == 0.05:
            assert "nonfinite_step" not in record
            assert None not in record["train_loss"]
        elif name == "plain":
            assert record["train_loss"] == [None, None]
            assert all(step <= 2 for step in record["nonfinite_step"])
    assert "diverged" in result.output


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(tmp_path):
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
    assert f"interrupted; to go on: --out {tmp_path / 'run'} --resume" in errors
    assert "Traceback" not in errors
    assert len(read_records(metrics)) > 5


def test_ctrl_c_is_taken_where_it_is_safe(tmp_path, monkeypatch):
    monkeypatch.setattr(interrupt, "_requested", False)
    previous = signal.getsignal(signal.SIGINT)
    try:
        interrupt.install()
        signal.raise_signal(signal.SIGINT)  # raises no KeyboardInterrupt here, where JAX could be compiling
    finally:
        signal.signal(signal.SIGINT, previous)
    assert invoke("train", DIGITS, "--out", tmp_path / "run", *settings()).exit_code == 130
