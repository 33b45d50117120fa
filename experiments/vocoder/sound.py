"""A synthesized sound, and WAV files."""

from __future__ import annotations

import io

import numpy as np
import scipy.io.wavfile

_CHORD = (220.0, 277.18, 329.63)  # A major, Hz
_PARTIALS = 6  # of each tone


def chord(seconds: float, sampling_rate: int, length: int) -> np.ndarray:
    """A sound within [-1, 1]: three tones one after the other, held like a struck string, and then a glide.

    Each tone has its partials, which decay the faster the higher they are. The last third is a harmonic glide upwards.

    Arguments:
        seconds: the time that the tones and the glide are spread over.
        sampling_rate: the samples of a second.
        length: the samples of the sound.
    """
    time = np.arange(length) / sampling_rate
    starts = np.arange(len(_CHORD)) * seconds / 6
    sound = sum(_tone(time - start, np.full(length, pitch)) for start, pitch in zip(starts, _CHORD, strict=True))
    glide = time - 2 * seconds / 3
    sound = sound + _tone(glide, 220.0 * 2 ** (np.maximum(glide, 0) / seconds * 3), decay=0.5)
    return (0.7 * sound / np.abs(sound).max()).astype(np.float32)


def wav(waveform: np.ndarray, sampling_rate: int) -> bytes:
    """The bytes of a WAV file, of 16 bits a sample."""
    stream = io.BytesIO()
    scipy.io.wavfile.write(stream, sampling_rate, np.round(np.clip(waveform, -1, 1) * 32767).astype(np.int16))
    return stream.getvalue()


def _tone(time: np.ndarray, pitch: np.ndarray, decay: float = 2.0) -> np.ndarray:
    """A tone from time 0 on.

    Arguments:
        time: the time of each sample in seconds.
        pitch: the pitch at each of them in Hz.
        decay: how fast the lowest partial decays, in e-folds a second.
    """
    step = np.diff(time, prepend=time[0])
    phase = 2 * np.pi * np.cumsum(pitch * step)
    partials = (np.sin(n * phase) * np.exp(-decay * n * np.maximum(time, 0)) / n for n in range(1, _PARTIALS + 1))
    attack = np.clip(time / 0.01, 0, 1)
    return attack * sum(partials)
