"""Files on disk: there whole or not at all, in the place of regular files only.

A file is written in a folder beside it, its workshop, and moved when it is complete. A killed process leaves its
workshop; the next one that writes the same file removes it, and leaves alone the workshops of those still at work. The
system takes a lock back from a process that is killed, so a lock tells the two apart.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import secrets
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # on Windows, where no folder is removed while a file in it is open
    fcntl = None

_LOCK, _FILE = "lock", "file"  # in a workshop
_OLD = 24 * 3600  # seconds after which what nobody is seen to work on is taken for left
_KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def check_regular(path: Path) -> None:
    """Check that a path leads to a regular file, or to nothing. What reads a FIFO waits, and what replaces it harms.

    Raises:
        OSError: it leads to something else, which stays as it is.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path} is a folder; name a file in it")
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(f"{path} is {kind}, or a link to one, and not a regular file; name a file")


@contextlib.contextmanager
def put_in_place(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` when it is complete.

    It gets the mode of the file that it replaces, or that of any new file.

    Raises:
        OSError: there is no such folder, or no regular file is at `path`; nothing was changed. Or it cannot be written.
    """
    given, path = path, Path(os.path.realpath(path))  # a link stays a link
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}; make it first")
    check_regular(given)
    # A folder of our own, as those who write may make further files; beside the file, as renaming is atomic there.
    workshop = path.with_name(f".{path.name}.w{secrets.token_hex(4)[1:]}")
    try:
        workshop.mkdir()
        with _locked(workshop):  # at once: of a process that is killed before, the folder stays for long
            _remove_left(path, now=workshop.stat().st_mtime)
            temporary = workshop / _FILE
            temporary.touch()
            mode = (path if path.exists() else temporary).stat().st_mode
            yield temporary
            temporary.chmod(mode)
            _flush(temporary)
            os.replace(temporary, path)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    _flush(path.parent)


def _flush(path: Path) -> None:
    """Have the system put a file or a folder on disk, so that a power cut cannot leave a new name for old content."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # folders cannot be opened on Windows
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Workshops that killed processes left.


@contextlib.contextmanager
def _locked(workshop: Path) -> Iterator[None]:
    """Hold the lock that says that somebody is at work here, and on which host."""
    with (workshop / _LOCK).open("wb", buffering=0) as file:
        if _lock(file):
            file.write(_host())
        yield


def _remove_left(path: Path, now: float) -> None:
    """Remove the workshops of this file whose processes were killed. Those that cannot be removed stay."""
    # The second kind is that of earlier versions, which held no lock.
    workshop = re.compile(rf"\.{re.escape(path.name)}\.(w[0-9a-f]{{7}}|[0-9a-f]{{8}})")
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        found = [Path(each) for each in entries if workshop.fullmatch(each.name) and each.is_dir(follow_symlinks=False)]
        for folder in found:
            with contextlib.suppress(OSError):
                if _is_left(folder, now):
                    shutil.rmtree(folder, ignore_errors=True)


def _is_left(workshop: Path, now: float) -> bool:
    """Whether nobody is at work in a workshop.

    Arguments:
        workshop: the folder.
        now: the time by the clock of its file system, which may be another one's than this host's.
    """
    try:
        with (workshop / _LOCK).open("rb+") as file:  # NFS locks what can be written only
            if fcntl is not None and not _lock(file):
                return False
            if file.read() == _host():
                return True
    except FileNotFoundError:
        if not workshop.name[-8:].startswith("w"):
            return True
    # Without a lock, its process has not come to it yet; and another host's may not be seen from here.
    return now - max(each.stat().st_mtime for each in (workshop, *workshop.iterdir())) > _OLD


def _lock(file: IO[bytes]) -> bool:
    """Take the lock of an open file until it is closed. False, if somebody has it or the system has none."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@functools.cache
def _host() -> bytes:
    """This host, until it starts anew: containers on it share its locks, and have other names."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        return f"{platform.node()} {uuid.getnode():x}".encode()
