"""The records of `conditioning.jsonl`: one for each seed, step and parametrization at which curvature was measured.

What the records hold is said here, once for those who write them (`conditioning`) and read them (`report.curvature`).
The file itself belongs to `folder`, and `record` reads it for a run that goes on.
"""

from __future__ import annotations

from typing import TypedDict

import numpy as np

LEVELS = np.geomspace(1e-6, 1, 37)
"""The levels above which eigenvalues are counted, in units of the largest.

They may never change: no file holds them, so a report takes those of here, whichever version measured.
"""


class Spectrum(TypedDict, total=False):
    """The eigenvalues of one matrix, in figures."""

    size: int
    """The number of rows; missing for the natural gradient, whose matrix is not measured but worked out."""

    exact: bool
    """Whether all eigenvalues are known, and not only a density of them; missing as `size` is."""

    largest: float
    """The largest eigenvalue."""

    smallest: float
    """The smallest eigenvalue."""

    to_mean: float
    """The largest magnitude over the mean one."""

    damped: float
    """The condition number with a multiple of the mean magnitude added to the matrix."""

    numerical_range: float
    """The largest magnitude over the smallest one that can be told from 0."""

    to: dict[str, float]
    """The largest eigenvalue over the k-th largest, by k."""

    above: list[float]
    """The fraction of magnitudes above each of `LEVELS`."""


class Measurement(TypedDict):
    """Everything about one parametrization at one place. A record has the place's `seed` and `step` with it."""

    coordinates: str
    """The name of the parametrization."""

    loss: float
    """The loss at the place."""

    difference: float
    """The largest difference of outputs from those of plain weights, over the largest of the latter: rounding."""

    cosine_natural: float
    """The cosine between a gradient step's move of the weights and the natural gradient."""

    cosine_gradient: float
    """The cosine between a gradient step's move of the weights and the gradient of plain weights."""

    decrease: float
    """The fraction of the loss that the best single step takes off."""

    matrices: dict[str, Spectrum]
    """The spectra by the name of the matrix."""


class NaturalMeasurement(Measurement):
    """The same of the natural gradient, and how its linear system was solved."""

    residual: float
    """The relative residual of the solution."""

    products: int
    """The products with the Fisher matrix that it took."""


KEYS = ("seed", "step", *Measurement.__annotations__)
"""The keys that every record has."""
