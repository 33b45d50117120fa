"""`tpu-compile`: a step compiled by the TPU's own compiler, where it is installed, and what is said of bad input."""

import importlib.metadata
import importlib.util
import json

import jax
import pytest

from experiments.tpu import compiled, topology
from tests.experiments.commands import ROOT, fails, invoke

GPT = ROOT / "configs" / "gpt_tiny.toml"
SMALLEST = [
    *("--topology", "v5e:2x2", "--set", "model.layers=2", "--set", "model.width=32", "--set", "model.heads=2"),
    *("--set", "data.window=16", "--set", "data.train_examples=64"),
]
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install .[tpu]")


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    path = tmp_path_factory.mktemp("tpu") / "figures.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_ROUNDS", 1)
        result = invoke("tpu-compile", GPT, *SMALLEST, "--set", "mesh={fsdp=2,model=2}", "--json", path)
    assert result.exit_code == 0, result.output
    return json.loads(path.read_text()), result.output


@pytest.mark.slow
@needs_libtpu
def test_a_small_decoder_on_two_axes(figures):
    """Parameters and what lies on a chip by hand; of the rest, what must hold of any compiler."""
    found, output = figures
    plain, normed = found["plain"], found["weight_norm"]
    layers, width, symbols = 2, 32, 256
    parameters = layers * (12 * width**2 + 2 * width) + 2 * symbols * width + width
    magnitudes = layers * (4 * width + 4 * width + width) + symbols
    assert plain["parameters"] == parameters
    assert normed["parameters"] == parameters + magnitudes
    # Parameters and two moments in float32, at least a quarter on each chip. (There is more, as layouts are padded.)
    assert plain["arguments"] > 3 * 4 * parameters / 4
    for step in (plain, normed):
        assert step["flops"] > 0
        assert step["memory_bytes"] > 3 * 4 * parameters / 4
        assert {kind for kind, _, _ in step["collectives"]} >= {"all-gather", "all-reduce"}
    for figure in ("memory_bytes", "peak_memory", "bytes_accessed"):
        assert normed[figure] < 1.2 * plain[figure]
    assert found["topology"] == "v5e:2x2"
    assert found["environment"]["packages"]["jax"] == jax.__version__
    for word in ("memory traffic", "peak memory", "all-gather", "ratio", "libtpu"):
        assert word in output


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5e:3x5", "not divisible"),
        ("nonsense", "KIND:NxN"),
        ("v4:2x2x1", "one device per chip"),
        ("cpu:2x2", "such as v5e:2x2"),
        ("v5e:0x2", "KIND:NxN"),
        ("", "KIND:NxN"),
    ],
)
def test_a_topology_that_does_not_exist(name, said):
    error = fails("tpu-compile", GPT, "--topology", name)
    assert f"--topology {name}" in error
    assert said in error


@needs_libtpu
def test_a_batch_that_does_not_divide_over_the_mesh():
    error = fails("tpu-compile", GPT, "--topology", "v5e:2x2", "--set", "mesh.fsdp=4", "--set", "data.batch_size=6")
    assert "data.batch_size: 6 examples cannot be shared out evenly among 4 devices" in error


@needs_libtpu
def test_a_mesh_larger_than_the_topology():
    error = fails("tpu-compile", GPT, "--topology", "v5e:2x2", "--set", "mesh.fsdp=8")
    assert "8 devices are wanted, and there are 4 chips; lower them, or take a larger topology" in error


@needs_libtpu
@pytest.mark.parametrize("change", ["mesh.data=2", "data.batch_size=3"])
def test_a_mesh_smaller_than_the_topology(change):
    error = fails("tpu-compile", GPT, "--topology", "v5e:2x2", "--set", change)
    assert "of the 4 chips would be used, and it must be all of them" in error


@needs_libtpu
def test_a_network_without_weights():
    error = fails("tpu-compile", GPT, "--topology", "v5e:2x2", "--arm", "bigram")
    assert "the network of this arm has no weights to normalize; choose another one with --arm" in error


@needs_libtpu
def test_a_file_that_cannot_be_written_is_an_error_before_anything_is_compiled(tmp_path):
    error = fails("tpu-compile", GPT, "--topology", "v5e:2x2", "--json", tmp_path)
    assert "it is a folder; choose another with --json" in error


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.30G "
            "of 15.75G hbm. Exceeded hbm capacity by 4.55G.\n\nTotal hbm usage >= 20.55G:\n    reserved        258.00M",
            "it needs 20.30 GiB, and a chip has 15.75 GiB: 4.55 GiB too much",
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (37.91G) "
            "exceeds available HBM (15.75G).",
            "it needs 37.91 GiB, and a chip has 15.75 GiB: 22.16 GiB too much",
        ),
        ("RESOURCE_EXHAUSTED: in words that are new", "in words that are new"),
    ],
)
def test_a_model_that_does_not_fit_by_how_much(monkeypatch, message, said):
    """The compiler's messages of libtpu 0.0.42."""

    class Refused:
        def compile(self):
            raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(topology, "devices", lambda name: jax.devices()[:4])
    monkeypatch.setattr(compiled.Arm, "lower", lambda arm: Refused())
    error = fails("tpu-compile", GPT, *SMALLEST, code=1)
    assert "plain: the step does not fit a chip's memory on the mesh data 4 x fsdp 1 x model 1" in error
    assert said in error
    assert "set mesh.fsdp or mesh.model higher" in error


def without(monkeypatch, name):
    version = importlib.metadata.version

    def missing(package):
        if package == name:
            raise importlib.metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)


def test_without_libtpu(monkeypatch):
    without(monkeypatch, "libtpu")
    error = fails("tpu-compile", GPT, "--topology", "v5e:2x2")
    assert f"pip install 'jax[tpu]=={jax.__version__}'" in error


def test_a_libtpu_of_another_version(monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1" if name == "libtpu" else version(name))
    error = fails("tpu-compile", GPT, "--topology", "v5e:2x2")
    assert "libtpu 0.0.1 is installed" in error
    assert f"jax {jax.__version__} needs libtpu ==" in error
