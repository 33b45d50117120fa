"""Black and white images of grey ones, drawn once and for all (Salakhutdinov & Murray 2008)."""

from __future__ import annotations

import numpy as np

from experiments.errors import ConfigError


def binarized(grey: np.ndarray, name: str, seed: int) -> np.ndarray:
    """Pixels 0 and 1 in float32, each 1 with its grey value as probability; the same at each call.

    Raises:
        ConfigError: pixels of the data set `name` are outside 0 to 1.
    """
    low, high = grey.min(), grey.max()
    if not (low >= 0 and high <= 1):  # so of NaN
        raise ConfigError(
            f"data.binarize: pixels of {name} go from {low:g} to {high:g}, and grey values are 0 to 1; choose "
            "data.name = 'mnist', or data.binarize = 'none'"
        )
    return (np.random.default_rng(seed).random(grey.shape, np.float32) < grey).astype(np.float32)
