"""Shared by tests of the variational autoencoder: images that are made up, and a tiny experiment on them."""

import numpy as np
import pytest

from experiments.config import toml_file
from experiments.data import names as data
from experiments.data.source import Raw, Source
from tests.experiments.commands import ROOT

SMALL = ROOT / "configs" / "vae_mnist_small.toml"
TINY = [
    *("data.name=stripes", "data.batch_size=8", "data.test_examples=10", "model.widths=[]", "model.dense=5"),
    *("model.latents=[3]", "model.importance_samples=3", "train.steps=4", "train.record_every=1", "mesh.data=1"),
    *("train.evaluate_every=2", "train.seeds=2", "train.target_loss=[1000.0,1.0]"),
]
CONVOLUTIONS = ["model.widths=[2,3]", "model.latents=[3,2]"]


def stripes(count, seed):
    """Images 8 x 8 of grey stripes of random direction and place."""
    random = np.random.default_rng(seed)
    angle, place = random.uniform(0, np.pi, (2, count, 1, 1))
    y, x = np.mgrid[:8, :8]
    return (0.5 + 0.5 * np.sin(x * np.cos(angle) + y * np.sin(angle) + 2 * place))[..., None].astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def stripes_are_a_data_set():
    labels = np.zeros(40, np.int32)
    raw = Raw(stripes(40, 0), labels, stripes(20, 1), labels[:20], classes=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.SOURCES, "stripes", Source("stripes", lambda _: raw))
        patch.setattr(data, "NAMES", (*data.NAMES, "stripes"))
        yield


def settings(*changes):
    return [word for change in (*TINY, *changes) for word in ("--set", change)]


def config(name, *changes):
    return toml_file.load(SMALL, [*TINY, *changes]).arms[name]
