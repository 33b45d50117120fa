"""The vocoder's generator and its spectrogram against PyTorch and `transformers`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import wn_jax as wn
from experiments.vocoder import checkpoint
from experiments.vocoder.config import GeneratorConfig, VocoderConfig
from experiments.vocoder.hifigan import Generator
from experiments.vocoder.mel import log_mel, mel_filters

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from torch import nn  # noqa: E402
from torch.nn.functional import leaky_relu  # noqa: E402

SMALL = {
    "model_in_dim": 8,
    "upsample_initial_channel": 16,
    "upsample_rates": (4, 2),
    "upsample_kernel_sizes": (8, 4),
    "resblock_kernel_sizes": (3, 5),
    "resblock_dilation_sizes": ((1, 3), (1, 2)),
}
MEL = np.random.default_rng(1).standard_normal((2, 11, 8), np.float32)


def speecht5(config):
    """The vocoder of `transformers`, with weight norms."""
    shared = {key: getattr(config, key) for key in (*SMALL, "leaky_relu_slope", "normalize_before")}
    model = transformers.SpeechT5HifiGan(transformers.SpeechT5HifiGanConfig(**shared))
    model.apply_weight_norm()
    return model


class Published(nn.Module):
    """The published generator with the residual blocks of its third configuration, written from the paper's code."""

    def __init__(self, config):
        super().__init__()
        norm, channels = nn.utils.weight_norm, config.upsample_initial_channel
        self.config = config
        self.conv_pre = norm(nn.Conv1d(config.model_in_dim, channels, 7, padding=3))
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        for rate, kernel in zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True):
            pad = (kernel - rate) // 2
            self.ups.append(norm(nn.ConvTranspose1d(channels, channels // 2, kernel, rate, padding=pad)))
            channels //= 2
            for size, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True):
                block = nn.Module()
                pads = [dilation * (size - 1) // 2 for dilation in dilations]
                block.convs = nn.ModuleList(
                    norm(nn.Conv1d(channels, channels, size, dilation=dilation, padding=pad))
                    for dilation, pad in zip(dilations, pads, strict=True)
                )
                self.resblocks.append(block)
        self.conv_post = norm(nn.Conv1d(channels, 1, 7, padding=3))

    def forward(self, mel):
        x, kinds = self.conv_pre(mel.transpose(1, 2)), len(self.config.resblock_kernel_sizes)
        for i, up in enumerate(self.ups):
            x = up(leaky_relu(x, 0.1))
            total = 0
            for block in self.resblocks[i * kinds : (i + 1) * kinds]:
                y = x
                for conv in block.convs:
                    y = conv(leaky_relu(y, 0.1)) + y
                total = total + y
            x = total / kinds
        return torch.tanh(self.conv_post(leaky_relu(x)))[:, 0]


CASES = {
    "speecht5": (speecht5, GeneratorConfig(**SMALL, normalize_before=True)),
    "speecht5_without_normalization": (speecht5, GeneratorConfig(**SMALL, leaky_relu_slope=0.2)),
    "published": (Published, GeneratorConfig(**SMALL, resblock=2, names="published")),
}


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of PyTorch, about the old scheme


@pytest.fixture(params=CASES)
def pair(request, tmp_path):
    """A generator in PyTorch, and its configuration and variables in Flax, by way of a file of random weights."""
    make, config = CASES[request.param]
    state = checkpoint.random_state_dict(config, seed=3)
    rng = np.random.default_rng(4)
    for key, value in state.items():
        if key.endswith("_g"):
            state[key] = value * rng.uniform(1.2, 2.4, value.shape).astype(np.float32)
    if config.normalize_before:
        state |= {"mean": rng.standard_normal(8, np.float32), "scale": rng.uniform(0.5, 2, 8).astype(np.float32)}
    model = make(config)
    found = model.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()}, strict=True)
    assert not found.missing_keys
    path = tmp_path / "checkpoint.safetensors"
    safetensors.numpy.save_file(state, path)
    return model, config, checkpoint.load(config, path), state


def test_the_waveform_equals_torch(pair):
    model, config, variables, _ = pair
    with torch.no_grad():
        expected = model(torch.from_numpy(MEL)).numpy()
    assert 0.05 < expected.std() < 0.9  # neither silent nor clipped
    waveform = jax.jit(wn.wrap(Generator(config).apply))(variables, MEL)
    assert waveform.shape == expected.shape == (2, 11 * config.hop_length)
    np.testing.assert_allclose(waveform, expected, atol=1e-5)  # asked for: 1e-4
    folded = Generator(config).apply(wn.reconstruct(variables), MEL)
    np.testing.assert_allclose(folded, expected, atol=1e-5)


def test_gradients_of_g_and_v_equal_torch(pair):
    model, config, variables, state = pair
    weights = np.random.default_rng(5).standard_normal((2, 11 * config.hop_length), np.float32)
    (model(torch.from_numpy(MEL)) * torch.from_numpy(weights)).sum().backward()
    expected = {
        key.replace(".parametrizations.weight.original0", ".weight_g").replace(
            ".parametrizations.weight.original1", ".weight_v"
        ): value.grad.numpy()
        for key, value in model.named_parameters()
    }
    apply = wn.wrap(Generator(config).apply)
    grads = jax.jit(jax.grad(lambda variables: jnp.sum(apply(variables, MEL) * weights)))(variables)
    found = checkpoint.state_dict(config, grads)
    assert expected.keys() == state.keys() - {"mean", "scale"}
    for key, grad in expected.items():
        error = np.linalg.norm(found[key] - grad) / np.linalg.norm(grad)
        assert error < 1e-5, key  # asked for: 1e-4


def test_the_way_back_is_exact(pair):
    _, config, variables, state = pair
    again = checkpoint.state_dict(config, variables)
    assert again.keys() == state.keys()
    assert all(np.array_equal(value, state[key]) for key, value in again.items())


def vocoder(**mel):
    return VocoderConfig(
        name="test",
        generator=GeneratorConfig(**SMALL | {"model_in_dim": 40, "upsample_rates": (8, 4)}),
        mel={"sampling_rate": 16000, "n_fft": 256, "fmax": 7600.0} | mel,
        tuning={"seconds": 0.1, "steps": 1, "learning_rate": 0.001},
    )


@pytest.mark.parametrize("options", [{}, {"fmin": 80.0, "fmax": 4000.0, "log": "10"}])
def test_the_spectrogram_equals_that_of_transformers(options):
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    config = vocoder(**options)
    waveform = 0.3 * np.random.default_rng(0).standard_normal(1600).astype(np.float32)
    filters = mel_filter_bank(129, 40, config.mel.fmin, config.mel.fmax, 16000, norm="slaney", mel_scale="slaney")
    np.testing.assert_allclose(mel_filters(config), filters, rtol=1e-6, atol=1e-9)
    expected = spectrogram(
        np.pad(waveform, 112, mode="reflect"),
        window_function(256, "hann"),
        frame_length=256,
        hop_length=32,
        power=1.0,
        center=False,
        mel_filters=filters,
        mel_floor=1e-5,
        log_mel="log10" if options else "log",
    ).T
    np.testing.assert_allclose(log_mel(config)(waveform[None])[0], expected, atol=1e-4)
