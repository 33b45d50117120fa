"""Joining other processes as the options say, so that all do one run, and end together with a message.

JAX's own runtime does the work (`jax.distributed`). Its way to end a process whose peers are lost is to abort it, and
its way to wait for a peer that never comes is long and then the same; this file sees to it that there is a message.
What the processes do together once they have joined, `processes` says.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import typer

from experiments.cli.options import TrainingOptions
from experiments.cli.terminal import console, user_errors
from experiments.errors import ConfigError, RunError
from experiments.processes import check_same, first, lost_peer

_HEARTBEAT = 30  # seconds without a sign of life until a process counts as lost


@contextlib.contextmanager
def joined(options: TrainingOptions) -> Iterator[None]:
    """Do what is in here as one run of all processes, and end it in all of them together.

    An error ends this process at once: the others would else wait for it, and it for them.
    """
    with user_errors():
        _check(options)
        ended = _start(options) if options.distributed else None
    if ended is None:
        with user_errors():
            yield
        return

    code = 1
    try:
        console.quiet = not first()
        with user_errors(), _lost_peers(options.out):
            check_same(str(options.processes), "numbers of --processes")
            yield
            jax.distributed.shutdown()  # once all are here
        code = 0
    except typer.Exit as leaving:
        code = leaving.exit_code
    except BaseException:  # noqa: BLE001 (whatever it is, this process must not wait for the others)
        traceback.print_exc()
    ended()
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _check(options: TrainingOptions) -> None:
    """Check that the options fit each other.

    Raises:
        ConfigError: they do not.
    """
    _check_all_or_none(options)
    if not options.distributed:
        return
    if options.coordinator is not None and not _is_address(options.coordinator):
        raise ConfigError(
            f"--coordinator {options.coordinator}: expected ADDRESS:PORT of process 0, such as 10.0.0.1:1234"
        )
    if options.processes is not None and not 0 <= (options.process or 0) < options.processes:
        raise ConfigError(
            f"--process {options.process}: must be 0 to {options.processes - 1}, as --processes is {options.processes}"
        )
    if options.process == 0 and options.coordinator is not None:
        _check_port_is_free(int(options.coordinator.rpartition(":")[2]))
    if options.out is None:
        raise ConfigError("--distributed needs --out: one folder for all processes, on a file system that they share")


def _check_all_or_none(options: TrainingOptions) -> None:
    """Check that the options that say who the processes are stand together, and only with `--distributed`.

    Raises:
        ConfigError: they do not.
    """
    explicit = {
        "--coordinator": options.coordinator,
        "--processes": options.processes,
        "--process": options.process,
    }
    missing = [name for name, value in explicit.items() if value is None]
    if not options.distributed and len(missing) < len(explicit):
        raise ConfigError(f"{', '.join(explicit)} are for --distributed, which is missing")
    if 0 < len(missing) < len(explicit):
        raise ConfigError(
            f"of {', '.join(explicit)} all are needed, or none on a cluster; missing: {', '.join(missing)}"
        )


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdecimal() and 0 < int(port) < 2**16


def _check_port_is_free(port: int) -> None:
    """Check that the port can be used. JAX ends in a segmentation fault where it cannot.

    Raises:
        ConfigError: it cannot.
    """
    try:
        with socket.create_server(("", port)):
            pass
    except OSError as error:
        raise ConfigError(
            f"--coordinator: port {port} of this machine cannot be used: {error}; choose another"
        ) from None


def _start(options: TrainingOptions) -> Callable[[], None]:
    """Join the others. What is returned is to be called when this process ends as it should.

    Raises:
        ConfigError: JAX cannot tell who the others are, or cannot be reached by them.
    """
    jax.config.update("jax_enable_preemption_service", False)  # it swallows SIGTERM, and nobody here asks it
    ended = _guard(_lost(options.process, options.out))
    timer = threading.Timer(options.join_timeout, _give_up, [options, ended])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            options.coordinator,
            options.processes,
            options.process,
            initialization_timeout=options.join_timeout + 60,  # the timer comes first: JAX would abort
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


def _give_up(options: TrainingOptions, ended: Callable[[], None]) -> None:
    """End this process, which waited too long for the others."""
    where = f" at {options.coordinator}" if options.coordinator else ""
    wanted = f"all of the {options.processes} processes" if options.processes else "all processes"
    message = (
        f"error: not {wanted} met{where} within {options.join_timeout} seconds. Is each of them started, with the same "
        "address and number and an index of its own, and can the port of process 0 be reached? --join-timeout waits "
        "longer"
    )
    print(message, file=sys.stderr, flush=True)
    ended()
    os._exit(2)  # from this thread, as the other one is inside JAX


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


@contextlib.contextmanager
def _lost_peers(out: Path | None) -> Iterator[None]:
    """Let an error that comes of a process that is gone say so."""
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
    """The message of a process that was ended, or whose peers are gone."""
    who = "this process" if process is None else f"process {process}"
    return (
        f"{who} stops: it was ended from outside, or another process of the run stopped or cannot be reached; see what "
        f"that one said. To go on from the last checkpoint, with as many processes as there are: --out {out} --resume"
    )
