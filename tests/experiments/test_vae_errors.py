"""Errors of the variational autoencoder: of input that it cannot take, and of a bound that is not finite."""

import re

import numpy as np
import pytest

from experiments.engine import arm
from experiments.errors import ConfigError
from experiments.report import report
from experiments.run_folder import pictures
from experiments.run_folder.record import read_records
from tests.experiments.commands import fails, invoke
from tests.experiments.run_folders import write_run
from tests.experiments.vaes import SMALL, settings, stripes_are_a_data_set  # noqa: F401
from tests.messages import pattern

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
        "model.name: vae models images, and the examples have the shape (20,); choose data.name = 'mnist' or 'cifar10'",
    ),
    "a target twice": (["train.target_loss=[3.0,3.0]"], "train.target_loss: [3.0, 3.0] names a loss twice"),
    "drawn by nobody": (
        ["data.binarize=dynamic", "model.likelihood=normal"],
        "data.binarize = 'dynamic' leaves it to training to draw binary images, and only a vae with likelihood = 'b",
    ),
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
        r"the loss of arm 'plain' \(learning rate 1e\+30, seed 0\) \((kl|reconstruction|kl and reconstruction)\) was",
        error,
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
    assert arm._at_fault({"loss": steps["loss"]}, 0, 1) == (), "there are no terms"
    assert arm._at_fault(steps, 0, 0) == (), "the update was"
    assert arm._at_fault(steps, 0, 2) == (), "that was in an earlier record"


@pytest.mark.slow
def test_a_seed_that_diverges_is_marked_with_the_term(tmp_path):
    changes = ["optimizer.learning_rate=1e30", "train.ema=0.0", "train.first_seed=5"]
    arguments = ("train", SMALL, "--arm", "plain", *settings(*changes), "--out", tmp_path / "run")
    assert invoke(*arguments).exit_code == 0
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [record["nonfinite_step"] for record in records if "nonfinite_step" in record] == 3 * [[2, 2]]
    (noted,) = [record["at_fault"] for record in records if "at_fault" in record]
    assert noted.keys() == {"5", "6"}
    assert not pictures.last(tmp_path / "run", "plain", 1e30), "they would show nothing"
    assert f"at step 2 seeds 5 ({noted['5']}), 6 ({noted['6']})" in (tmp_path / "run" / "report.html").read_text()


def test_curvature_needs_a_likelihood(tmp_path):
    table = tmp_path / "it.toml"
    table.write_text(SMALL.read_text() + "\n[conditioning]\nsteps = [0]\npath = 'plain'\n")
    error = fails("conditioning", table, *settings(), "--out", tmp_path / "run")
    assert "conditioning.path: the loss of arm 'plain' is no log-likelihood of what its network predicts" in error


def test_a_damaged_picture_is_named(tmp_path):
    path = write_run(tmp_path)
    pictures.write(path, "a", 0.1, 20, {"samples": np.zeros((4, 4, 9, 9, 1), np.uint8)})
    report([path])
    (found,) = pictures.last(path, "a", 0.1)
    assert (found.kind, found.step) == ("samples", 20)
    whole = found.path.read_bytes()
    for damaged in (b"no picture", whole[: len(whole) // 2]):
        found.path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=pattern(f"{found.path}: cannot be read.*remove it")):
            report([path])
