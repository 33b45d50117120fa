"""The tables of a vocoder's config file: the generator, the spectrogram that it reads, and its training."""

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
    """A HiFi-GAN generator. The keys are those of a `config.json` of `SpeechT5HifiGan`."""

    model_in_dim: Count
    """The mel bands of the spectrogram."""

    upsample_initial_channel: Count
    """The channels before the first upsampling. Each upsampling halves them."""

    upsample_rates: Counts
    """The factors of the upsamplings, whose product is the number of samples of a frame."""

    upsample_kernel_sizes: Counts
    """The kernel of each upsampling."""

    resblock_kernel_sizes: Counts
    """The kernels of the residual blocks that come after each upsampling."""

    resblock_dilation_sizes: Annotated[tuple[Counts, ...], pydantic.BeforeValidator(_sequences)]
    """The dilations of each of these blocks."""

    resblock: Literal[1, 2] = 1
    """The kind of block, as in the published configurations: with two convolutions a dilation (1), or with one (2)."""

    leaky_relu_slope: float = 0.1
    """The slope of all activations but the last."""

    normalize_before: bool = False
    """Whether the checkpoint has a mean and a scale of the spectrogram, and uses them."""

    names: Literal["transformers", "published"] = "transformers"
    """The names in the checkpoint: as `upsampler.0.weight_g` ("transformers"), or as `ups.0.weight_g` ("published")."""

    @pydantic.model_validator(mode="after")
    def _fits(self) -> GeneratorConfig:
        pairs = [
            ("upsample_rates", "upsample_kernel_sizes"),
            ("resblock_kernel_sizes", "resblock_dilation_sizes"),
        ]
        for first, second in pairs:
            one, other = len(getattr(self, first)), len(getattr(self, second))
            if one != other:
                raise ValueError(f"{first} has {one} entries and {second} {other}; they belong together")
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
        """The samples of a frame."""
        return math.prod(self.upsample_rates)


class MelConfig(Table):
    """The log-mel spectrogram that the generator reads."""

    sampling_rate: Count
    """The samples of a second."""

    n_fft: Count
    """The window in samples."""

    fmin: Annotated[float, Field(ge=0)] = 0.0
    """The lowest frequency of the mel bands, in Hz."""

    fmax: PositiveFloat
    """The highest frequency of the mel bands, in Hz."""

    log: Literal["natural", "10"] = "natural"
    """The base of the logarithm: "natural" in the published HiFi-GAN, "10" in SpeechT5."""

    @pydantic.model_validator(mode="after")
    def _fits(self) -> MelConfig:
        if not self.fmin < self.fmax <= self.sampling_rate / 2:
            raise ValueError(
                f"fmin ({self.fmin}) must be below fmax ({self.fmax}), and that at most half of sampling_rate "
                f"({self.sampling_rate})"
            )
        return self


class TuningConfig(Table):
    """Training towards the synthesized sound with Adam, on all of it in each step."""

    seconds: Annotated[float, Field(gt=0, le=60)]
    """The length of the sound."""

    steps: Count
    """The steps of training."""

    learning_rate: PositiveFloat
    """The learning rate of Adam."""

    record_every: Count = 10
    """The steps from one recorded loss to the next."""

    seed: CountOrZero = 0
    """The seed of the random weights, where no checkpoint is given."""


class VocoderConfig(Table):
    """The whole config file."""

    name: Name
    """The name of the experiment."""

    generator: GeneratorConfig
    """The generator."""

    mel: MelConfig
    """The spectrogram that it reads."""

    tuning: TuningConfig
    """Its training."""

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
