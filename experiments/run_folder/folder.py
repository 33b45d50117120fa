"""The folder of a run, which one run at a time works in, and which a killed run can go on in.

It holds `config.toml` (the resolved config; it runs again), `environment.json`, `metrics.jsonl` (what was learned, the
same in each run of a config on a machine), `times.jsonl` (how long it took) and `checkpoints/`; where networks write
text, also `samples.jsonl`, where they make images, `pictures/`, and where curvature was measured, `conditioning.jsonl`.
A line is written whole; what came after the newest checkpoint is cut off when a run goes on, and computed again. Of
several processes of one run, the first writes; checkpoints are written by all.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import filelock
import jax
import numpy as np
import tomli_w

from experiments import environment, files, processes
from experiments.config import differences, toml_file
from experiments.config.experiment import Experiment
from experiments.errors import ConfigError, RunError
from experiments.run_folder import pictures
from experiments.run_folder.checkpoints import CHECKPOINTS, Checkpoints
from experiments.run_folder.record import (
    CONFIG,
    ENVIRONMENT,
    MEASURED,
    METRICS,
    SAMPLES,
    TIMES,
    JsonLine,
    Record,
    Sample,
    Time,
    line,
    read_measured,
    read_records,
)
from experiments.run_folder.tensorboard import FOLDER as TENSORBOARD
from experiments.run_folder.tensorboard import EventFiles
from experiments.run_folder.tensorboard import require as require_tensorboard

_ELSEWHERE = "choose another folder with --out"
_FOLDERS = (CHECKPOINTS, pictures.FOLDER, TENSORBOARD)


class RunFolder:
    """An open run folder: made new, or with `resume` one that holds the same experiment.

    Arguments:
        path: the folder.
        experiment: what runs in it.
        resume: whether to go on with what is there.
        tensorboard: whether to write event files, too.
        data: for each arm the digest of what it trains on, where a run could go on with something else.

    Raises:
        ConfigError: the experiment cannot run there: see `check`. Or tensorboardX is missing, another process works
            there, the data are others, or processes do not agree on all this.
    """

    def __init__(
        self,
        path: Path,
        experiment: Experiment,
        resume: bool = False,
        tensorboard: bool = False,
        data: Mapping[str, str] | None = None,
    ) -> None:
        if tensorboard:
            require_tensorboard()
        self.path = path
        self._data = dict(data or {})
        self._experiment, self._tensorboard = experiment, tensorboard
        self._files: dict[str, FileIO] = {}
        self._events: EventFiles | None = None
        with contextlib.ExitStack() as stack:
            with processes.together():  # before any changes it
                check(path, experiment, resume)
            with processes.together(), _folder_errors(path):
                if processes.first():
                    self._set_up(stack, resume)
            with processes.together():
                _check_is_shared(path)
            everything = json.dumps([experiment.model_dump(mode="json"), resume, tensorboard, self._data])
            processes.check_same(everything, "configs, options or texts")
            self.checkpoints = Checkpoints(path / CHECKPOINTS, experiment.train.keep_checkpoints)
            self._open = stack.pop_all()

    def _set_up(self, stack: contextlib.ExitStack, resume: bool) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        stack.enter_context(_lock(self.path))
        check(self.path, self._experiment, resume)  # again, now that nobody else can change it
        known = environment.of_run(self.path / ENVIRONMENT, self._data)
        if known is None:
            raise ConfigError(
                f"{self.path}: holds a run on another text than data.path, or the standard library of this Python, has "
                f"now; bring that one back, or {_ELSEWHERE}"
            )
        files.write(self.path / ENVIRONMENT, json.dumps(known, indent=2) + "\n")
        files.write(self.path / CONFIG, tomli_w.dumps(toml_file.to_dict(self._experiment)))  # its mesh may be another

    def begin(self, like: Any) -> tuple[int, Any, list[str]]:
        """Go to where a run begins: the newest whole checkpoint, or the start. The records after it are cut off.

        Arguments:
            like: a tree with the structure and the shapes of the states, and where they shall lie.

        Returns:
            The step and the states, or 0 and None; and what to tell the user.

        Raises:
            ConfigError: a line of `metrics.jsonl` is no record.
            RunError: there are checkpoints, and none of them can be gone on from; or a file cannot be written.
        """
        with processes.together():  # before the first process changes them
            records = read_records(self.path / METRICS)
        step, tree, notes = self.checkpoints.restore(like, lambda step: self._missing_records(records, step))
        if processes.first():
            self._go_on(records, step or 0)
        return step or 0, tree, notes

    def _go_on(self, records: list[JsonLine], step: int) -> None:
        """Open the files of records, less what came after `step`."""
        with self._full_disk():
            times = read_records(self.path / TIMES, strict=False)
            samples = read_records(self.path / SAMPLES, strict=False)
            for name, lines in ((METRICS, records), (TIMES, times), (SAMPLES, samples)):
                kept = [found for found in lines if found["step"] <= step]
                if kept or name != SAMPLES:
                    files.write(self.path / name, "".join(map(line, kept)))
                    self._begin(name)
                else:
                    (self.path / name).unlink(missing_ok=True)
            pictures.cut(self.path, step)
        if self._tensorboard:
            events = EventFiles(self.path / TENSORBOARD, step + 1, self._experiment.train.first_seed)
            self._events = self._open.enter_context(contextlib.closing(events))

    def write(self, record: Record) -> None:
        """Append a record of what was learned."""
        learned = record.to_json()
        self._append(METRICS, learned)
        with self._full_disk():
            if self._events:
                self._events.write(learned)

    def write_sample(self, sample: Sample) -> None:
        """Append texts that networks wrote."""
        if SAMPLES not in self._files and processes.first():
            with self._full_disk():
                self._begin(SAMPLES)
        self._append(SAMPLES, sample._asdict())

    def write_pictures(self, arm: str, rate: float, step: int, images: dict[str, np.ndarray]) -> None:
        """Write images that a network made: see `pictures`."""
        if processes.first():
            with self._full_disk():
                pictures.write(self.path, arm, rate, step, images)

    def write_time(self, time: Time) -> None:
        """Append a record of how long it took."""
        self._append(TIMES, time._asdict())

    def measured(self) -> list[JsonLine]:
        """The records of `python -m experiments conditioning` here, whose file is now open to go on with."""
        records = read_measured(self.path / MEASURED)
        with self._full_disk():
            files.write(self.path / MEASURED, "".join(map(line, records)))  # less a line that was cut off
            self._begin(MEASURED)
        return records

    def write_measured(self, records: list[JsonLine]) -> None:
        """Append what was measured at one place, in one piece."""
        self._append(MEASURED, *records)

    def save(self, step: int, tree: Any) -> None:
        """Save the states after `step`, whose records are written, in the background. They must not change."""
        with self._full_disk():
            for file in self._files.values():
                os.fsync(file.fileno())
        self.checkpoints.save(step, tree)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._open, contextlib.nullcontext() if kind is None else contextlib.suppress(RunError):
            if kind is None or jax.process_count() == 1:  # else it would wait for processes that may be gone
                self.checkpoints.close()

    def _begin(self, name: str) -> None:
        """Open a file of records, to go on with."""
        self._files[name] = self._open.enter_context((self.path / name).open("ab", buffering=0))

    def _append(self, name: str, *records: JsonLine) -> None:
        left = "".join(map(line, records)).encode() if processes.first() else b""
        with self._full_disk():
            while left:  # unbuffered, so that nothing is left to be written when the file is closed
                left = left[self._files[name].write(left) or 0 :]

    @contextlib.contextmanager
    def _full_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(f"{self.path}: {error}; make room, and go on with --resume") from None

    def _missing_records(self, records: list[JsonLine], step: int) -> str | None:
        """Why no run can go on from the checkpoint at `step`: metrics that were lost, with the machine's power say."""
        train = self._experiment.train
        for arm, config in self._experiment.arms.items():
            before = [record for record in records if record["arm"] == arm and record["step"] <= step]
            if len(before) != len(config.optimizer.learning_rate) * (step // train.record_every):
                return f"{METRICS} lacks records of {arm} from before it"
        return None


def check(path: Path, experiment: Experiment, resume: bool) -> None:
    """Check that the experiment can run in this folder; nothing is written.

    Raises:
        ConfigError: it holds something else, or a run without `resume`, or one of another config.
    """
    try:
        if os.path.lexists(path) and not path.is_dir():
            raise ConfigError(f"{path}: is {'a file' if path.is_file() else 'no folder'}; {_ELSEWHERE}")
        for folder in (path / name for name in _FOLDERS):
            if os.path.lexists(folder) and not folder.is_dir():
                raise ConfigError(f"{folder}: is no folder, and a run needs one there; move it away, or {_ELSEWHERE}")
        found = {entry.name for entry in path.iterdir()} if path.exists() else set()
        stored = toml_file.load(path / CONFIG) if CONFIG in found else None
    except OSError as error:
        raise ConfigError(f"{path}: the run folder cannot be used: {error}; {_ELSEWHERE}") from None
    if stored is None:
        if {name for name in found if not name.startswith(".")} - {ENVIRONMENT, CHECKPOINTS}:
            raise ConfigError(f"{path}: already exists, is not empty and holds no run; {_ELSEWHERE}")
    elif not resume:
        raise ConfigError(f"{path}: holds a run already; go on with it by --resume, or {_ELSEWHERE}")
    elif differing := differences.between(stored, experiment):
        raise ConfigError(
            f"{path}: holds a run of another config, so it cannot go on with this one; "
            f"{'; '.join(differing)}. Change it back, or {_ELSEWHERE}"
        )


def _check_is_shared(path: Path) -> None:
    """Check that what the first process wrote is here.

    Raises:
        ConfigError: it is not.
    """
    if not (path / CONFIG).exists():
        raise ConfigError(
            f"{path}: is not the folder that process 0 of this run works in; choose an --out on a file system that all "
            "processes share"
        )


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """The folder for this process alone. The system takes the lock back from a process that is killed."""
    try:
        with filelock.FileLock(path / ".lock", timeout=0):
            yield
    except filelock.Timeout:
        raise ConfigError(f"{path}: another process is working in it; wait for it, or {_ELSEWHERE}") from None


@contextlib.contextmanager
def _folder_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path}: the run folder cannot be written: {error}; {_ELSEWHERE}") from None
