"""Configs that cannot run: one message with file, key, what is allowed and was meant; exit code 2; no run folder."""

import tomllib
from pathlib import Path

import pytest
import tomli_w
from typer.testing import CliRunner

from experiments import cli, config

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "configs" / "digits.toml"


def fails(*args):
    result = CliRunner().invoke(cli.app, [str(arg) for arg in args])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output + result.stderr
    return result.stderr


# What is written over the digits config, and what the error says.
BAD = {
    "unknown key": (
        "[optimizer]\nlearning_rat = 0.1",
        "optimizer.learning_rat: unknown key (did you mean 'learning_rate'?); allowed: name, learning_rate, momentum",
    ),
    "unknown table": ("[optimiser]\nx = 1", "optimiser: unknown key (did you mean 'optimizer'?)"),
    "wrong type": ("[train]\nseeds = 'five'", "train.seeds: Input should be a valid integer; got 'five'"),
    "a value for a table": ("train = 5", "train: must be a table; got 5"),
    "out of range": ("[optimizer]\nmomentum = 1.5", "optimizer.momentum: Input should be less than 1; got 1.5"),
    "no such choice": (
        "[optimizer]\nname = 'adm'",
        "optimizer.name: 'adm' is not allowed (did you mean 'adam'?); allowed: sgd, adam",
    ),
    "unknown key of an arm": (
        "[arms.wn]\nmodel.weigth_norm = true",
        "arms.wn.model.weigth_norm: unknown key (did you mean 'weight_norm'?)",
    ),
    "no such choice in an arm": (
        "[arms.wn]\nmodel.norm = 'bach'",
        "arms.wn.model.norm: 'bach' is not allowed (did you mean 'batch'?)",
    ),
    "an arm that is no table": ("[arms]\nwn = 3", "arms must be tables"),
    "an arm of another length": ("[arms.wn]\ntrain.steps = 24", "arms are compared at the same steps"),
    "uneven records": ("[train]\nsteps_per_record = 7", "steps (600) must be a multiple of steps_per_record (7)"),
    "a batch too large": ("[data]\nbatch_size = 5000", "5000 is more than the 1297 training examples"),
    "magnitudes from data without any": (
        "[model]\ninit = 'data'",
        "model: init = 'data' sets the magnitudes of weight-normalized layers, and weight_norm is false; set weight",
    ),
    "magnitudes from data in an arm": (
        "[arms.wn]\nmodel.init = 'data'",
        "arms.wn.model: init = 'data' sets the magnitudes of weight-normalized layers, and weight_norm is false",
    ),
    "magnitudes from one example": (
        "[data]\nbatch_size = 1\n[model]\ninit = 'data'\nweight_norm = true",
        "data.batch_size = 1 has no standard deviation for model.init = 'data'; set data.batch_size to 2 or more",
    ),
    "no name": ("name = ''", "name: String should match pattern"),
    "a name in an arm": ("[arms.wn]\nname = 'x'", "arms.wn.name: unknown key; allowed: data, model, optimizer, train"),
    "an arm's name": ('[arms."[x]"]', "String should match pattern"),
    "a rate of infinity": ("[optimizer]\nlearning_rate = inf", "optimizer.learning_rate: Input should be a finite"),
    "a rate of NaN": ("[optimizer]\nlearning_rate = nan", "optimizer.learning_rate: Input should be"),
    "a seed too large": ("[train]\nfirst_seed = 9999999999", "train.first_seed: Input should be less than 2147483648"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_config(name, tmp_path):
    text, message = BAD[name]
    raw = tomllib.loads(DIGITS.read_text())
    del raw["arms"]
    for key, value in tomllib.loads(text).items():
        raw[key] = {**raw.get(key, {}), **value} if isinstance(value, dict) else value
    file = tmp_path / "bad.toml"
    file.write_text(tomli_w.dumps(raw))
    errors = fails("compare", file, "--out", tmp_path / "run")
    assert message in errors
    assert str(file) in errors
    assert not (tmp_path / "run").exists()


ARGUMENTS = {
    "misspelt file": (["configs/digit.toml"], "configs/digit.toml: no such config file (did you mean 'digits.toml'?)"),
    "no such folder": (["nowhere/x.toml"], "nowhere/x.toml: no such config file"),
    "a folder": (["configs"], "configs: cannot be read"),
    "unknown arm": (
        [DIGITS, "--arm", "weight-norm"],
        "digits.toml: unknown arm 'weight-norm' (did you mean 'weight_norm'?); arms: ",
    ),
    "unknown key": ([DIGITS, "--set", "optimizer.lr=0.1"], "optimizer.lr: unknown key; allowed: name, learning_rate"),
    "unknown arm set": (
        [DIGITS, "--set", "arms.plian.model.norm=batch"],
        "unknown arm 'plian' (did you mean 'plain'?)",
    ),
    "empty arm": ([DIGITS, "--arm", ""], "unknown arm ''; arms: "),
    "no value": ([DIGITS, "--set", "optimizer"], "--set optimizer: expected a.b=value"),
    "no table": ([DIGITS, "--set", "name.x=1"], "--set name.x=1: 'name' is a value, not a table"),
    "a long name": ([DIGITS, "--out", "x" * 300], "the run folder cannot be written"),
    "bare text": ([DIGITS, "--set", "optimizer.name=adma"], "'adma' is not allowed (did you mean 'adam'?)"),
}


def test_an_unknown_model_to_time():
    message = "unknown case 'mlp8' (did you mean 'mlp-8'?); cases: mlp-8, mlp-128, "
    assert message in fails("step-time", "--only", "mlp8")
    assert "times.json: cannot be written" in fails("step-time", "--only", "mlp-8", "--json", "nowhere/times.json")


@pytest.mark.parametrize("name", ARGUMENTS)
def test_bad_arguments(name, tmp_path, monkeypatch):
    arguments, message = ARGUMENTS[name]
    monkeypatch.chdir(ROOT)
    out = [] if "--out" in arguments else ["--out", tmp_path / "run"]
    assert message in fails("train", *arguments, *out)
    assert not (tmp_path / "run").exists()


def test_broken_toml_names_the_line(tmp_path):
    (tmp_path / "broken.toml").write_text("[data\nname = 1")
    errors = fails("compare", tmp_path / "broken.toml")
    assert "broken.toml: not valid TOML: " in errors
    assert "line 1" in errors


def test_a_folder_with_another_run_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert "already exists and is not an empty folder" in fails("compare", DIGITS, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert "cannot be written" in fails("compare", DIGITS, "--out", tmp_path / "notes.txt" / "run")


def test_settings_reach_base_and_arms():
    experiment = config.load(DIGITS, ["optimizer.learning_rate=0.5", "arms.plain.optimizer.learning_rate=0.25"])
    rates = {name: arm.optimizer.learning_rate for name, arm in experiment.arms.items()}
    assert rates.pop("plain") == 0.25
    assert set(rates.values()) == {0.5}


def test_a_config_without_a_name_says_so(tmp_path):
    (tmp_path / "unnamed.toml").write_text(DIGITS.read_text().replace('name = "digits"', "", 1))
    assert "unnamed.toml: name: missing" in fails("compare", tmp_path / "unnamed.toml")


def test_quoted_keys_are_toml_keys():
    experiment = config.load(DIGITS, ['arms."plain".model.norm=batch'])
    assert experiment.arms["plain"].model.norm == "batch"


def test_a_config_without_arms_is_one_arm(tmp_path):
    raw = tomllib.loads(DIGITS.read_text())
    del raw["arms"]
    (tmp_path / "base.toml").write_text(tomli_w.dumps(raw))
    assert list(config.load(tmp_path / "base.toml").arms) == ["base"]


def test_the_resolved_config_loads_as_the_same_experiment(tmp_path):
    experiment = config.load(DIGITS)
    (tmp_path / "resolved.toml").write_text(tomli_w.dumps(config.to_dict(experiment)))
    assert config.load(tmp_path / "resolved.toml") == experiment
