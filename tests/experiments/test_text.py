"""Text as windows of bytes, from files that may be larger than memory, empty, or no files."""

import os

import pytest

from experiments import data
from experiments.data import text
from experiments.errors import ConfigError
from tests.experiments.commands import ROOT, fails
from tests.experiments.data_sets import Config

GPT = ROOT / "configs" / "gpt_tiny.toml"


def test_every_byte_but_the_first_is_predicted_once(tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(256)) * 2)
    train, held_out = text.read(str(tmp_path / "text"), window=10)
    assert train.shape == (46, 11)
    assert held_out.shape == (5, 11)
    whole = bytes(range(256)) * 2
    assert bytes(train[:, 1:].reshape(-1)) == whole[1:461]
    assert bytes(train[:, :-1].reshape(-1)) == whole[:460]
    assert bytes(held_out[:, 1:].reshape(-1)) == whole[462:512]


def test_a_file_is_mapped_and_not_read(tmp_path):
    """Ten gigabytes, all of them a hole."""
    with (tmp_path / "text").open("wb") as file:
        file.truncate(10**10)
    dataset = data.load(Config("text", path=str(tmp_path / "text"), window=1000, test_examples=3))
    assert dataset.mapped
    assert dataset.train["tokens"].shape == (8_999_999, 1001)
    assert dataset.held_out["tokens"].shape == (3, 1001)


def test_the_standard_library_is_the_same_each_time_and_has_its_own_modules():
    found = bytes(text.standard_library())
    assert found == bytes(text.standard_library.__wrapped__())
    for module in (b"class Fraction(", b"def deepcopy(", b"class Thread:"):
        assert module in found
    assert b"class DeprecatedTest(unittest" not in found
    assert not data.load(Config("text", window=128)).mapped


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"short", "has 5 bytes, which is too short to train on"),
        (b"x" * 1000, "shorter than a window of data.window + 1 = 101 bytes; lower data.window to 99 or less"),
    ],
)
def test_a_text_that_is_too_short(tmp_path, content, said):
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"data\.path") as error:
        text.read(str(path), window=100)
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_the_longest_window_that_the_message_allows(tmp_path):
    (tmp_path / "text").write_bytes(b"x" * 1000)
    assert text.read(str(tmp_path / "text"), window=99)[1].shape == (1, 100)


def test_text_is_not_fetched(tmp_path):
    assert "text is not fetched" in fails("fetch", "text", "--to", tmp_path)


@pytest.mark.parametrize("place", [0, 5_000, 19_999])
def test_a_text_is_told_from_one_that_differs_by_a_byte(tmp_path, monkeypatch, place):
    """Where it is hashed as a whole; of a larger one, that is so for many places."""
    path = tmp_path / "text"
    content = bytearray(bytes(text.standard_library()[:20_000]))
    path.write_bytes(content)
    before = text.digest(str(path))
    content[place] ^= 1
    path.write_bytes(content)
    assert text.digest(str(path)) != before
    monkeypatch.setattr(text, "_HASHED_WHOLE", 10_000)
    monkeypatch.setattr(text, "_BLOCK", 300)
    large = text.digest(str(path))
    content[place] ^= 1
    path.write_bytes(content)
    assert text.digest(str(path)) != large


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "no user"])
def test_a_text_that_cannot_be_read(tmp_path, kind):
    os.mkfifo(tmp_path / "pipe")
    path = {"missing": tmp_path / "no", "folder": tmp_path, "pipe": tmp_path / "pipe", "no user": "~nobody-here/x"}[
        kind
    ]
    error = fails("compare", GPT, "--out", tmp_path / "run", "--set", f"data.path={path}")
    assert f"data.path: {path} cannot be read" in error
    assert not (tmp_path / "run").exists()
