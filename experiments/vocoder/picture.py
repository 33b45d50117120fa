"""Spectrograms side by side, as a picture."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.figure import Figure

from experiments.drawing import styled


def spectrograms(panels: dict[str, np.ndarray], seconds: float) -> bytes:
    """A PNG of log-mel spectrograms (frames, mels) by their titles, all in the colours of the first's scale."""
    first = next(iter(panels.values()))
    low, high = float(np.min(first)), float(np.max(first))
    with styled():
        figure = Figure(figsize=(4.0 * len(panels), 3.2), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for ax, (title, mel) in zip(axes, panels.items(), strict=True):
            extent = (0.0, seconds, 0.0, float(mel.shape[1]))
            image = ax.imshow(mel.T, origin="lower", aspect="auto", vmin=low, vmax=high, extent=extent, cmap="magma")
            ax.set_title(title)
            ax.set_xlabel("seconds")
            ax.grid(False)
        axes[0].set_ylabel("mel band")
        figure.colorbar(image, ax=list(axes), label="log amplitude", pad=0.01)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=130)
    return stream.getvalue()
