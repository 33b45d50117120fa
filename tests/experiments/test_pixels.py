"""Distributions of pixels, and images made black and white."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import experiments.data as data
from experiments.data.binarize import binarized
from experiments.data.source import Raw, Source
from experiments.errors import ConfigError
from experiments.tasks.pixels import PIXELS, bernoulli, discretized_logistic, normal
from tests.experiments.data_sets import Config, own_folders  # noqa: F401
from tests.messages import pattern

BYTES = (np.arange(256) - 127.5) / 128


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(("mean", "scale"), [(0.0, 0.1), (0.4, 1e-3), (-0.99, 0.05), (3.0, 0.2), (0.0, 5.0)])
def test_the_discretized_logistic_against_scipy(double, mean, scale):
    found = np.asarray(discretized_logistic(np.full(256, mean), np.log(scale), BYTES))
    np.testing.assert_allclose(np.exp(found).sum(), 1, rtol=1e-12)
    edges = np.concatenate([[-np.inf], BYTES[:-1] + 0.5 / 128, [np.inf]])
    share = np.diff(scipy.stats.logistic(mean, scale).cdf(edges))
    upper = -np.diff(scipy.stats.logistic(mean, scale).sf(edges))  # what is small above the mean is exact here
    share = np.where(edges[:-1] > mean, upper, share)
    known = share > 1e-300
    np.testing.assert_allclose(found[known], np.log(share[known]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("mean", [-50.0, 0.0, 50.0])
def test_the_discretized_logistic_is_finite_with_its_gradient_in_float32(mean, scale):
    def total(mean, log_scale):
        return discretized_logistic(mean, log_scale, jnp.asarray(BYTES, jnp.float32)).sum()

    value, gradients = jax.value_and_grad(total, (0, 1))(jnp.full(256, mean), jnp.float32(np.log(scale)))
    assert np.isfinite(value)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_binary_and_real_pixels_against_scipy(double):
    logits, x = np.array([-800.0, -1.0, 0.0, 2.0, 800.0]), np.array([0.0, 1.0, 0.0, 1.0, 1.0])
    expected = scipy.stats.bernoulli(scipy.special.expit(logits)).logpmf(x)
    np.testing.assert_allclose(bernoulli(logits, 0, x), expected, rtol=1e-12)
    np.testing.assert_allclose(
        normal(logits / 400, np.log(0.3), x), scipy.stats.norm(logits / 400, 0.3).logpdf(x), rtol=1e-12
    )


def test_binarized_images_are_the_same_each_time_and_have_the_grey_ones_as_their_mean():
    grey = np.random.default_rng(0).random((4, 5, 1)).astype(np.float32)
    many = np.broadcast_to(grey, (4000, *grey.shape))
    drawn = binarized(many, "grey", seed=1)
    assert set(np.unique(drawn)) == {0, 1}
    assert (abs(drawn.mean(axis=0) - grey) < 5 * np.sqrt(grey * (1 - grey) / 4000)).all()
    np.testing.assert_array_equal(drawn, binarized(many, "grey", seed=1))
    assert (drawn != binarized(many, "grey", seed=2)).any()
    np.testing.assert_array_equal(binarized(np.full(12, 0.5), "pinned", 0), [0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0])
    ends = np.array([0.0, 1.0], np.float32)
    np.testing.assert_array_equal(binarized(np.tile(ends, 1000), "ends", 0), np.tile(ends, 1000))


@pytest.fixture
def grey(monkeypatch):
    """A data set of grey images."""
    random = np.random.default_rng(0)
    train, test = (random.random((count, 6, 6, 1)).astype(np.float32) for count in (20, 10))
    labels = np.zeros(20, np.int32)
    monkeypatch.setitem(data.SOURCES, "grey", Source("grey", lambda _: Raw(train, labels, test, labels[:10], 10)))
    return train, test


def test_fixed_binarization_is_of_all_examples_and_dynamic_of_the_held_out_ones(grey):
    fixed, dynamic = (data.load(Config("grey", binarize=kind)) for kind in ("fixed", "dynamic"))
    for array in (fixed.train["x"], fixed.held_out["x"], dynamic.held_out["x"]):
        assert set(np.unique(array)) == {0, 1}
    np.testing.assert_array_equal(dynamic.train["x"], grey[0])
    np.testing.assert_array_equal(dynamic.held_out["x"], fixed.held_out["x"])
    assert not fixed.train["x"].flags.writeable


def test_an_image_is_binarized_alike_whatever_is_cut_off(grey):
    whole = data.load(Config("grey", binarize="fixed"))
    cut = data.load(Config("grey", binarize="fixed", train_examples=5, validation=8))
    np.testing.assert_array_equal(cut.train["x"], whole.train["x"][:5])
    np.testing.assert_array_equal(cut.held_out["x"], whole.train["x"][12:])


def test_pixels_that_are_no_grey_values_are_not_binarized():
    with pytest.raises(
        ConfigError, match=pattern("data.binarize: pixels of digits go from -.*to.*choose data.name = ")
    ):
        data.load(Config("digits", binarize="fixed"))
    with pytest.raises(ConfigError, match="nan"):
        binarized(np.array([np.nan]), "bad", 0)


GREY, BLACK = np.full((3, 2, 2, 1), 0.5), np.zeros((3, 2, 2, 1))
BAD_PIXELS = {
    "negative": ("bernoulli", -GREY, BLACK, "pixels go from -0.5 to -0.5, outside 0 to 1; a grey value is the pro"),
    "NaN": ("bernoulli", np.nan * GREY, BLACK, "pixels go from nan to nan, outside 0 to 1"),
    "grey": ("bernoulli", GREY, GREY, "pixels are grey, and bernoulli has 0 and 1: set data.binarize = 'fixed' or"),
    "whitened": (
        "logistic",
        3 * GREY,
        BLACK,
        "pixels go from 1.5 to 1.5, outside -0.996094 to 0.996094.*without data.whit",
    ),
    "no bytes": (
        "logistic",
        GREY,
        GREY,
        "pixels are not bytes, and bytes are written as (byte - 127.5) / 128: choose",
    ),
}


@pytest.mark.parametrize("case", BAD_PIXELS)
def test_pixels_that_a_distribution_does_not_have(case):
    name, train, held_out, message = BAD_PIXELS[case]
    assert re.search(pattern(message), PIXELS[name].problem(train, held_out))


@pytest.mark.parametrize(("name", "pixels"), [("bernoulli", BLACK), ("logistic", BYTES), ("normal", 9 * GREY)])
def test_pixels_that_it_has(name, pixels):
    assert PIXELS[name].problem(pixels.astype(np.float32), pixels.astype(np.float32)) is None
