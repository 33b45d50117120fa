"""TensorBoard event files, read back by their format."""

import math
import struct
import sys

import pytest

from experiments.errors import ConfigError
from experiments.run_folder import tensorboard
from tests.experiments.run_folders import record


def events(folder):
    """The events under a folder, by the record format: length, its checksum, data, their checksum."""
    event = pytest.importorskip("tensorboardX.proto.event_pb2").Event
    found = []
    for path in sorted(folder.glob("*tfevents*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def scalars(folder):
    return [(event.step, value.tag, value.simple_value) for event in events(folder) for value in event.summary.value]


def test_tensorboard_reads_what_was_recorded(tmp_path):
    pytest.importorskip("tensorboardX")
    for purge_step, first in ((1, 10), (11, 20)):  # the second goes on from step 10
        written = tensorboard.EventFiles(tmp_path, purge_step, first_seed=5)
        for step in (first, first + 10):
            written.write(record("a", step, [0.5, None], norms={"x": [1.0, step]}, nonfinite_step=[None, step]))
        written.close()
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*")} == {"a-0.1/seed5", "a-0.1/seed6"}
    steps = [(step, tag) for step in (10, 20, 20, 30) for tag in ("train_loss", "norms/x")]
    assert [(step, tag) for step, tag, _ in scalars(tmp_path / "a-0.1/seed5")] == steps
    assert [value for _, tag, value in scalars(tmp_path / "a-0.1/seed6") if tag == "norms/x"] == [10, 20, 20, 30]
    assert all(math.isnan(value) for _, tag, value in scalars(tmp_path / "a-0.1/seed6") if tag == "train_loss")
    starts = [event.step for event in events(tmp_path / "a-0.1/seed5") if event.HasField("session_log")]
    assert starts == [1, 11], "from its step 11 on, TensorBoard drops what the first file holds"


def test_without_tensorboardx_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[tensorboard\]'"):
        tensorboard.EventFiles(tmp_path, purge_step=1)
