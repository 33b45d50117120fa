"""A run's records as TensorBoard event files, a folder for each arm, learning rate and seed."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.errors import ConfigError
from experiments.run_folder.record import Record

FOLDER = "tensorboard"
"""The name of their folder in the run folder."""


def require() -> Any:
    """The library.

    Raises:
        ConfigError: tensorboardX is not installed.
    """
    try:
        return importlib.import_module("tensorboardX")
    except ImportError as error:
        raise ConfigError(
            f"TensorBoard event files need tensorboardX, which cannot be imported ({error}); "
            "pip install -e '.[tensorboard]', or leave event files out"
        ) from None


class EventFiles:
    """Event files under `folder`, in `ARM-RATE/seedN`; a file a member is open until `close`.

    Arguments:
        folder: where they go.
        purge_step: the first step that will be written. TensorBoard drops what earlier files hold from that step on,
            so that a run that goes on from a checkpoint shows no step twice.
        first_seed: the N of the first seed.

    Raises:
        ConfigError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path, purge_step: int, first_seed: int = 0) -> None:
        self._library = require()
        self._proto = importlib.import_module("tensorboardX.proto.event_pb2")
        self._summary = importlib.import_module("tensorboardX.proto.summary_pb2").Summary
        self._folder, self._purge_step, self._first_seed = folder, purge_step, first_seed
        # Its RecordWriter and not its SummaryWriter, of which each has two threads and a pipe: a sweep has hundreds.
        self._writers: dict[Path, Any] = {}

    def write(self, line: Mapping[str, Any]) -> None:
        """Append every figure of a line of `metrics.jsonl` that has one number a seed, at the record's step."""
        # Of a line, and not of a record, so that they can be made of any metrics.jsonl, whichever version wrote it.
        record = Record.from_json(line)
        folder = self._folder / f"{record.arm}-{record.learning_rate:g}"
        for seed in range(len(record.figures["train_loss"])):
            values = [
                self._summary.Value(tag=tag, simple_value=_number(numbers[seed])) for tag, numbers in record.by_tag()
            ]
            writer = self._writer(folder / f"seed{self._first_seed + seed}")
            self._append(writer, step=record.step, summary=self._summary(value=values))
            writer.flush()  # TensorBoard may be watching, and a crash must not lose what was recorded

    def close(self) -> None:
        """Close the files."""
        for writer in self._writers.values():
            with contextlib.suppress(OSError):  # each record was flushed, and told where it could not be
                writer.close()
        self._writers.clear()

    def _writer(self, folder: Path) -> Any:
        if folder not in self._writers:
            folder.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{time.time_ns()}"  # TensorBoard reads a folder's files in their names' order
            writer = self._library.RecordWriter(str(folder / name))
            self._append(writer, file_version="brain.Event:2")
            start = self._proto.SessionLog(status=self._proto.SessionLog.START)
            self._append(writer, step=self._purge_step, session_log=start)
            self._writers[folder] = writer
        return self._writers[folder]

    def _append(self, writer: Any, **fields: Any) -> None:
        writer.write(self._proto.Event(wall_time=time.time(), **fields).SerializeToString())


def _number(recorded: float | None) -> float:
    return float("nan") if recorded is None else recorded
