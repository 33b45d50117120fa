"""Log-mel spectrograms, as the published HiFi-GAN computes them, in JAX."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.vocoder.config import VocoderConfig

_SMALLEST = 1e-5  # amplitude of which a logarithm is taken

# Slaney's Auditory Toolbox: a mel is so many hertz up to 1 kHz, and above, an e-fold is so many mels.
_LINEAR_UP_TO, _HERTZ_A_MEL, _MELS_AN_E_FOLD = 1000.0, 200 / 3, 27 / np.log(6.4)


def log_mel(config: VocoderConfig) -> Callable[[jax.Array], jax.Array]:
    """A function from waveforms (batch, samples) to log-mel spectrograms (batch, samples // hop length, mels).

    It takes amplitudes, not powers, of Hann windows that lie around their frames; the ends are mirrored. It sums them
    in the triangles of Slaney's mel scale, each divided by its width, as librosa by default and the published code do.
    """
    n_fft, hop = config.mel.n_fft, config.generator.hop_length
    before = (n_fft - hop) // 2
    after = n_fft - hop - before
    filters = jnp.asarray(mel_filters(config), jnp.float32)
    scale = 1.0 if config.mel.log == "natural" else 1 / np.log(10)

    def spectrogram(waveform: jax.Array) -> jax.Array:
        padded = jnp.pad(waveform, ((0, 0), (before, after)), mode="reflect")
        _, _, spectrum = jax.scipy.signal.stft(
            padded, window="hann", nperseg=n_fft, noverlap=n_fft - hop, boundary=None, padded=False
        )
        spectrum = spectrum.swapaxes(1, 2) * (n_fft / 2)  # the sum of the window, by which `stft` divides
        amplitudes = jnp.sqrt(spectrum.real**2 + spectrum.imag**2 + 1e-9)  # as published; so 0 has a gradient
        return jnp.log(jnp.maximum(amplitudes @ filters, _SMALLEST)) * scale

    return spectrogram


def mel_filters(config: VocoderConfig) -> np.ndarray:
    """The triangles, (n_fft // 2 + 1, mels): each from the centre of the one before to that of the next."""
    low, high = _to_mels(np.array([config.mel.fmin, config.mel.fmax]))
    corners = _to_hertz(np.linspace(low, high, config.generator.model_in_dim + 2))
    frequencies = np.linspace(0, config.mel.sampling_rate / 2, config.mel.n_fft // 2 + 1)[:, None]
    low, centre, high = corners[:-2], corners[1:-1], corners[2:]
    rising, falling = (frequencies - low) / (centre - low), (high - frequencies) / (high - centre)
    return np.maximum(0, np.minimum(rising, falling)) * 2 / (high - low)


def _to_mels(hertz: np.ndarray) -> np.ndarray:
    """Mels of frequencies: linear up to 1 kHz, logarithmic above."""
    corner = _LINEAR_UP_TO / _HERTZ_A_MEL
    above = corner + _MELS_AN_E_FOLD * np.log(np.maximum(hertz, _LINEAR_UP_TO) / _LINEAR_UP_TO)
    return np.where(hertz < _LINEAR_UP_TO, hertz / _HERTZ_A_MEL, above)


def _to_hertz(mels: np.ndarray) -> np.ndarray:
    """The inverse of `_to_mels`."""
    corner = _LINEAR_UP_TO / _HERTZ_A_MEL
    above = _LINEAR_UP_TO * np.exp((np.maximum(mels, corner) - corner) / _MELS_AN_E_FOLD)
    return np.where(mels < corner, mels * _HERTZ_A_MEL, above)
