"""Several processes as one run: joining them, what one does for all, and what the others do when one is lost.

JAX's own runtime does the work (`jax.distributed`). Its way to end a process whose peers are lost is to abort it, and
its way to wait for a peer that never comes is long and then the same; this file sees to it that there is a message.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import typer
from jax.experimental import multihost_utils

from experiments.cli.terminal import console, user_errors
from experiments.errors import ConfigError, RunError

_HEARTBEAT = 30  # seconds without a sign of life until a process counts as lost
# What the layers below say; none of these words may stand in a path, or in the error of a file.
_LOST = re.compile(r"Gloo \S+ failed|NCCL operation|CoordinationService|heartbeat timeout|Connection closed by peer \[")


@dataclasses.dataclass(frozen=True)
class Join:
    """Whether and how to join other processes: by these, or as the cluster says (TPU pods, SLURM, Kubernetes)."""

    distributed: bool
    coordinator: str | None
    processes: int | None
    process: int | None
    timeout: int

    def check(self, out: Path | None) -> None:
        """That the options fit each other.

        Raises:
            ConfigError: they do not.
        """
        explicit = {"--coordinator": self.coordinator, "--processes": self.processes, "--process": self.process}
        missing = [name for name, value in explicit.items() if value is None]
        if not self.distributed:
            if len(missing) < len(explicit):
                raise ConfigError(f"{', '.join(explicit)} are for --distributed, which is missing")
            return
        if 0 < len(missing) < len(explicit):
            raise ConfigError(
                f"of {', '.join(explicit)} all are needed, or none on a cluster; missing: {', '.join(missing)}"
            )
        if self.coordinator is not None and not _is_address(self.coordinator):
            raise ConfigError(
                f"--coordinator {self.coordinator}: expected ADDRESS:PORT of process 0, such as 10.0.0.1:1234"
            )
        if self.processes is not None and not 0 <= (self.process or 0) < self.processes:
            raise ConfigError(
                f"--process {self.process}: must be 0 to {self.processes - 1}, as --processes is {self.processes}"
            )
        if self.process == 0 and self.coordinator is not None:
            _check_port_is_free(int(self.coordinator.rpartition(":")[2]))
        if out is None:
            raise ConfigError(
                "--distributed needs --out: one folder for all processes, on a file system that they share"
            )


@contextlib.contextmanager
def joined(join: Join, out: Path | None) -> Iterator[None]:
    """What is done in here is one run of all processes. In the end, they end together.

    An error ends this process at once: the others would else wait for it, and it for them.
    """
    with user_errors():
        join.check(out)
        ended = _start(join, out) if join.distributed else None
    if ended is None:
        with user_errors():
            yield
        return
    code = 1
    try:
        console.quiet = not first()
        with user_errors(), _lost_peers(out):
            check_same(str(join.processes), "numbers of --processes")
            yield
            jax.distributed.shutdown()  # once all are here
        code = 0
    except typer.Exit as leaving:
        code = leaving.exit_code
    except BaseException:
        traceback.print_exc()
    ended()
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def first() -> bool:
    """Whether this is the process that writes for all."""
    return jax.process_index() == 0


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What fails in here in one process fails in all, after all have come to its end.

    Raises:
        RunError: it failed in another process, and not in this one.
    """
    try:
        yield
    except Exception:
        _all(False)
        raise
    if not _all(True):
        raise RunError("another process of this run could not go on; its message says why")


def check_same(text: str, what: str) -> None:
    """That all processes have the same text.

    Raises:
        ConfigError: they have not, in all of them.
    """
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), np.uint8)
    if (multihost_utils.process_allgather(digest) != digest).any():
        raise ConfigError(f"the processes have different {what}; start the same command, with the same file, in each")


def _all(fine: bool) -> bool:
    return fine if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(fine)).all())


def lost_peer(error: Exception) -> bool:
    """Whether an error comes of another process that is gone. It has as many types as there are libraries below."""
    return jax.process_count() > 1 and _LOST.search(str(error)) is not None


@contextlib.contextmanager
def _lost_peers(out: Path | None) -> Iterator[None]:
    """An error that comes of a process that is gone says so."""
    try:
        yield
    except (ConfigError, RunError, typer.Exit):
        raise
    except Exception as error:
        if not lost_peer(error):
            raise
        cause = str(error).strip().splitlines()[0][:200]
        raise RunError(f"{_lost(jax.process_index(), out)} ({cause})") from error


def _lost(process: int | None, out: Path | None) -> str:
    who = "this process" if process is None else f"process {process}"
    return (
        f"{who} stops: it was ended from outside, or another process of the run stopped or cannot be reached; see what "
        f"that one said. To go on from the last checkpoint, with as many processes as there are: --out {out} --resume"
    )


def _start(join: Join, out: Path | None) -> Callable[[], None]:
    """Join the others. What is returned is to be called when this process ends as it should.

    Raises:
        ConfigError: JAX cannot tell who the others are, or cannot be reached by them.
    """
    jax.config.update("jax_enable_preemption_service", False)  # it swallows SIGTERM, and nobody here asks it
    ended = _guard(_lost(join.process, out))
    timer = threading.Timer(join.timeout, _give_up, [join, ended])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            join.coordinator,
            join.processes,
            join.process,
            initialization_timeout=join.timeout + 60,  # the timer comes first: JAX would abort
            heartbeat_timeout_seconds=_HEARTBEAT,
        )
    except Exception as error:
        ended()
        raise ConfigError(
            f"--distributed: {str(error).strip().splitlines()[0]} Where there is no cluster that JAX knows, give "
            "--coordinator ADDRESS:PORT --processes COUNT --process INDEX to each process"
        ) from error
    finally:
        timer.cancel()
    return ended


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdecimal() and 0 < int(port) < 2**16


def _check_port_is_free(port: int) -> None:
    """JAX ends in a segmentation fault where it is not."""
    try:
        with socket.create_server(("", port)):
            pass
    except OSError as error:
        raise ConfigError(
            f"--coordinator: port {port} of this machine cannot be used: {error}; choose another"
        ) from None


def _give_up(join: Join, ended: Callable[[], None]) -> None:
    where = f" at {join.coordinator}" if join.coordinator else ""
    wanted = f"all of the {join.processes} processes" if join.processes else "all processes"
    message = (
        f"error: not {wanted} met{where} within {join.timeout} seconds. Is each of them started, with the same address "
        "and number and an index of its own, and can the port of process 0 be reached? --join-timeout waits longer"
    )
    print(message, file=sys.stderr, flush=True)
    ended()
    os._exit(2)


def _guard(message: str) -> Callable[[], None]:
    """A small process that prints the message if this one is gone before it called what is returned.

    JAX aborts a process in C++ when the coordinator is gone, or a peer is silent: no code of Python's runs then.
    """
    script = "import sys; sys.exit(0 if sys.stdin.read() else 'error: ' + sys.argv[1])"
    watching = subprocess.Popen([sys.executable, "-Sc", script, message], stdin=subprocess.PIPE, start_new_session=True)
    assert watching.stdin is not None
    pipe = watching.stdin

    def ended() -> None:
        pipe.write(b"ended")
        pipe.close()
        watching.wait()

    return ended
