"""Command lines that cannot run: one message, exit code 2, and nothing is written."""

import io
import sys

import pytest
import tomli_w

from experiments.cli import app
from experiments.config import toml_file
from tests.experiments.commands import DIGITS, ROOT, fails
from tests.experiments.test_config import write

ARGUMENTS = {
    "misspelt file": (
        ["configs/digit.toml"],
        "configs/digit.toml: no such config file (did you mean 'digits.toml'?); found there: cifar10.toml, ",
    ),
    "no such folder": (["nowhere/x.toml"], "nowhere/x.toml: no such config file"),
    "a folder": (["configs"], "configs: cannot be read"),
    "unknown arm": (
        [DIGITS, "--arm", "weight-norm"],
        "digits.toml: unknown arm 'weight-norm' (did you mean 'weight_norm'?); arms: plain, weight_norm, ",
    ),
    "empty arm": ([DIGITS, "--arm", ""], "unknown arm ''; arms: "),
    "unknown key": ([DIGITS, "--set", "optimizer.lr=0.1"], "optimizer.lr: unknown key; allowed: name, learning_rate"),
    "unknown arm set": (
        [DIGITS, "--set", "arms.plian.model.norm=batch"],
        "digits.toml: unknown arm 'plian' (did you mean 'plain'?)",
    ),
    "no value": ([DIGITS, "--set", "optimizer"], "--set optimizer: expected a.b=value"),
    "no key": ([DIGITS, "--set", "=3"], "--set =3: expected a.b=value"),
    "a table's head": ([DIGITS, "--set", "[data]=3"], "--set [data]=3: expected a.b=value"),
    "no table": ([DIGITS, "--set", "name.x=1"], "--set name.x=1: 'name' is a value, not a table"),
    "bare text": ([DIGITS, "--set", "model.norm=bach"], "'bach' is not allowed (did you mean 'batch'?)"),
    "a list without its end": ([DIGITS, "--set", "train.seeds=[1"], "train.seeds: Input should be a valid integer; "),
    "a long name": ([DIGITS, "--out", "x" * 300], "the run folder cannot be used"),
    "no folder to resume": ([DIGITS, "--resume"], "--resume needs the run folder: --out FOLDER"),
}


def test_a_sweep_sweeps_arms_that_have_a_rate_of_their_own(tmp_path):
    raw = toml_file.to_dict(toml_file.load(DIGITS, ["arms.plain.optimizer.learning_rate=0.5"]))
    (tmp_path / "own.toml").write_text(tomli_w.dumps(raw))
    message = "arm 'plain': data.batch_size: 5000 is more than"  # refused only after the rates are resolved
    assert message in fails(
        "sweep", tmp_path / "own.toml", "--learning-rates", "0.1,0.2", "--set", "data.batch_size=5000"
    )
    assert "needs several learning rates in each arm" in fails("sweep", tmp_path / "own.toml")
    error = fails("sweep", tmp_path / "own.toml", "--set", "arms.weight_norm.optimizer.learning_rate=[0.1, 0.2]")
    assert "needs several learning rates in each arm" in error


@pytest.mark.parametrize("name", ARGUMENTS)
def test_bad_arguments(name, tmp_path, monkeypatch):
    arguments, message = ARGUMENTS[name]
    monkeypatch.chdir(ROOT)
    out = [] if {"--out", "--resume"} & set(arguments) else ["--out", tmp_path / "run"]
    assert message in fails("train", *arguments, *out)
    assert not (tmp_path / "run").exists()


def test_an_arm_set_where_arms_are_no_table(tmp_path):
    file = write(tmp_path / "bad.toml", "arms = 3")
    assert "bad.toml: " in fails("compare", file, "--set", "arms.plain.model.norm=batch")


SWEEPS = {
    "one rate": (
        [],
        "digits.toml: a sweep needs several learning rates in each arm; give --learning-rates 0.001,0.01 or a list in",
    ),
    "one rate given": (["--learning-rates", "0.5"], "a sweep needs several learning rates"),
    "no rates given": (["--learning-rates", ""], "optimizer.learning_rate: is an empty list; give one number, or sev"),
    "a rate given twice": (["--learning-rates", "0.5,0.1,0.5"], "learning_rate: [0.5, 0.1, 0.5] names a rate twice"),
    "a rate that is text": (["--learning-rates", "0.5,x"], "Input should be a valid number; got '[0.5,x]'"),
    "a negative rate": (["--learning-rates", "0.5,-1"], "optimizer.learning_rate.1: Input should be greater than 0"),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_without_rates(name, tmp_path):
    arguments, message = SWEEPS[name]
    assert message in fails("sweep", DIGITS, *arguments, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unknown_row_to_measure(tmp_path):
    message = "no row is named 'mlp-1024x8' (did you mean 'mlp-1024 x8'?); rows: mlp-1024 x1, mlp-1024 x8, "
    assert message in fails("bench", "--rows", "mlp-1024x8", "--out", tmp_path / "bench")
    assert not (tmp_path / "bench").exists()
    (tmp_path / "file").touch()
    unknown = fails("bench", "--libraries", "torhc", "--out", tmp_path / "bench")
    assert "unknown library 'torhc' (did you mean 'torch'?); libraries: wn_jax, linen, nnx," in unknown
    unwritable = ["bench", "--rows", "gpt*", "--out", tmp_path / "file"]
    assert "file: cannot be written: " in fails(*unwritable)


def test_the_overhead_is_that_of_one_seed():
    message = "the overhead is measured for one seed and one learning rate, and plain has 10 of them; set train.seeds=1"
    assert message in fails("overhead", DIGITS)
    assert "unknown arm 'plian' (did you mean 'plain'?)" in fails("overhead", DIGITS, "--arm", "plian")


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    assert "already exists, is not empty and holds no run; choose another" in fails(
        "compare", DIGITS, "--out", tmp_path
    )
    assert f"{notes}: is a file; choose another folder with --out" in fails("compare", DIGITS, "--out", notes)
    few = ["--arm", "plain", "--set", "train.seeds=1", "--set", "model.hidden=[4]"]
    assert "cannot be written" in fails("train", DIGITS, "--out", notes / "run", *few)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_with_a_run_is_gone_on_with_only_by_resume_and_with_its_config(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text(tomli_w.dumps(toml_file.to_dict(toml_file.load(DIGITS))))
    before = (run / "config.toml").read_bytes()
    assert f"{run}: holds a run already; go on with it by --resume, or choose" in fails("compare", DIGITS, "--out", run)
    errors = fails("compare", DIGITS, "--out", run, "--resume", "--set", "model.hidden=[4]", "--set", "train.steps=24")
    assert f"{run}: holds a run of another config" in errors
    assert "arms.plain.model.hidden: [128, 128, 128, 128] there, [4] here; " in errors
    assert "arms.plain.train.steps: 600 there, 24 here" in errors
    assert (run / "config.toml").read_bytes() == before
    assert [path.name for path in run.iterdir()] == ["config.toml"]


def test_letters_that_the_terminal_lacks_are_replaced(monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
    monkeypatch.setattr(app, "app", lambda prog_name: print("2.1 \N{PLUS-MINUS SIGN} 0.1 \udcff", flush=True))
    app.main()
    assert shown.getvalue() == b"2.1 ? 0.1 ?\n"
