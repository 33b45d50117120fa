"""Shared by tests of the data sets: a config of their own, and folders that nobody else has."""

import dataclasses

import pytest

from experiments.data.load import _prepared, _raw


@dataclasses.dataclass
class Config:
    name: str
    batch_size: int = 2
    dir: str | None = None
    whiten: bool = False
    binarize: str = "none"
    train_examples: int | None = None
    test_examples: int | None = None
    validation: int = 0
    path: str | None = None
    window: int = 256


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """No data of the user's, and nothing kept from another test."""
    monkeypatch.delenv("WN_JAX_DATA", raising=False)
    monkeypatch.setenv("WN_JAX_CACHE", str(tmp_path / "cache"))
    _raw.cache_clear()
    _prepared.cache_clear()
