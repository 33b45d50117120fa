"""1,797 handwritten digits of 8 x 8 pixels (UCI, bundled with scikit-learn): 1,297 to train on, 500 to test on."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from experiments.data.source import Open, Raw, Source


def read(_: Open) -> Raw:
    """Inputs (examples, 64). The split is fixed and stratified.

    Pixels are scaled from 0..16 to zero mean, each by itself, and unit variance, all together, over the 1,297 images
    (also where some of these are held out for validation).
    """
    images, digits = load_digits(return_X_y=True)
    parts = train_test_split(images, digits, test_size=500, stratify=digits, random_state=0)
    train_x, test_x, train_y, test_y = map(np.asarray, parts)
    mean = train_x.mean(axis=0)
    std = (train_x - mean).std()
    scaled = [((x - mean) / std).astype(np.float32) for x in (train_x, test_x)]
    return Raw(scaled[0], train_y.astype(np.int32), scaled[1], test_y.astype(np.int32), classes=10)


DIGITS = Source("digits", read)
