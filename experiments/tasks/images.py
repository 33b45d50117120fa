"""The shapes that examples have as images."""

from __future__ import annotations

import math


def image_shape(shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Height, width and channels of an example of this shape, or None where it is no image.

    A vector is a grey image if it fills a square.
    """
    if len(shape) == 1:
        side = math.isqrt(shape[0])
        return (side, side, 1) if side**2 == shape[0] else None
    return shape if len(shape) == 3 else None
