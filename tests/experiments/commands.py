"""Shared by tests of the experiments: a tiny experiment on real digits, and the command line."""

import os
from pathlib import Path

import filelock
from typer.testing import CliRunner

from experiments.cli import app as cli
from experiments.config import toml_file

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "configs" / "digits.toml"
TINY = [
    "train.steps=8", "train.record_every=2", "train.evaluate_every=4", "train.seeds=2", "train.target_loss=2.0",
    "mesh.data=1", "model.hidden=[16]",
]  # fmt: skip


def invoke(*args):
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


def run_once(tmp_path_factory, name, *args):
    """The folder that a command writes, and what it prints: run once, also where several processes share the tests."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder, output = shared / name, shared / f"{name}.txt"
    with filelock.FileLock(shared / f"{name}.lock"):
        if not output.exists():
            result = invoke(*args, "--out", folder)
            assert result.exit_code == 0, result.output
            output.write_text(result.output)
    return folder, output.read_text()


def settings(*changes):
    return [word for change in (*TINY, *changes) for word in ("--set", change)]


def arm_config(name, *changes):
    return toml_file.load(DIGITS, [*TINY, *changes]).arms[name]


def fails(*args, code=2):
    """The text of the error; there is one line of it, and no traceback."""
    result = invoke(*args)
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output + result.stderr
    return result.stderr
