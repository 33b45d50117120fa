"""Data sets cut to the examples that are asked for, shared by those who ask for the same."""

import numpy as np
import pytest

import experiments.data as data
from experiments.data import whitening
from experiments.errors import ConfigError
from tests.experiments.data_sets import Config, own_folders  # noqa: F401


def test_digits_are_split_evenly_and_scaled():
    dataset = data.load(Config("digits"))
    assert dataset.train["x"].shape == (1297, 64)
    assert dataset.held_out["x"].shape == (500, 64)
    np.testing.assert_allclose(dataset.train["x"].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(dataset.train["x"].std(), 1, rtol=1e-5)
    assert (np.bincount(dataset.held_out["y"]) >= 48).all()
    assert (dataset.train["x"].dtype, dataset.train["y"].dtype) == (np.float32, np.int32)


def test_validation_examples_are_the_last_whatever_the_first_are():
    whole = data.load(Config("digits"))
    for train, validation in ((None, 0), (None, 297), (100, 297), (1000, 297), (100, 0)):
        cut = data.load(Config("digits", train_examples=train, validation=validation, test_examples=50))
        assert cut.held_out_name == ("validation" if validation else "test")
        for key in ("x", "y"):
            np.testing.assert_array_equal(cut.train[key], whole.train[key][: train or 1297 - validation])
            held_out = whole.train[key][1000:] if validation else whole.held_out[key][:50]
            np.testing.assert_array_equal(cut.held_out[key], held_out)


# What the config asks for that the 1,297 training and 500 test examples of the digits are not enough for.
TOO_MANY = {
    "batch": ({"batch_size": 5000}, "data.batch_size: 5000 is more than the 1297 training examples of digits; set it"),
    "batch of few": (
        {"batch_size": 200, "train_examples": 100, "validation": 10},
        "data.batch_size: 200 is more than the 100 training examples of digits "
        "(data.train_examples = 100, data.validation = 10); set it to 100 or less",
    ),
    "training": ({"train_examples": 1298}, "data.train_examples: 1298 is more than the 1297 training examples of digi"),
    "training and validation": (
        {"train_examples": 1001, "validation": 297},
        "1001 is more than the 1000 training examples of digits that data.validation = 297 leaves; set it to 1000 or",
    ),
    "validation": (
        {"validation": 1297},
        "data.validation: 1297 leaves none of the 1297 training examples of digits to train on; set it to 1296 or less",
    ),
    "test": (
        {"test_examples": 501},
        "data.test_examples: 501 is more than the 500 test examples of digits; set it to 5",
    ),
}


@pytest.mark.parametrize("case", TOO_MANY)
def test_more_examples_than_there_are(case):
    options, message = TOO_MANY[case]
    with pytest.raises(ConfigError) as error:
        data.load(Config("digits", **options))
    assert message in str(error.value)


def test_arms_share_arrays_that_none_can_write():
    first, second = (data.load(Config("digits", batch_size=size, whiten=True)) for size in (10, 20))
    for one, other in zip(
        (*first.train.values(), *first.held_out.values()),
        (*second.train.values(), *second.held_out.values()),
        strict=True,
    ):
        assert one is other
        with pytest.raises(ValueError, match="read-only"):
            one[:] = 0
    few = data.load(Config("digits", train_examples=100))
    assert np.shares_memory(few.train["x"], data.load(Config("digits")).train["x"])
    assert few.train["x"] is not data.load(Config("digits", train_examples=101)).train["x"]


def test_whitening_is_fitted_on_all_that_is_not_held_out():
    options = {"train_examples": 400, "validation": 200}
    raw, white = (data.load(Config("digits", whiten=whiten, **options)) for whiten in (False, True))
    fitted = whitening.fit(data.load(Config("digits", validation=200)).train["x"])
    for part, expected in ((white.train["x"], raw.train["x"]), (white.held_out["x"], raw.held_out["x"])):
        np.testing.assert_allclose(part, (expected - fitted.mean) @ fitted.matrix, rtol=0, atol=2e-4)
        assert part.dtype == np.float32
    np.testing.assert_array_equal(white.train["y"], raw.train["y"])
