"""Data sets, and the order in which training sees them.

A data set with labels is a file that says what `Source` it is, and its line in `names`. Text is windows of bytes.
"""

from experiments.data.batches import batch_indices
from experiments.data.config import DataConfig
from experiments.data.dataset import Dataset
from experiments.data.load import load
from experiments.data.names import NAMES, SOURCES

__all__ = ["NAMES", "SOURCES", "DataConfig", "Dataset", "batch_indices", "load"]
