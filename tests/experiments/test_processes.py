"""Several processes as one run, on localhost: the numbers of one process, and an end with a message if one is lost."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.experiments.commands import ROOT, fails

CONFIG = """
name = "together"
data = { name = "digits", batch_size = 48 }
model = { name = "mlp", hidden = [16], norm = "mean_only" }
optimizer = { name = "sgd", learning_rate = 0.05 }
train = { steps = 30, record_every = 1, evaluate_every = 5, checkpoint_every = 5, seeds = 2, ema = 0.9 }
[arms.plain]
[arms.weight_norm]
model = { weights = "weight_norm", init = "data" }
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def alone(config):
    """The run of one process on one device."""
    out = config.parent / "alone"
    (process,) = start([config, "--out", out])
    assert ended(process)[0] == 0
    return out


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def start(arguments, count=1, devices=1):
    """So many processes of one run, each with so many devices, that may be waited for."""
    together = ["--distributed", "--coordinator", f"localhost:{free_port()}", "--processes", count]
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return [
        subprocess.Popen(
            [sys.executable, "-m", "experiments", "compare"]
            + [str(word) for word in (*arguments, *([*together, "--process", index] if count > 1 else ()))],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def ended(process, timeout=300):
    """The exit code and what was said, to its end: also by the guard that outlives an aborted process."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def losses(out):
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return np.array([record["train_loss"] + record.get("test_loss", [1.0, 1.0]) for record in records])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "devices", "mesh"),
    [(2, 4, "mesh={ data = 2, fsdp = 2, model = 2 }"), (4, 1, "mesh={ data = 4 }")],
)
def test_processes_together_have_the_losses_of_one(count, devices, mesh, config, alone, tmp_path):
    processes = start([config, "--out", tmp_path / "run", "--set", mesh], count, devices)
    results = [ended(process) for process in processes]
    assert [code for code, *_ in results] == [0] * count, results
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(alone), rtol=1e-5)
    assert "report: " in results[0][1]  # one of them writes, and reports
    assert "report: " not in "".join(out for _, out, _ in results[1:])
    assert (tmp_path / "run" / "report.html").exists()
    assert len(json.loads((tmp_path / "run" / "environment.json").read_text())["devices"]) == count * devices


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "signal_"), [(1, signal.SIGKILL), (0, signal.SIGTERM), (1, signal.SIGSTOP)])
def test_when_one_is_lost_the_others_stop_and_the_run_goes_on(victim, signal_, config, alone, tmp_path):
    """Killed; ended, with the coordinator in it; or silent. It goes on in another number of processes."""
    arguments = [config, "--out", tmp_path / "run", "--set", "mesh.fsdp=2"]
    processes = start(arguments, 2)
    while not (tmp_path / "run" / "checkpoints" / "10").exists():
        assert all(process.poll() is None for process in processes), [ended(process) for process in processes]
        time.sleep(0.05)
    processes[victim].send_signal(signal_)
    lost = time.monotonic()
    code, _, said = ended(processes[1 - victim], timeout=60)
    assert time.monotonic() - lost < 60
    processes[victim].kill()
    ended(processes[victim])
    assert code != 0
    assert "another process of the run stopped or cannot be reached" in said
    assert f"--out {tmp_path / 'run'} --resume" in said

    (process,) = start([config, "--out", tmp_path / "run", "--resume"])
    code, said, _ = ended(process)
    assert code == 0
    assert "going on after step " in said
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(alone), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_never_joins(index, config, tmp_path):
    join = ["--distributed", "--coordinator", f"localhost:{free_port()}", "--processes", 2, "--process", index]
    (process,) = start([config, "--out", tmp_path / "run", "--join-timeout", 3, *join])
    code, _, said = ended(process, timeout=60)
    assert code == 2
    assert "error: not all of the 2 processes met at localhost:" in said
    assert "within 3 seconds. Is each of them started" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_fails_in_one_process_ends_all(config, tmp_path):
    """A folder that is not shared; and a batch that leaves a device out, which fails in each."""
    port = free_port()

    def one(index, *arguments):
        join = ["--distributed", "--coordinator", f"localhost:{port}", "--processes", 2, "--process", index]
        return start([config, *arguments, *join])[0]

    results = [ended(process) for process in [one(i, "--out", tmp_path / str(i)) for i in range(2)]]
    assert [code for code, *_ in results] == [1, 2]
    assert "another process of this run could not go on; its message says why" in results[0][2]
    assert "is not the folder that process 0 of this run works in; choose an --out on a file system" in results[1][2]

    results = [ended(p) for p in start([config, "--out", tmp_path / "uneven", "--set", "data.batch_size=49"], 2)]
    for code, _, said in results:
        assert code == 2
        assert "1 of the 2 devices of 2 processes would be used, and with several processes it must be all" in said
    assert not (tmp_path / "uneven").exists()


@pytest.mark.slow
def test_processes_with_different_configs_do_not_train(config, tmp_path):
    port = free_port()

    def one(index, rate):
        join = ["--distributed", "--coordinator", f"localhost:{port}", "--processes", 2, "--process", index]
        return start([config, "--out", tmp_path / "run", "--set", f"optimizer.learning_rate={rate}", *join])[0]

    for code, _, said in [ended(process) for process in [one(0, 0.1), one(1, 0.2)]]:
        assert code == 2
        assert "the processes have different configs, options or texts; start the same command" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_checkpoint_that_one_process_cannot_read_is_passed_over_by_all(config, alone, tmp_path):
    out = tmp_path / "run"
    assert [ended(process)[0] for process in start([config, "--out", out, "--set", "mesh.fsdp=2"], 2)] == [0, 0]
    for file in (out / "checkpoints" / "30" / "state" / "ocdbt.process_1").rglob("*"):
        if file.is_file():
            os.truncate(file, 10)
    results = [ended(p) for p in start([config, "--out", out, "--set", "mesh.fsdp=2", "--resume"], 2)]
    assert [code for code, *_ in results] == [0, 0], results
    said = results[0][1]
    assert "the checkpoint at step 30 was put aside: " in said, said
    assert "going on after step 25 of 30" in said, said
    np.testing.assert_allclose(losses(out), losses(alone), rtol=1e-5)


WRONG = {
    "half of an address": (
        ["--distributed", "--processes", 2],
        "all are needed, or none on a cluster; missing: --coord",
    ),
    "no port": (
        ["--distributed", "--coordinator", "localhost", "--processes", 2, "--process", 1],
        "--coordinator localhost: expected ADDRESS:PORT of process 0, such as 10.0.0.1:1234",
    ),
    "an index too high": (
        ["--distributed", "--coordinator", "localhost:1", "--processes", 2, "--process", 2],
        "--process 2: must be 0 to 1, as --processes is 2",
    ),
    "an address for one": (["--coordinator", "localhost:1"], "are for --distributed, which is missing"),
    "no folder": (
        ["--distributed", "--coordinator", "localhost:1", "--processes", 2, "--process", 1],
        "--distributed needs --out: one folder for all processes, on a file system that they share",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_options_that_do_not_fit(name, config, tmp_path):
    arguments, message = WRONG[name]
    out = () if name == "no folder" else ("--out", tmp_path / "run")
    assert message in fails("train", config, *out, *arguments)


def test_a_port_that_is_taken(config, tmp_path):
    with socket.create_server(("", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
        join = ["--distributed", "--coordinator", address, "--processes", 2, "--process", 0]
        assert "cannot be used" in fails("train", config, "--out", tmp_path / "run", *join)
