"""Made up: 2,000 examples of a linear function with noise, whose inputs have a covariance that is known exactly."""

from __future__ import annotations

import numpy as np

from experiments.data.source import Open, Raw, Source

EXAMPLES, INPUTS, CONDITION_NUMBER = 1000, 20, 100


def read(_open: Open) -> Raw:
    """Inputs (examples, 20) of mean 0. Targets (examples,), a random linear function of these and noise of size 0.1.

    The inputs' covariance has eigenvalues from 1 down to 1/100, evenly spaced in their logarithm, along random
    directions; so the Hessian of linear regression, with its bias, has a condition number of 100.
    """
    random = np.random.default_rng(0)
    directions = np.linalg.qr(random.normal(size=(INPUTS, INPUTS)))[0]
    function = random.normal(size=INPUTS)

    sets = []
    for _ in range(2):
        noise = random.normal(size=(EXAMPLES, INPUTS))
        noise -= noise.mean(axis=0)
        # The columns of Q are orthonormal, and centered like those of the noise.
        white = np.linalg.qr(noise)[0] * np.sqrt(EXAMPLES)  # a covariance of exactly 1
        x = white * np.geomspace(1, 1 / CONDITION_NUMBER, INPUTS) ** 0.5 @ directions.T
        y = x @ function + 0.1 * random.normal(size=EXAMPLES)
        sets += [x.astype(np.float32), y.astype(np.float32)]

    return Raw(sets[0], sets[1], sets[2], sets[3], classes=1)


LINEAR = Source("linear", read)
