"""The paper's network, made small, in every layout: steps in a loop or not, members together or not, many devices."""

import jax
import numpy as np
import pytest

from experiments import toml_file
from experiments.arm import Arm
from experiments.data import Dataset
from experiments.placement import Placement
from tests.experiments import ROOT

SMALL = [
    "data.train_examples=64", "data.batch_size=16", "data.whiten=false", "model.width=4", "model.init_examples=32",
    "train.steps=50", "train.record_every=5", "train.checkpoint_every=50", "train.evaluate_every=50",
    "optimizer.learning_rate=0.001",
]  # fmt: skip


def images(count, seed):
    random = np.random.default_rng(seed)
    x = random.normal(size=(count, 12, 12, 3)).astype(np.float32)
    return {"x": x, "y": random.integers(0, 10, count).astype(np.int32)}


DATASET = Dataset(images(64, 0), images(20, 1), "test", 10)


def curve(name, *changes, devices=1, records=10):
    """Losses (members, records), and the figures of the evaluation after them."""
    config = toml_file.load(ROOT / "configs" / "cifar10.toml", [*SMALL, *changes]).arms[name]
    arm = Arm(config, Placement(DATASET, devices))
    arm.prepare()
    return np.stack([arm.advance()["train_loss"] for _ in range(records)], axis=1), arm.evaluate()


@pytest.fixture(scope="module")
def plain_curve():
    return curve("weight_norm")


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_eight_devices_give_the_losses_of_one(plain_curve):
    """Over 50 steps, with noise and dropout."""
    losses, figures = curve("weight_norm", devices=8)
    np.testing.assert_allclose(losses, plain_curve[0], rtol=1e-5)
    for name, values in figures.items():
        np.testing.assert_allclose(values, plain_curve[1][name], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [["train.steps_per_call=5"], ["optimizer.learning_rate=[0.001, 0.002]", "train.members_per_call=2"]]
)
def test_steps_in_a_loop_and_members_together_give_the_same_losses(changes, plain_curve):
    """As an accelerator gets them."""
    losses, _ = curve("weight_norm", *changes, records=2)
    np.testing.assert_allclose(losses[:1], plain_curve[0][:, :2], rtol=1e-5)
