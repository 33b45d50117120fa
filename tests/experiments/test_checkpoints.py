"""Checkpoints by themselves: what unfinished ones, failed saves and renamed folders do to the next run."""

import errno
import json
import os
import shutil
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.errors import RunError
from experiments.run_folder import checkpoints
from experiments.run_folder.checkpoints import Checkpoints
from tests.experiments.commands import DIGITS, ROOT, settings

LIKE = {"w": jnp.zeros(3)}


def tree(step):
    return {"w": jnp.full(3, float(step))}


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_PAUSES", (0.0, 0.0, 0.0))
    return tmp_path / "checkpoints"


@pytest.fixture
def unfinished(path):
    """The folder that a killed save at step 12 left, with another in it that tests make hard to remove."""
    folder = path / "12.orbax-checkpoint-tmp" / "held"
    folder.mkdir(parents=True)
    (folder / "data").write_bytes(b"half")
    return folder.parent


def saved(path, *steps, keep=5):
    """Save at these steps, as one run does."""
    found = Checkpoints(path, keep)
    for step in steps:
        found.save(step, tree(step))
    found.close()
    return path


def expect(path, step):
    """Expects to go on from this step, with what was saved at it; gives the notes."""
    found = Checkpoints(path, 5)
    at, arrays, notes = found.restore(LIKE, lambda _: None)
    found.close()
    assert at == step
    np.testing.assert_array_equal(arrays["w"], np.full(3, float(step), np.float32))
    return " ".join(notes)


def fails_to_remove_held(monkeypatch, times):
    """As where a thread of a failed run still writes there, or another host has a file in it open."""
    rmdir, left = os.rmdir, [times]

    def fails(name, **options):
        if os.path.basename(name) == "held" and left[0]:
            left[0] -= 1
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), name)
        return rmdir(name, **options)

    monkeypatch.setattr(os, "rmdir", fails)


def test_what_was_never_finished_is_removed(path, unfinished):
    saved(path, 4)
    assert os.listdir(path) == ["4"]


@pytest.mark.parametrize("times", [2, 1000], ids=["at first", "at all"])
def test_a_leftover_that_cannot_be_removed_ends_no_run(path, unfinished, monkeypatch, times):
    with monkeypatch.context() as patched:
        fails_to_remove_held(patched, times)
        saved(path, 4, 12)
        assert sorted(name for name in os.listdir(path) if not name.startswith(".left-")) == ["12", "4"]
        assert len(os.listdir(path)) == (2 if times == 2 else 3)
    assert expect(path, 12) == ""
    assert sorted(os.listdir(path)) == ["12", "4"]  # the next run could remove it


def test_a_writer_that_goes_on_after_the_first_try(path, unfinished, monkeypatch):
    """It makes the folder anew by its path, as TensorStore does."""
    rmtree, again = shutil.rmtree, [unfinished / "held" / "more"] * 2

    def then_written(folder, *args, **options):
        rmtree(folder, *args, **options)
        if again:
            again.pop().mkdir(parents=True)

    monkeypatch.setattr(shutil, "rmtree", then_written)
    saved(path, 12)
    assert os.listdir(path) == ["12"]


def test_a_save_that_failed_leaves_the_manager_closed(path, monkeypatch):
    closed = []
    found = Checkpoints(path, 5)
    close = found._manager.close
    monkeypatch.setattr(found._manager, "close", lambda: (closed.append(1), close()))

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(found._manager, "wait_until_finished", full)
    with pytest.raises(RunError, match="No space left on device; make room"):
        found.close()
    assert closed


def test_threads_of_a_save_that_failed_print_no_tracebacks(path, monkeypatch):
    """Each array that was on its way would, as it reports to an event loop that is closed; other errors are told."""
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    checkpoints._hush.cache_clear()
    Checkpoints(path, 5).close()
    late, other = (types.SimpleNamespace(exc_value=RuntimeError(text)) for text in ("Event loop is closed", "other"))
    for each in (late, other):
        sys.unraisablehook(each)
    assert told == [other]
    checkpoints._hush.cache_clear()


@pytest.mark.slow
def test_a_disk_without_room_for_a_checkpoint_is_one_message(tmp_path):
    """A limit on the size of files stands for it; in a process of its own, as most is printed when it ends."""
    words = [sys.executable, "-m", "experiments", "train", str(DIGITS), "--out", str(tmp_path / "run"), *settings()]
    script = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)); "
    script += f"sys.argv = {words[2:]!r}; runpy.run_module('experiments', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert "go on with --resume" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_folder_under_another_step_s_name_is_put_aside(path):
    (saved(path, 4, 8) / "8").rename(path / "12")
    said = expect(path, 4)
    assert "the checkpoint at step 12 was put aside: its folder was renamed: it was saved at step 8" in said
    assert (path / "damaged-12-0").is_dir()


def test_with_nothing_but_a_renamed_folder_nothing_is_changed(path):
    (saved(path, 8) / "8").rename(path / "4")
    found = Checkpoints(path, 5)
    with pytest.raises(RunError, match=r"step 4: its folder was renamed: it was saved at step 8.*Nothing was changed"):
        found.restore(LIKE, lambda _: None)
    found.close()
    assert os.listdir(path) == ["4"]


def test_a_checkpoint_that_does_not_say_its_step_is_gone_on_from(path):
    """As those before steps were noted."""
    about = saved(path, 4) / "4" / "about"
    (content,) = (file for file in about.iterdir() if "checksums" in file.read_text())
    known = json.loads(content.read_text())
    assert known.pop("step") == 4
    content.write_text(json.dumps(known))
    assert expect(path, 4) == ""
