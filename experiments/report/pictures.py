"""The pictures that networks made at the end of a run."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Sequence

from PIL import Image

from experiments import files
from experiments.errors import ConfigError
from experiments.report.runs import Run
from experiments.run_folder import pictures
from experiments.schema import shortened

_CAPTIONS = {
    "samples": "Drawn from the prior: what the network makes of noise, as the mean of each pixel.",
    "reconstructions": "Held-out images, and below each what the network makes of a draw from its posterior, as the "
    "mean of each pixel.",
    "interpolations": "In each row the way from one held-out image to another, in equal steps of the latent variables "
    "on top, without noise in those below.",
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture by the first seed of a curve that stayed finite."""

    label: str
    """The name of the curve."""

    step: int
    """The steps after which it was made."""

    source: str
    """The file as a data URL."""

    width: int
    """In pixels."""

    height: int
    """In pixels."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """The pictures of one kind."""

    name: str
    """The name of the kind."""

    caption: str
    """Sentences on what they show."""

    pictures: list[Picture]
    """The pictures, in the order of the curves."""


def read(runs: Sequence[Run]) -> list[Kind]:
    """The last pictures of each curve whose network makes any.

    Raises:
        ConfigError: a file is no picture.
    """
    kinds: dict[str, list[Picture]] = {name: [] for name in _CAPTIONS}
    for run in runs:
        for curve in run.curves:
            for found in pictures.last(run.path, curve.arm, curve.learning_rate):
                kinds.setdefault(found.kind, []).append(_picture(curve.label, found))
    return [Kind(name, _CAPTIONS.get(name, ""), own) for name, own in kinds.items() if own]


def _picture(label: str, found: pictures.Picture) -> Picture:
    """The picture in a file, checked to be whole."""
    try:
        content = files.read(found.path)
        with Image.open(io.BytesIO(content)) as image:
            image.load()  # all of it, so that half a file is found out
            width, height = image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # as damage leads Pillow to
        raise ConfigError(f"{found.path}: cannot be read: {shortened(str(error))}; remove it") from None
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return Picture(label, found.step, source, width, height)
