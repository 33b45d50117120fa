"""The data sets by name. How one is read, its own file says."""

from __future__ import annotations

from experiments.data import text
from experiments.data.cifar10 import CIFAR10
from experiments.data.digits import DIGITS
from experiments.data.linear import LINEAR
from experiments.data.mnist import MNIST
from experiments.data.source import Source

SOURCES: dict[str, Source] = {source.name: source for source in (DIGITS, MNIST, CIFAR10, LINEAR)}
"""The data sets with labels or targets."""

NAMES = (*SOURCES, text.NAME)
"""Everything that `data.name` may be."""
