"""Runs that are cut off and go on: to the same metrics, byte for byte, and the same parameters, bit for bit."""

import errno
import os
import random
import resource
import shutil
import subprocess
import sys
import time

import filelock
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments.config import toml_file
from experiments.engine import arm, run
from experiments.errors import ConfigError, RunError
from experiments.run_folder.folder import RunFolder, check
from experiments.run_folder.record import read_records
from tests.experiments.commands import ROOT, fails, invoke

CONFIG = """
name = "resumed"
data = { name = "digits", batch_size = 50 }
model = { name = "mlp", hidden = [16], norm = "mean_only" }
optimizer = { name = "adam", learning_rate = [0.01, 0.003], schedule = "cosine", second_half = { b1 = 0.5 } }
train = { steps = 12, record_every = 2, checkpoint_every = 4, seeds = 2, ema = 0.9 }
mesh = { data = 1 }
[arms.plain]
[arms.weight_norm]
model = { weights = "weight_norm", init = "data" }
"""


pytestmark = pytest.mark.slow  # runs that are cut off at all kinds of places


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A config, and a run of it that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "config.toml").write_text(CONFIG)
    result = invoke("compare", folder / "config.toml", "--out", folder / "run")
    assert result.exit_code == 0, result.output
    return folder / "config.toml", folder / "run"


@pytest.fixture(scope="module")
def cut_off(whole, tmp_path_factory):
    """A run of the same that was left, as if killed, in its fifth round: two records behind the checkpoint at 8."""
    config, out = whole[0], tmp_path_factory.mktemp("cut") / "run"
    experiment = toml_file.load(config)
    folder = RunFolder(out, experiment)
    arms = arm.build(experiment)
    step, _ = run.begin(arms, folder)
    for event in run.execute(experiment, arms, folder, step, lambda _: None):
        if event.step == 10:
            break
    folder.checkpoints.close()
    folder._open.close()
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["4", "8"]
    assert {record["step"] for record in read_records(out / "metrics.jsonl")} == {2, 4, 6, 8, 10}
    return out


@pytest.fixture
def left(cut_off, tmp_path):
    """A copy of that run, to be damaged."""
    return shutil.copytree(cut_off, tmp_path / "run")


def saved(out, step=12):
    with ocp.CheckpointManager((out / "checkpoints").absolute()) as manager:
        return manager.restore(step, args=ocp.args.Composite(state=ocp.args.PyTreeRestore()))["state"]


@pytest.fixture(scope="module")
def arms(whole):
    """Arms whose compiled programs all tests share."""
    return arm.build(toml_file.load(whole[0]))


@pytest.fixture
def goes_on(whole, arms):
    """Resumes a run, and expects what the whole one found; gives the notes to the user."""

    def check(out, *, after):
        experiment = toml_file.load(whole[0])
        with RunFolder(out, experiment, resume=True) as folder:
            step, notes = run.begin(arms, folder)
            assert step == after
            assert len(list(run.execute(experiment, arms, folder, step, lambda _: None))) == 12 - after
        expect_same(whole[1], out)
        return " ".join(notes)

    return check


def expect_same(expected, out):
    assert (out / "metrics.jsonl").read_bytes() == (expected / "metrics.jsonl").read_bytes()
    parameters, own = saved(expected), saved(out)
    assert len(own) == len(parameters) > 30
    for name, array in parameters.items():
        np.testing.assert_array_equal(own[name], array, err_msg=name)
    assert len(read_records(out / "times.jsonl")) == 12


def test_a_run_that_was_cut_off_goes_on(whole, left):
    result = invoke("compare", whole[0], "--out", left, "--resume")
    assert result.exit_code == 0, result.output
    assert "going on after step 8 of 12" in result.output
    expect_same(whole[1], left)


def test_a_run_that_never_began_begins(goes_on, tmp_path):
    goes_on(tmp_path / "new", after=0)


def test_a_finished_run_stays_as_it_is(goes_on, whole, tmp_path):
    out = shutil.copytree(whole[1], tmp_path / "run")
    before = os.stat(out / "checkpoints" / "12").st_mtime_ns
    goes_on(out, after=12)
    assert os.stat(out / "checkpoints" / "12").st_mtime_ns == before


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(folder):
    file = largest(folder)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


DAMAGE = {
    "a flipped byte": flip,
    "a truncated file": lambda folder: os.truncate(largest(folder), 10),
    "a missing file": lambda folder: largest(folder).unlink(),
    "an empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    "other arrays": lambda folder: (
        shutil.rmtree(folder / "about"),
        shutil.copytree(folder / "../4/about", folder / "about"),
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(name, goes_on, left):
    DAMAGE[name](left / "checkpoints" / "8")
    said = goes_on(left, after=4)
    assert "the checkpoint at step 8 was put aside: " in said
    assert (left / "checkpoints" / "damaged-8-0").is_dir()


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "environment.json"}


def test_with_no_checkpoint_to_go_on_from_nothing_is_changed(goes_on, left):
    """Not even begun anew: a newer version of a library may be the cause."""
    for step in ("4", "8"):
        flip(left / "checkpoints" / step)
    before = contents(left)
    with pytest.raises(
        RunError, match=r"none of the checkpoints can be gone on from \(step 8: .*; step 4: .*Nothing was"
    ):
        goes_on(left, after=0)
    assert contents(left) == before


def test_a_line_that_is_no_record_is_told_before_anything_is_changed(goes_on, left):
    lines = (left / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (left / "metrics.jsonl").write_bytes(b"".join([*lines[:3], b"\0\0\0\n", *lines[4:]]))
    before = contents(left)
    with pytest.raises(ConfigError, match=r"metrics.jsonl, line 4: not valid JSON"):
        goes_on(left, after=8)
    assert contents(left) == before


def test_broken_lines_of_times_do_not_matter(goes_on, left):
    with (left / "times.jsonl").open("ab") as file:
        file.write(b"\0\0\n")
    goes_on(left, after=8)


def test_metrics_that_were_lost_are_made_again(goes_on, left):
    lines = (left / "metrics.jsonl").read_text().splitlines(keepends=True)
    (left / "metrics.jsonl").write_text("".join(lines[:14]) + lines[14][:9])
    assert "lacks records" in goes_on(left, after=4)


def test_a_torn_line_and_unfinished_files_do_not_matter(goes_on, left):
    with (left / "metrics.jsonl").open("a") as file:
        file.write('{"arm": "pl')
    (left / "environment.json").write_text('{"comm')
    (left / "checkpoints" / "10.orbax-checkpoint-tmp-17").mkdir()
    (left / ".config.toml.x1y2").write_text("name =")
    goes_on(left, after=8)


def test_another_config_is_refused_with_the_keys(whole, left):
    changes = ["--set", "optimizer.learning_rate=[0.01, 0.004]", "--set", "arms.plain.model.hidden=[8]"]
    error = fails("compare", whole[0], "--out", left, "--resume", *changes)
    assert "arms.plain.model.hidden: [16] there, [8] here" in error
    assert "arms.weight_norm.optimizer.learning_rate: [0.01, 0.003] there, [0.01, 0.004] here" in error
    assert "train.steps" not in error


def test_what_changes_no_number_may_differ(whole, left, tmp_path):
    changes = [f"data.dir={tmp_path}", "train.on_nonfinite=mark", "train.keep_checkpoints=5"]
    check(left, toml_file.load(whole[0], changes), resume=True)


def test_a_run_is_not_written_over(whole, left):
    assert "holds a run already; go on with it by --resume" in fails("compare", whole[0], "--out", left)


def test_one_process_at_a_time(whole, left):
    with filelock.FileLock(left / ".lock"):
        error = fails("compare", whole[0], "--out", left, "--resume")
    assert "another process is working in it" in error


@pytest.mark.parametrize("room", [100, 3000], ids=["for no record", "for no checkpoint"])
def test_a_full_disk(room, goes_on, left):
    """A limit on the size of files stands for it: what is there stays, and the run goes on when there is room."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (left / "metrics.jsonl").stat().st_size + room
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(RunError, match=os.strerror(errno.EFBIG) + ".*go on with --resume"):
            goes_on(left, after=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    goes_on(left, after=8)


def test_killed_at_random_moments_it_ends_as_if_never_killed(tmp_path):
    """Once on its way to the first step, and three times at random records; the clock plays no part in these."""
    (tmp_path / "config.toml").write_text(CONFIG.replace("steps = 12", "steps = 300"))
    command = [sys.executable, "-m", "experiments", "compare", str(tmp_path / "config.toml"), "--resume", "--out"]
    whole, own = tmp_path / "whole", tmp_path / "run"

    def start(out):
        return subprocess.Popen([*command, str(out)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def size():
        file = own / "metrics.jsonl"
        return file.stat().st_size if file.exists() else 0

    assert start(whole).wait(timeout=600) == 0
    moments = random.Random(0)
    process = start(own)
    time.sleep(moments.uniform(2, 6))
    process.kill()
    process.wait()
    for fraction in sorted(moments.uniform(0.05, 0.9) for _ in range(3)):
        process = start(own)
        while process.poll() is None and size() < fraction * (whole / "metrics.jsonl").stat().st_size:
            time.sleep(0.002)
        assert process.poll() is None, "it ended before it could be killed"
        process.kill()
        process.wait()
    assert start(own).wait(timeout=600) == 0
    assert (own / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for name, array in saved(whole, 300).items():
        np.testing.assert_array_equal(saved(own, 300)[name], array, err_msg=name)
