"""Means over seeds and their standard errors."""

from __future__ import annotations

import math

import numpy as np


def mean(values: np.ndarray) -> float | None:
    """The mean; None of no numbers, or where one is not finite."""
    return float(values.mean()) if len(values) and np.isfinite(values).all() else None


def standard_error(values: np.ndarray) -> float | None:
    """The standard error of the mean; None of fewer than two numbers, or where one is not finite."""
    return float(over_seeds(values)) if len(values) > 1 and np.isfinite(values).all() else None


def over_seeds(values: np.ndarray) -> np.ndarray:
    """The standard error of the mean over the last axis, the seeds; 0 of one seed, which shows no spread."""
    seeds = values.shape[-1]
    return values.std(axis=-1, ddof=1) / math.sqrt(seeds) if seeds > 1 else np.zeros(values.shape[:-1])
