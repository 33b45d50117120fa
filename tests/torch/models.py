"""Small models of `transformers` that hold weight norms, with random weights, and how many pairs each has.

The numbers are counted from the architectures, layer by layer.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from torch.nn.utils import parametrizations  # noqa: E402


@dataclasses.dataclass(frozen=True)
class TorchModel:
    """How a model is made, how many weights of it are normalized, and its outputs on an input from a fixed seed."""

    make: Callable[[], Any]
    pairs: int
    call: Callable[[Any], Any]


def _numbers(*shape):
    return torch.from_numpy(np.random.default_rng(1).standard_normal(shape, np.float32))


def _encodec():
    return transformers.EncodecModel(
        transformers.EncodecConfig(
            num_filters=4, hidden_size=8, codebook_size=16, codebook_dim=8, num_lstm_layers=1, upsampling_ratios=[4, 2]
        )
    )


def _dac():
    config = transformers.DacConfig(
        encoder_hidden_size=4,
        decoder_hidden_size=32,
        downsampling_ratios=[2, 4],
        upsampling_ratios=[4, 2],
        n_codebooks=2,
        codebook_size=16,
        codebook_dim=4,
        hidden_size=16,
    )
    return _normalized(transformers.DacModel(config))


# A HiFi-GAN generator with two upsamplings.
_UPSAMPLING = {"upsample_initial_channel": 16, "upsample_rates": [4, 2], "upsample_kernel_sizes": [8, 4]}


def _hifigan():
    """The vocoder of SpeechT5, with two residual blocks of different kernels after each upsampling."""
    blocks = {"resblock_kernel_sizes": [3, 5], "resblock_dilation_sizes": [[1, 3], [1, 3]]}
    config = transformers.SpeechT5HifiGanConfig(model_in_dim=8, **_UPSAMPLING, **blocks)
    return _normalized(transformers.SpeechT5HifiGan(config))


def _vits():
    config = transformers.VitsConfig(
        vocab_size=10,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=8,
        flow_size=8,
        spectrogram_bins=9,
        **_UPSAMPLING,
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
        prior_encoder_num_flows=2,
        prior_encoder_num_wavenet_layers=2,
        posterior_encoder_num_wavenet_layers=2,
        duration_predictor_num_flows=1,
        depth_separable_num_layers=1,
        duration_predictor_filter_channels=8,
    )
    model = transformers.VitsModel(config)
    model.decoder.apply_weight_norm()
    return model


def _speech(model, config):
    return model(
        config(
            vocab_size=10,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            conv_dim=(8, 8),
            conv_stride=(5, 2),
            conv_kernel=(10, 3),
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
        )
    )


def _univnet():
    config = transformers.UnivNetConfig(
        model_in_channels=8,
        model_hidden_channels=8,
        num_mel_bins=8,
        resblock_kernel_sizes=[3, 3],
        resblock_stride_sizes=[4, 2],
        resblock_dilation_sizes=[[1, 3], [1, 3]],
        kernel_predictor_num_blocks=1,
        kernel_predictor_hidden_channels=8,
    )
    return _normalized(transformers.UnivNetModel(config))


def _normalized(model):
    model.apply_weight_norm()
    return model


def _call_vits(model):
    torch.manual_seed(0)  # it draws durations and a prior
    return model(torch.arange(1, 9)[None]).waveform


MODELS = {
    # Encoder: first and last convolution, and at both ratios a block of two with a shortcut (3) and a downsampling; the
    # decoder likewise. (The LSTM has no weight norm.)
    "encodec": TorchModel(_encodec, 2 * (2 + 2 * 4), lambda model: model(_numbers(1, 1, 160)).audio_values),
    # Encoder: first, last, and at both ratios three residual units of two convolutions and one more convolution;
    # the decoder likewise; two quantizers of two projections.
    "dac": TorchModel(_dac, 2 * (2 + 2 * 7) + 2 * 2, lambda model: model(_numbers(1, 1, 160)).audio_values),
    # First and last, two upsamplings, and after each two residual blocks of two dilations with two convolutions each.
    "speecht5_hifigan": TorchModel(_hifigan, 2 + 2 + 2 * 2 * 2 * 2, lambda model: model(_numbers(1, 5, 8))),
    # Decoder: two upsamplings and after each a block of one kernel, two dilations, two convolutions (first and last
    # have no weight norm). Two flows and the posterior encoder: WaveNets of two layers, two convolutions each.
    "vits": TorchModel(_vits, 2 + 2 * 2 * 2 + (2 + 1) * 2 * 2, _call_vits),
    "wav2vec2": TorchModel(
        lambda: _speech(transformers.Wav2Vec2Model, transformers.Wav2Vec2Config),
        1,
        lambda model: model(_numbers(1, 400)).last_hidden_state,
    ),
    "hubert": TorchModel(
        lambda: _speech(transformers.HubertModel, transformers.HubertConfig),
        1,
        lambda model: model(_numbers(1, 400)).last_hidden_state,
    ),
    # First and last; at both rates the upsampling, two dilations, and a kernel predictor of an input, two convolutions
    # of its one block, and outputs for kernels and biases.
    "univnet": TorchModel(
        _univnet, 2 + 2 * (1 + 2 + 1 + 2 + 2), lambda model: model(_numbers(1, 5, 8), _numbers(1, 5, 8)).waveforms
    ),
}


def build(name: str, scheme: str = "new"):
    """The model by its name, with weight norms of this style, and with `g` moved away from `||v||`."""
    torch.manual_seed(0)
    with _old_style() if scheme == "old" else contextlib.nullcontext():
        model = MODELS[name].make().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith(("weight_g", "original0")):
                value *= 0.5 + torch.rand(value.shape, generator=generator)
    return model


def _old_style():
    """Has `transformers` find no weight norms of the new style, as in a PyTorch before 2.0."""
    found = parametrizations.weight_norm
    patch = mock.patch.object(parametrizations, "weight_norm", found)

    @contextlib.contextmanager
    def without():
        with patch:
            del parametrizations.weight_norm
            try:
                yield
            finally:
                parametrizations.weight_norm = found

    return without()
