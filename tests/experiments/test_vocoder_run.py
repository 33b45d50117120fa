"""The command `vocoder`: what it writes and says, and what is wrong with its input."""

import json
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import safetensors.numpy
import scipy.io.wavfile

import wn_jax as wn
from experiments.config import toml_file
from experiments.vocoder import checkpoint, sound
from experiments.vocoder.config import VocoderConfig
from experiments.vocoder.hifigan import Generator
from experiments.vocoder.mel import log_mel
from tests.experiments.commands import ROOT, fails, invoke, run_once
from tests.messages import pattern

CONFIG = ROOT / "configs" / "vocoder.toml"
TINY = [
    "generator.upsample_initial_channel=16", "generator.upsample_rates=[8, 8]",
    "generator.upsample_kernel_sizes=[16, 16]", "generator.resblock_kernel_sizes=[3]",
    "generator.resblock_dilation_sizes=[[1, 3]]", "mel.n_fft=256", "mel.sampling_rate=8000", "mel.fmax=4000.0",
    "generator.model_in_dim=20", "tuning.seconds=0.4", "tuning.steps=30", "tuning.learning_rate=0.005",
]  # fmt: skip


def settings(*changes):
    return [word for change in (*TINY, *changes) for word in ("--set", change)]


def config_of(*changes):
    return toml_file.load_table(VocoderConfig, CONFIG, [*TINY, *changes])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run_once(tmp_path_factory, "vocoder", "vocoder", CONFIG, *settings())


def test_it_writes_what_one_can_hear_see_and_load(finished):
    folder, output = finished
    assert {path.name for path in folder.iterdir()} == {
        "after.wav", "before.wav", "target.wav", "spectrograms.png", "metrics.jsonl", "config.toml", "environment.json",
        "checkpoint.safetensors", "generator.safetensors", "generator-folded.safetensors", "generator.stablehlo",
    }  # fmt: skip
    rate, waveform = scipy.io.wavfile.read(folder / "after.wav")
    assert (rate, waveform.shape, waveform.dtype) == (8000, (3200,), np.int16)
    assert (folder / "spectrograms.png").read_bytes().startswith(b"\x89PNG")
    losses = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in losses] == [10, 20, 30]
    assert losses[-1]["mel_loss"] < 0.9 * losses[0]["mel_loss"]
    assert f"all of it: {folder}" in output
    level = 20 * np.log10(np.std(waveform / 32767))
    assert float(re.search(r"level (\S+) dB", output)[1]) == pytest.approx(level, abs=0.1)


def test_the_files_hold_the_same_generator(finished):
    folder, _ = finished
    config = toml_file.load_table(VocoderConfig, folder / "config.toml")  # the resolved config runs again
    assert config == config_of()
    variables = checkpoint.load(config.generator, folder / "generator.safetensors")
    start = checkpoint.load(config.generator, folder / "checkpoint.safetensors")
    node, before = (tree["params"]["upsampler_0"]["kernel"] for tree in (variables, start))
    assert node.axes == (-3, -1)  # PyTorch's, not the fan-in
    assert not np.array_equal(node.g, before.g)
    assert not np.array_equal(node.v, before.v)

    mel = log_mel(config)(scipy.io.wavfile.read(folder / "target.wav")[1][None].astype(np.float32) / 32767)
    waveform = wn.wrap(Generator(config.generator).apply)(variables, mel)
    _, written = scipy.io.wavfile.read(folder / "after.wav")
    np.testing.assert_allclose(waveform[0], written / 32767, atol=2e-2)  # of 16 bits, as is the sound that mel is of
    exported = jax.export.deserialize(bytearray((folder / "generator.stablehlo").read_bytes()))
    mel = np.concatenate([mel, mel[:, ::-1]])[:, :31]  # another number of sounds and of frames
    np.testing.assert_allclose(
        exported.call(mel), Generator(config.generator).apply(wn.reconstruct(variables), mel), atol=1e-6
    )
    start, end = (safetensors.numpy.load_file(folder / f"{name}.safetensors") for name in ("checkpoint", "generator"))
    assert start.keys() == end.keys()  # PyTorch loads it with strict=True
    folded = safetensors.numpy.load_file(folder / "generator-folded.safetensors")
    weight = np.asarray(wn.reconstruct(variables)["params"]["conv_pre"]["kernel"])
    np.testing.assert_array_equal(folded["conv_pre.weight"], weight.transpose(2, 1, 0))


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_of_another(finished, tmp_path):
    folder, output = finished
    source = folder / "generator.safetensors"
    result = invoke("vocoder", CONFIG, *settings("tuning.steps=10"), "--checkpoint", source, "--out", tmp_path / "more")
    assert result.exit_code == 0, result.output
    after, before = (
        float(text.split(" before, ")[i].split()[j]) for text, i, j in ((output, 1, 0), (result.output, 0, -1))
    )
    assert after == pytest.approx(before, abs=1e-3)
    assert not (tmp_path / "more" / "checkpoint.safetensors").exists()


def test_the_sound_has_its_length_and_its_tones():
    rate = 16000
    waveform = sound.chord(1.5, rate, rate * 3 // 2)
    assert waveform.shape == (24000,)
    assert np.abs(waveform).max() == pytest.approx(0.7)
    first = np.abs(np.fft.rfft(waveform[: rate // 4] * np.hanning(rate // 4)))
    assert abs(np.argmax(first) * 4 - 220) <= 4  # Hz; the first tone alone
    samples = np.frombuffer(sound.wav(np.array([0.0, 1.0, -1.0, 2.0]), rate)[44:], np.int16)
    assert samples.tolist() == [0, 32767, -32767, 32767]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("generator.upsample_rates=[8]", "generator: upsample_rates has 1 entries and upsample_kernel_sizes 2"),
        (
            "generator.upsample_kernel_sizes=[16, 15]",
            "generator: upsample_kernel_sizes has 15 for a rate of 8",
        ),
        ("generator.upsample_kernel_sizes=[16, 6]", "generator: upsample_kernel_sizes has 6 for a rate of 8"),
        ("generator.resblock_kernel_sizes=[4]", "generator: resblock_kernel_sizes must be odd"),
        ("generator.resblock_dilation_sizes=[[1], [3]]", "generator: resblock_kernel_sizes has 1 entries and .* 2"),
        ("generator.upsample_initial_channel=18", "generator: upsample_initial_channel (18) must be divisible by 4"),
        ("generator.resblock=3", "generator.resblock: .*"),
        ("generator.chanels=3", "generator.chanels: unknown key"),
        (
            "mel.fmax=5000.0",
            "mel: fmin (0.0) must be below fmax (5000.0), and that at most half of .*(8000)",
        ),
        ("mel.n_fft=32", "mel.n_fft (32) must be at least the product of generator.upsample_rates (64)"),
        ("tuning.seconds=0.01", "tuning.seconds (0.01) is less than one window of the spectrogram, 0.032 s"),
        ("tuning.seconds=1e9", "tuning.seconds: Input should be less than or equal to 60"),
        ("name='../elsewhere'", "name: .*"),
        ("tuning.steps=0", "tuning.steps: Input should be greater than 0; got 0"),
    ],
)
def test_a_config_that_cannot_run(tmp_path, change, words):
    message = fails("vocoder", CONFIG, *settings(change), "--out", tmp_path / "run")
    assert re.search(pattern(words), message), message
    assert not (tmp_path / "run").exists()


def saved(path, change):
    """A checkpoint of the tiny generator, changed."""
    state = checkpoint.random_state_dict(config_of().generator, 0)
    change(state)
    safetensors.numpy.save_file(state, path)
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("conv_pre.weight_g"), "'conv_pre.weight_v' is half of a weight whose g is missing"),
        (
            lambda state: state.update({"mean": np.ones(20, np.float32)}),
            "has a mean and a scale of spectrograms that generator.normalize_before = false would leave out; set it",
        ),
        (
            lambda state: state.update(
                {f"ups.{key[10:]}": state.pop(key) for key in list(state) if "upsampler" in key}
            ),
            "has the names of generator.names = 'published', and not 'transformers'; set that",
        ),
        (
            lambda state: state.update({f"generator.{key}": state.pop(key) for key in list(state)}),
            "is of a larger model; save the state dict of its generator alone",
        ),
        (
            lambda state: state.update({key.replace("convs1", "convs"): state.pop(key) for key in list(state)}),
            "no checkpoint of the generator that [generator] describes (look at resblock, .*'resblocks.0.convs.0",
        ),
        (lambda state: state.pop("conv_post.bias"), "leaves of the target that get nothing: 'params/conv_post/bias'"),
        (lambda state: state.update({"decoder.bias": np.ones(2)}), "keys without a place in the map .*'decoder.bias'"),
        (
            lambda state: state.update({"conv_pre.weight_v": np.ones((16, 80, 7), np.float32)}),
            "'conv_pre.weight', for 'params/conv_pre/kernel', has the shape (7, 80, 16) .*has (7, 20",
        ),
    ],
)
def test_a_checkpoint_that_is_none_of_this_generator(tmp_path, change, words):
    path = saved(tmp_path / "bad.safetensors", change)
    message = fails("vocoder", CONFIG, *settings(), "--checkpoint", path, "--out", tmp_path / "run")
    assert str(path) in message
    assert re.search(pattern(words), message), message
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_other_input_that_cannot_be_used(tmp_path):
    run = ["vocoder", CONFIG, *settings("tuning.steps=2")]
    missing, pickle = tmp_path / "missing.safetensors", tmp_path / "generator.pt"
    pickle.write_bytes(b"PK\x03\x04")
    assert "no such file" in fails(*run, "--checkpoint", missing, "--out", tmp_path / "run")
    assert "torch.load(path, weights_only=True)" in fails(*run, "--checkpoint", pickle, "--out", tmp_path / "run")
    folded = tmp_path / "folded.safetensors"
    config = config_of().generator
    plain = wn.reconstruct(checkpoint.load(config, saved(tmp_path / "a.safetensors", lambda state: None)))
    safetensors.numpy.save_file(checkpoint.state_dict(config, plain), folded)
    assert "has no weight norms in it" in fails(*run, "--checkpoint", folded, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert "already exists and is not empty; choose another" in fails(*run, "--out", tmp_path)
    assert "is a file; choose another folder" in fails(*run, "--out", pickle)
    diverged = [*run, "--set", "tuning.learning_rate=3e38", "--set", "tuning.steps=9", "--out", tmp_path / "run"]
    assert "lower tuning.learning_rate (3e+38)" in fails(*diverged, code=1)
    last = [*run, "--set", "tuning.learning_rate=3e38", "--set", "tuning.steps=1", "--out", tmp_path / "last"]
    assert "the loss is nan at step 2; lower" in fails(*last, code=1)


@pytest.mark.slow
def test_ctrl_c_names_the_folder(tmp_path):
    command = [sys.executable, "-m", "experiments", "vocoder", CONFIG, *settings("tuning.steps=100000")]
    out = tmp_path / "run"
    process = subprocess.Popen([*command, "--out", out], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (out / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"interrupted; {out} is not complete" in message


@pytest.mark.slow
def test_the_port_needs_no_torch():
    program = "import sys, wn_jax.torch, experiments.vocoder.run; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
