"""The rows of the benchmark: which network, which batch, and what is done with it."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence
from typing import Literal

import jax

from experiments.bench.networks import NETWORKS, Network
from experiments.errors import ConfigError
from experiments.schema import nearest

Work = Literal["train", "accumulate", "ensemble", "serve"]
"""The work of a step.

"train" is a step of SGD, "accumulate" one that sums the gradients of `PARTS` microbatches, "ensemble" one of `MEMBERS`
networks side by side, and "serve" a forward pass.
"""

PARTS, MEMBERS = 4, 8


@dataclasses.dataclass(frozen=True)
class Row:
    """A network, and what is done with it."""

    name: str
    """The name of the row."""

    network: str
    """The name of the network in `NETWORKS`."""

    batch: int
    """The examples of a batch: for an accumulation, of each microbatch; for an ensemble, of all members together."""

    work: Work = "train"
    """The work of a step."""

    dtype: str = "float32"
    """The dtype of parameters and examples."""

    quick: bool = False
    """Whether it belongs to the quick rows."""

    large: bool = False
    """Whether a step takes so long that only the libraries are compared, and not the ways that wn_jax has."""

    def build(self) -> Network:
        """The network."""
        return NETWORKS[self.network]()

    @property
    def examples(self) -> int:
        """The examples that a step takes in."""
        return self.batch * (PARTS if self.work == "accumulate" else 1)

    @property
    def title(self) -> str:
        """The name, with the dtype where it is not the usual one."""
        return self.name if self.dtype == "float32" else f"{self.name}, {self.dtype}"


ROWS = {
    row.name: row
    for row in (
        Row("mlp-1024 x1", "mlp-1024", 1),
        Row("mlp-1024 x8", "mlp-1024", 8, quick=True),
        Row("mlp-1024 x128", "mlp-1024", 128),
        Row("mlp-1024 x1024", "mlp-1024", 1024),
        Row("mlp-4096 x8", "mlp-4096", 8),
        Row("mlp-4096 x256", "mlp-4096", 256, large=True),
        Row("lstm x32", "lstm", 32),
        Row("gru x32", "gru", 32),
        Row("conv-pool x16", "conv-pool", 16),
        Row("conv-pool x128", "conv-pool", 128, large=True),
        Row("hifi-gan x1", "hifi-gan", 1, large=True),
        Row("gpt 1x16", "gpt-16", 1),
        Row("gpt 8x128", "gpt-128", 8),
        Row("gpt 8x512", "gpt-512", 8, large=True),
        Row("8 mlp-512 x64", "mlp-512", 64, "ensemble", quick=True),
        Row("mlp-1024 4x32", "mlp-1024", 32, "accumulate"),
        Row("serve hifi-gan x1", "hifi-gan", 1, "serve"),
        Row("serve mlp-1024 x1", "mlp-1024", 1, "serve", quick=True),
        Row("serve lstm x1", "lstm", 1, "serve"),
        Row("serve gpt 1x16", "gpt-16", 1, "serve"),
    )
}


def choose(patterns: Sequence[str], quick: bool) -> list[Row]:
    """The rows that are asked for. On a GPU, each is there in two dtypes.

    Arguments:
        patterns: names of rows, in which `*` stands for anything. None: all rows, or the quick ones.
        quick: whether to leave out all but the quick rows, where no name is given.

    Raises:
        ConfigError: nothing has such a name.
    """
    chosen = {name: None for pattern in patterns for name in _matching(pattern)}
    rows = [ROWS[name] for name in chosen] or [row for row in ROWS.values() if row.quick or not quick]
    if jax.default_backend() == "cpu":
        return rows
    return [dataclasses.replace(row, dtype=dtype) for row in rows for dtype in ("float32", "bfloat16")]


def _matching(pattern: str) -> list[str]:
    """The names of rows that a pattern fits, one or more."""
    found = fnmatch.filter(ROWS, pattern)
    if not found:
        raise ConfigError(f"no row is named {pattern!r}{nearest(pattern, ROWS)}; rows: {', '.join(ROWS)}")
    return found
