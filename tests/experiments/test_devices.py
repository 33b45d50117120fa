"""The paper's network, made small, in every layout: steps in a loop or not, members together or not, on any mesh."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from experiments.config import toml_file
from experiments.data import Dataset
from experiments.devices import mesh
from experiments.devices.placement import Placement
from experiments.engine.arm import Arm
from tests.collectives import collectives
from tests.experiments.commands import ROOT

SMALL = [
    "data.train_examples=64", "data.batch_size=16", "data.whiten=false", "model.width=8", "model.init_examples=32",
    "train.steps=50", "train.record_every=1", "train.checkpoint_every=50", "train.evaluate_every=50",
    "optimizer.learning_rate=0.001", "optimizer.options.eps_root=1e-4",
]  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("quickly_compiled"),
    pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices"),
]


def images(count, seed):
    random = np.random.default_rng(seed)
    x = random.normal(size=(count, 12, 12, 3)).astype(np.float32)
    return {"x": x, "y": random.integers(0, 8, count).astype(np.int32)}


DATASET = Dataset(images(64, 0), images(20, 1), "test", 8)
MESHES = {"fsdp": (1, 8, 1), "mixed": (2, 2, 2)}  # `test_mesh_transformer.py` has each axis alone


def make(name, *changes, shape=(1, 1, 1), fed=None):
    config = toml_file.load(ROOT / "configs" / "cifar10.toml", [*SMALL, *changes]).arms[name]
    return Arm(config, Placement(DATASET, mesh.build(mesh.Shape(*shape)), fed))


def curve(arm, records):
    """Losses (members, records), and the figures of the evaluation after them."""
    arm.prepare()
    return np.stack([arm.advance().figures["train_loss"] for _ in range(records)], axis=1), arm.evaluate()


@functools.cache
def on_one_device():
    return curve(make("weight_norm"), 30)


# By mesh, of the kernels of the first convolution (3, 3, 3, 8), of the others (3, 3, 8, 16) and of the dense layer.
KERNELS = {
    "fsdp": [P(None, None, None, "fsdp"), P(None, None, "fsdp"), P("fsdp")],
    "mixed": [P(None, None, None, "model"), P(None, None, "fsdp", "model"), P("fsdp", "model")],
}
MAGNITUDES = {
    "fsdp": [P(None, None, None, "fsdp"), P(), P()],
    "mixed": [P(None, None, None, "model"), P(None, None, None, "model"), P(None, "model")],
}


@pytest.mark.parametrize("name", MESHES)
def test_weight_norm_on_a_mesh(name):
    """One test, as the parts share what is compiled.

    In Adam, the epsilon of the paper's code is small enough to make a whole step of a gradient that is zero but for
    rounding. Here it is not.
    """
    arm = make("weight_norm", shape=MESHES[name])
    losses, figures = curve(arm, 30)
    same_losses_as_on_one_device(losses, figures)
    each_array_lies_where_its_parameter_does(arm, name)
    plain = make("weight_norm", "arms.weight_norm.model={weights='plain'}", shape=MESHES[name])
    no_more_than_a_number_a_feature_is_sent(plain.programs.advance.as_text(), arm.programs.advance.as_text())


def same_losses_as_on_one_device(losses, figures):
    """With noise, dropout and initialization from data."""
    expected = on_one_device()
    np.testing.assert_allclose(losses, expected[0], rtol=1e-5)
    for key, values in figures.items():
        np.testing.assert_allclose(values, expected[1][key], rtol=1e-4)


def each_array_lies_where_its_parameter_does(arm, name):
    (state,) = arm.states
    adam = state.opt_state[0].inner_state[0]
    for tree in (state.params, adam.mu, adam.nu):
        for layer in [*(f"Conv_{i}" for i in range(9)), "Dense_0"]:
            kind = {"Conv_0": 0, "Dense_0": 2}.get(layer, 1)
            for array, specs in ((tree[layer]["kernel"].v, KERNELS), (tree[layer]["kernel"].g, MAGNITUDES)):
                expected = jax.sharding.NamedSharding(arm.placement.mesh, P(None, *specs[name][kind]))
                assert array.sharding.is_equivalent_to(expected, array.ndim), (layer, array.sharding)
            assert tree[layer]["bias"].sharding.is_fully_replicated
    for abstract, real in zip(jax.tree.leaves(arm.abstract()), jax.tree.leaves(arm.states), strict=True):
        assert abstract.sharding.is_equivalent_to(real.sharding, real.ndim)


def no_more_than_a_number_a_feature_is_sent(plain, weight_norm):
    added = collectives(weight_norm) - collectives(plain)
    assert {kind for kind, _ in added} <= {"all-reduce"}
    assert max((size for _, size in added), default=0) <= 16


def test_a_process_may_feed_batches():
    """As each of several does; with steps in a loop, and the running means of mean-only batch normalization."""
    changes = ["train.steps_per_call=2", "train.record_every=2", "model.norm=mean_only"]
    losses, _ = curve(make("weight_norm", *changes, shape=MESHES["mixed"], fed=True), 2)
    expected, _ = curve(make("weight_norm", *changes), 2)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "changes", [["train.steps_per_call=5"], ["optimizer.learning_rate=[0.001, 0.002]", "train.members_per_call=2"]]
)
def test_steps_in_a_loop_and_members_together_give_the_same_losses(changes):
    """As an accelerator gets them."""
    losses, _ = curve(make("weight_norm", "train.record_every=5", *changes), 2)
    means = on_one_device()[0][:, :10].reshape(1, 2, 5).mean(2)
    np.testing.assert_allclose(losses[:1], means, rtol=1e-5)
