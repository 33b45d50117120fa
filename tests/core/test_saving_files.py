"""`save` and `load` on a file system: what is no regular file, folders of saves that were killed or run, and memory."""

import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wn_jax as wn
from wn_jax.torch import from_state_dict

TREE = {"w": jnp.arange(3.0)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "params.safetensors"


def special(kind, path):
    """Make something that is no regular file."""
    if kind == "socket":
        folder = os.getcwd()
        os.chdir(path.parent)  # as the path of a socket must be short
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
        os.chdir(folder)
    else:
        {"FIFO": os.mkfifo, "folder": os.mkdir}[kind](path)


@pytest.mark.parametrize("linked", [False, True], ids=["itself", "through a link"])
@pytest.mark.parametrize("kind", ["FIFO", "socket", "folder"])
def test_what_is_no_regular_file_is_refused_and_stays(path, kind, linked):
    special(kind, path)
    before = os.lstat(path)
    name = path
    if linked:
        name = path.with_name("link")
        name.symlink_to(path)
    listed = os.listdir(path.parent)
    for use in (lambda: wn.save(name, TREE), lambda: wn.load(name), lambda: from_state_dict(name)):
        with pytest.raises(OSError, match=f"{name.name} is a {kind}"):
            use()  # without the check, reading a FIFO waits for ever
    assert os.lstat(path) == before
    assert os.listdir(path.parent) == listed


def test_a_device_is_refused(path):
    """One of our own, where we may make it; never one of the machine's."""
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes devices")
    before = os.lstat(path)
    for use in (lambda: wn.save(path, TREE), lambda: wn.load(path)):
        with pytest.raises(OSError, match="is a device, or a link to one, and not a regular file"):
            use()
    assert os.lstat(path).st_rdev == before.st_rdev
    assert os.listdir(path.parent) == [path.name]


def test_a_link_to_nothing_yet_and_a_link_to_itself(path):
    path.symlink_to(path.with_name("new"))
    wn.save(path, TREE)
    assert path.is_symlink()
    assert wn.load(path.with_name("new"))["w"].shape == (3,)
    loop = path.with_name("loop")
    loop.symlink_to(loop)
    with pytest.raises(OSError, match="levels of symbolic links"):
        wn.save(loop, TREE)
    assert loop.is_symlink()


STOPS = """
import os, signal, sys
import jax
import jax.numpy as jnp
import numpy as np
import wn_jax as wn

replace = os.replace
def stop_first(*names):
    os.kill(os.getpid(), signal.SIGSTOP)
    replace(*names)

os.replace = stop_first
wn.save(sys.argv[1], {"w": jnp.full(4, 7.0)})
"""


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_the_folder_of_a_process_goes_when_it_was_killed_and_stays_while_it_runs(path, killed):
    writer = subprocess.Popen([sys.executable, "-c", STOPS, str(path)])
    assert os.WIFSTOPPED(os.waitpid(writer.pid, os.WUNTRACED)[1])
    (folder,) = (name for name in os.listdir(path.parent) if name.startswith(f".{path.name}."))
    if killed:
        writer.kill()
        writer.wait()
        wn.save(path.with_name("other"), TREE)  # another's are no business of this one
        assert folder in os.listdir(path.parent)
    wn.save(path, TREE)
    assert (folder in os.listdir(path.parent)) is not killed
    assert wn.load(path)["w"].shape == (3,)
    if not killed:
        writer.send_signal(signal.SIGCONT)
        assert writer.wait(60) == 0
        assert wn.load(path)["w"].shape == (4,)
        assert os.listdir(path.parent) == [path.name]


def test_a_save_in_another_thread_is_left_alone(path, monkeypatch):
    replace, waiting, go_on = os.replace, threading.Event(), threading.Event()

    def slow(*names):
        if threading.current_thread() is not threading.main_thread():
            waiting.set()
            assert go_on.wait(60)
        replace(*names)

    monkeypatch.setattr(os, "replace", slow)
    thread = threading.Thread(target=wn.save, args=(path, {"w": jnp.ones(4)}))
    thread.start()
    assert waiting.wait(60)
    wn.save(path, TREE)
    assert wn.load(path)["w"].shape == (3,)
    go_on.set()
    thread.join()
    assert wn.load(path)["w"].shape == (4,)
    assert os.listdir(path.parent) == [path.name]


def left(path, ending, lock=None, days=0.0):
    """A folder as saves leave it, whose lock names a host, and in which nothing changed for some days."""
    folder = path.with_name(f".{path.name}.{ending}")
    folder.mkdir()
    (folder / "file").write_bytes(b"half")
    if lock is not None:
        (folder / "lock").write_bytes(lock)
    for each in (*folder.iterdir(), folder):
        time = each.stat().st_mtime - 24 * 3600 * days
        os.utime(each, (time, time))
    return folder


@pytest.mark.parametrize(
    ("ending", "lock", "days", "stays"),
    [
        ("w0123abc", b"another host", 0.9, True),  # whose locks may not be seen from here
        ("w0123abc", b"another host", 1.1, False),
        ("w0123abc", b"", 0.9, True),  # the lock was not taken yet, or there are none on this file system
        ("w0123abc", None, 0.9, True),  # nor made
        ("w0123abc", None, 1.1, False),
        ("0123abcd", None, 0, False),  # of versions that held no lock
        ("0123abcdef", None, 9, True),  # somebody else's
        ("notes", None, 9, True),
    ],
)
def test_folders_of_other_hosts_and_versions(path, ending, lock, days, stays):
    folder = left(path, ending, lock, days)
    wn.save(path, TREE)
    assert folder.exists() is stays
    assert wn.load(path)["w"].shape == (3,)
    shutil.rmtree(folder, ignore_errors=True)
    assert os.listdir(path.parent) == [path.name]


def test_a_file_of_such_a_name_and_a_link_to_a_folder_stay(path, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    path.with_name(f".{path.name}.01234567").symlink_to(elsewhere)
    path.with_name(f".{path.name}.89abcdef").write_text("mine")
    wn.save(path, TREE)
    assert elsewhere.is_dir()
    assert len(os.listdir(path.parent)) == 3


PEAK = """
import contextlib, pickle, sys
import jax
import jax
import jax.numpy as jnp
import numpy as np
import wn_jax as wn

def status(key):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

path, size, with_target = sys.argv[1:]
target = pickle.load(open(path + ".target", "rb")) if int(with_target) else None
wn.load(path + ".small")  # what is imported and made once
start = status("VmRSS")
with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins anew
tree = jax.block_until_ready(wn.load(path, target))
print((status("VmHWM") - start) / int(size))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak of memory is read from Linux")
@pytest.mark.parametrize("with_target", [False, True], ids=["without a target", "with a target"])
@pytest.mark.parametrize(("leaves", "most"), [(40, 1.3), (1, 2.1)])
def test_the_memory_that_loading_takes(path, leaves, most, with_target):
    """As a part of the tree's size: all of it, and what was read of one leaf. Mapped files would count once more."""
    rows = 192 * 2**20 // 4 // 1024 // leaves
    tree = {f"layer{i}": wn.WeightNorm(full(1, 1), full(rows, i), (-2,)) for i in range(leaves)}
    wn.save(path, tree)
    wn.save(f"{path}.small", TREE)
    with open(f"{path}.target", "wb") as file:
        pickle.dump(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree), file)
    size = sum(each.nbytes for each in jax.tree.leaves(tree))
    command = [sys.executable, "-c", PEAK, str(path), str(size), str(int(with_target))]
    peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 0.9 < peak < most


def full(rows, value):
    return np.full((rows, 1024), value, np.float32)
