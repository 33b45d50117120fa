"""The cost of importing a state dict of 100 million parameters: `python -m tests.torch.import_cost`.

Prints, for each way of importing, the seconds, and the most memory that was held on the way, state dict included, as a
share of the state dict's size. Each is measured in a process of its own.
"""

import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from wn_jax.torch import Array, conv, from_state_dict, linear, to_flax

LAYERS, WIDTH, KERNEL = 25, 1024, 3
SIZE = 4 * LAYERS * (WIDTH * WIDTH * (KERNEL + 1) + 4 * WIDTH)  # bytes: kernels, and g and bias of each


def state_dict():
    """Weight-normalized convolutions and linear layers with 102 million parameters, in the old scheme."""
    rng = np.random.default_rng(0)
    state = {}
    for i in range(LAYERS):
        for name, shape in ((f"conv.{i}", (WIDTH, WIDTH, KERNEL)), (f"linear.{i}", (WIDTH, WIDTH))):
            state[f"{name}.weight_v"] = rng.standard_normal(shape, np.float32)
            state[f"{name}.weight_g"] = np.ones((WIDTH,) + (1,) * (len(shape) - 1), np.float32)
            state[f"{name}.bias"] = np.zeros(WIDTH, np.float32)
    return state


def target():
    """The same layers in Flax's layout, abstract."""

    def layer(shape):
        arrays = {"kernel": shape, "bias": (WIDTH,)}
        return {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in arrays.items()}

    convs = {f"conv_{i}": layer((KERNEL, WIDTH, WIDTH)) for i in range(LAYERS)}
    return convs | {f"linear_{i}": layer((WIDTH, WIDTH)) for i in range(LAYERS)}


NAMES: dict[str, dict[str, Array | None]] = {"conv.{i}": conv("conv_{i}"), "linear.{i}": linear("linear_{i}")}


IMPORTS = {
    "from_state_dict": from_state_dict,
    "from_state_dict and to_flax": lambda state: to_flax(from_state_dict(state), target(), NAMES),
}
SOURCES = ("mapping", "file")


def measured(what: str, source: str, path: str) -> dict[str, float]:
    """Seconds that an import takes in this process, and the most memory held, as a share of the state dict's size."""
    jnp.zeros(1).block_until_ready()
    before = _memory("VmRSS")
    state = state_dict() if source == "mapping" else path
    start = time.perf_counter()
    jax.block_until_ready(IMPORTS[what](state))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "memory": (_memory("VmHWM") - before) / SIZE}


def in_its_own_process(what: str, source: str, path: str) -> dict[str, float]:
    """The result of `measured` in a new process."""
    command = [sys.executable, "-m", "tests.torch.import_cost", what, source, str(path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    return json.loads(found.stdout)


def _memory(field: str) -> int:
    """A line of Linux's account of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        safetensors.numpy.save_file(state_dict(), path)
        print(f"{SIZE / 4e6:.1f} million parameters, {SIZE / 1e6:.0f} MB")
        for what, source in itertools.product(IMPORTS, SOURCES):
            found = in_its_own_process(what, source, path)
            print(f"{what} of a {source}: {found['seconds']:.2f} s, {found['memory']:.2f} times the size in memory")


if __name__ == "__main__":
    if arguments := sys.argv[1:]:
        print(json.dumps(measured(*arguments)))
    else:
        main()
