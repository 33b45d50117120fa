"""The pictures that networks make at each evaluation: `pictures/ARM/RATE/KIND-STEP.png` in the run folder."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import einops
import numpy as np
from PIL import Image

from experiments import files

FOLDER = "pictures"
_NAME = re.compile(r"(\w+)-(\d+)\.png")
_GAP, _GREY = 1, 128  # pixels between the images of a picture, and their brightness


class Picture(NamedTuple):
    """A picture that was written after so many steps."""

    kind: str
    step: int
    path: Path


def write(run: Path, arm: str, rate: float, step: int, images: dict[str, np.ndarray]) -> None:
    """Write each kind of images (rows, columns, height, width, channels) of uint8 as a picture of its own."""
    for kind, grid in images.items():
        stream = io.BytesIO()
        Image.fromarray(mosaic(grid)).save(stream, "png")
        files.write(_folder(run, arm, rate) / f"{kind}-{step:07d}.png", stream.getvalue())


def last(run: Path, arm: str, rate: float) -> list[Picture]:
    """The newest picture of each kind, kinds in alphabetical order."""
    newest = {picture.kind: picture for picture in sorted(_found(_folder(run, arm, rate)))}
    return list(newest.values())


def cut(run: Path, step: int) -> None:
    """Remove the pictures from after `step`."""
    for picture in list(_found(run / FOLDER)):
        if picture.step > step:
            picture.path.unlink()


def mosaic(grid: np.ndarray) -> np.ndarray:
    """Images (rows, columns, height, width, 1 or 3 channels) side by side, in red, green and blue."""
    rows, columns, height, width, _ = grid.shape
    framed = np.full((rows, columns, height + _GAP, width + _GAP, 3), _GREY, np.uint8)
    framed[:, :, :height, :width] = grid
    return einops.rearrange(framed, "rows columns y x c -> (rows y) (columns x) c")[:-_GAP, :-_GAP]


def _folder(run: Path, arm: str, rate: float) -> Path:
    return run / FOLDER / arm / repr(rate)


def _found(folder: Path) -> Iterator[Picture]:
    for path in folder.rglob("*.png"):
        if match := _NAME.fullmatch(path.name):
            yield Picture(match[1], int(match[2]), path)
