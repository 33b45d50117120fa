"""Several processes as one run: what one does for all, and what all do together. How they join, the command line says.

With one process, all of it does nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.errors import ConfigError, RunError

# What the layers below say; none of these words may stand in a path, or in the error of a file.
_LOST = re.compile(r"Gloo \S+ failed|NCCL operation|CoordinationService|heartbeat timeout|Connection closed by peer \[")


def first() -> bool:
    """Whether this is the process that writes for all."""
    return jax.process_index() == 0


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Let a failure in here in one process be one in all, after all have come to its end.

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
    """Check that all processes have the same text.

    Raises:
        ConfigError: they have not, in all of them.
    """
    if jax.process_count() == 1:
        return
    # A digest, as all processes must send arrays of one shape.
    digest = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), np.uint8)
    if (multihost_utils.process_allgather(digest) != digest).any():
        raise ConfigError(f"the processes have different {what}; start the same command, with the same file, in each")


def lost_peer(error: Exception) -> bool:
    """Whether an error comes of another process that is gone. It has as many types as there are libraries below."""
    return jax.process_count() > 1 and _LOST.search(str(error)) is not None


def _all(fine: bool) -> bool:
    """Whether all processes are fine. It waits for each of them."""
    return fine if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(fine)).all())
