"""Examples as images."""

from __future__ import annotations

import math


def image_shape(shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Height, width and channels of examples of this shape; vectors are grey images if they fill a square.

    None: they are no images.
    """
    side = math.isqrt(shape[0]) if shape else 0
    if len(shape) == 1 and side**2 == shape[0]:
        return side, side, 1
    return shape if len(shape) == 3 else None
