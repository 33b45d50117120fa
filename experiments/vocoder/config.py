"""What a vocoder is, and what it is trained towards: the tables of its config file."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import pydantic
from pydantic import Field, PositiveFloat

from experiments.schema import Count, CountOrZero, Name, Table, sequence

Counts = Annotated[tuple[Count, ...], pydantic.BeforeValidator(sequence), Field(min_length=1)]


def _sequences(value: object) -> object:
    return tuple(map(sequence, value)) if isinstance(value, list) else value


class GeneratorConfig(Table):
    """A HiFi-GAN generator. The keys are those of a `config.json` of `SpeechT5HifiGan`.

    `upsample_rates` are the factors between frames and samples, `upsample_kernel_sizes` the kernels of those layers;
    after each come residual blocks, one for each of `resblock_kernel_sizes`, with these dilations. `resblock` is 1 or
    2, as in the published configurations: with two convolutions a dilation, or with one. `normalize_before` says that
    the checkpoint has a mean and a scale of the spectrogram. `names` is whose names the checkpoint has: "transformers"
    (`upsampler.0.weight_g`) or "published" (`ups.0.weight_g`).
    """

    model_in_dim: Count
    upsample_initial_channel: Count
    upsample_rates: Counts
    upsample_kernel_sizes: Counts
    resblock_kernel_sizes: Counts
    resblock_dilation_sizes: Annotated[tuple[Counts, ...], pydantic.BeforeValidator(_sequences)]
    resblock: Literal[1, 2] = 1
    leaky_relu_slope: float = 0.1
    normalize_before: bool = False
    names: Literal["transformers", "published"] = "transformers"

    @pydantic.model_validator(mode="after")
    def _fits(self) -> GeneratorConfig:
        pairs = {
            ("upsample_rates", "upsample_kernel_sizes"): (self.upsample_rates, self.upsample_kernel_sizes),
            ("resblock_kernel_sizes", "resblock_dilation_sizes"): (
                self.resblock_kernel_sizes,
                self.resblock_dilation_sizes,
            ),
        }
        for (first, second), (ours, theirs) in pairs.items():
            if len(ours) != len(theirs):
                raise ValueError(f"{first} has {len(ours)} entries and {second} {len(theirs)}; they belong together")
        for rate, kernel in zip(self.upsample_rates, self.upsample_kernel_sizes, strict=True):
            if kernel < rate or (kernel - rate) % 2:
                raise ValueError(
                    f"upsample_kernel_sizes has {kernel} for a rate of {rate}; a kernel must be the rate plus an even "
                    "number, or a frame would not become as many samples as the rates say"
                )
        if any(kernel % 2 == 0 for kernel in self.resblock_kernel_sizes):
            raise ValueError("resblock_kernel_sizes must be odd, or a residual block would change the length")
        if self.upsample_initial_channel % 2 ** len(self.upsample_rates):
            raise ValueError(
                f"upsample_initial_channel ({self.upsample_initial_channel}) must be divisible by "
                f"{2 ** len(self.upsample_rates)}, as each of the {len(self.upsample_rates)} upsamplings halves it"
            )
        return self

    @property
    def hop_length(self) -> int:
        """Samples a frame."""
        return math.prod(self.upsample_rates)


class MelConfig(Table):
    """The log-mel spectrogram that the generator reads.

    `sampling_rate` and frequencies are in Hz, `n_fft` is the window in samples. `log` is the logarithm: "natural" in
    the published HiFi-GAN, "10" in SpeechT5.
    """

    sampling_rate: Count
    n_fft: Count
    fmin: Annotated[float, Field(ge=0)] = 0.0
    fmax: PositiveFloat
    log: Literal["natural", "10"] = "natural"

    @pydantic.model_validator(mode="after")
    def _fits(self) -> MelConfig:
        if not self.fmin < self.fmax <= self.sampling_rate / 2:
            raise ValueError(
                f"fmin ({self.fmin}) must be below fmax ({self.fmax}), and that at most half of sampling_rate "
                f"({self.sampling_rate})"
            )
        return self


class TuningConfig(Table):
    """Training towards the synthesized sound, of at most 60 `seconds`, with Adam, on all of it in each step.

    `seed` is that of the random weights, where no checkpoint is given.
    """

    seconds: Annotated[float, Field(gt=0, le=60)]
    steps: Count
    learning_rate: PositiveFloat
    record_every: Count = 10
    seed: CountOrZero = 0


class VocoderConfig(Table):
    """All of it."""

    name: Name
    generator: GeneratorConfig
    mel: MelConfig
    tuning: TuningConfig

    @pydantic.model_validator(mode="after")
    def _fits(self) -> VocoderConfig:
        if self.mel.n_fft < self.generator.hop_length:
            raise ValueError(
                f"mel.n_fft ({self.mel.n_fft}) must be at least the product of generator.upsample_rates "
                f"({self.generator.hop_length}), or the spectrogram would miss samples"
            )
        if self.tuning.seconds * self.mel.sampling_rate < self.mel.n_fft:
            raise ValueError(
                f"tuning.seconds ({self.tuning.seconds}) is less than one window of the spectrogram, "
                f"{self.mel.n_fft / self.mel.sampling_rate:.3f} s"
            )
        return self
