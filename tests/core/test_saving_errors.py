"""`save` and `load` with bad input: files that do not fit, are broken or half-written; trees that cannot be saved."""

import json
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx

import wn_jax as wn


@pytest.fixture
def path(tmp_path):
    return tmp_path / "params.safetensors"


def node(rows=2, axes=-2):
    return wn.WeightNorm.from_weight(jnp.arange(1.0, 1 + 3 * rows).reshape(rows, 3), axes)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            {"w": node(axes=-1), "b": jnp.ones(3)},
            r"node 'w' reduces over axes \(-2,\) in the file and \(-1,\) in the target",
        ),
        (
            {"w": node(4), "b": jnp.ones(3)},
            r"'w/v' is float32\[2, 3\] in the file and float32\[4, 3\] in",
        ),
        (
            {"w": jnp.ones((2, 3)), "b": jnp.ones(3)},
            r"'w' is a node in the file and a plain weight in the target \(repar",
        ),
        (
            {"w": node(), "b": node()},
            r"'b' is a plain weight in the file and a node in the target \(load into the plain",
        ),
        ({"w": node()}, "'b' is in the file, but not in the target"),
        ({"w": node(), "b": jnp.ones(3), "c": jnp.ones(3)}, "'c' is in the target, but not in the file"),
        (
            {"w": node(), "b": jnp.ones(3, jnp.bfloat16)},
            r"'b' is float32\[3\] in the file and bfloat16\[3\] in the target",
        ),
        (
            {"w": node(), "b": jax.random.key(0)},
            r"'b' is float32\[3\] in the file and key<fry>\[\]",
        ),
        ({"w": node(), "b": 3.0}, r"'b' is float32\[3\] in the file and a number in the target"),
        ({"w": {"g": node().g, "v": node().v}, "b": jnp.ones(3)}, "'w/g' is in the target, but not in the file"),
    ],
)
def test_a_file_that_does_not_fit_the_target(path, target, message):
    wn.save(path, {"w": node(), "b": jnp.ones(3)})
    with pytest.raises(ValueError, match=message) as caught:
        wn.load(path, target)
    assert str(path) in str(caught.value)


def test_many_problems_are_counted(path):
    wn.save(path, {"w": node()})
    with pytest.raises(ValueError, match="; and 1 more"):
        wn.load(path, {f"w{i}": node() for i in range(5)})


def test_files_that_are_broken_or_of_others(path):
    wn.save(path, {"w": node(100)})
    whole = path.read_bytes()
    for size in (0, 4, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            wn.load(path)
    safetensors.numpy.save_file({"a": np.ones(3)}, path)
    with pytest.raises(ValueError, match=r"not one that wn_jax.save wrote.*safetensors.numpy.load_file"):
        wn.load(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        wn.load(path.with_name("nowhere"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "of format 2; this wn_jax reads 1"),
        ({"version": None}, "of format None"),
        ({"nodes": {"w": [-7]}}, "axis -7 is out of range"),
        ({"nodes": {"w": [1]}}, r"'w' has axes \(1,\) and a v of shape \(2, 3\)"),
        ({"nodes": {"w": [-1]}}, r"'w' has a g of shape \(1, 3\), a v of shape \(2, 3\) and axes \(-1,\)"),
        ({"nodes": {"w": ["a"]}}, "axes must be an int"),
        ({"nodes": {"w": 5}}, "TypeError"),
        ({"nodes": ["w"]}, "AttributeError"),
        ({"nodes": {}}, "names do not fit the arrays"),
        ({"paths": None}, "TypeError"),
        ({"paths": {"w": ["w"], "b": ["c"]}}, r"the keys of 'b' are \['c'\]"),
        ({"paths": {"w": ["w"]}}, r"names do not fit the arrays: \['b'\]"),
        ({"numbers": {"n": 3}}, "names do not fit"),
        ({"keys": {"b": "fry"}}, "damaged"),
    ],
)
def test_metadata_that_was_changed(path, change, message):
    wn.save(path, {"w": node(), "b": jnp.ones(3)})
    with safetensors.safe_open(path, framework="numpy") as file:
        facts = json.loads(file.metadata()["wn_jax"])
    arrays = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(arrays, path, {"wn_jax": json.dumps({**facts, **change})})
    with pytest.raises(ValueError, match=message) as caught:
        wn.load(path)
    assert str(path) in str(caught.value)
    safetensors.numpy.save_file(arrays, path, {"wn_jax": "{"})
    with pytest.raises(ValueError, match="metadata is damaged"):
        wn.load(path)


def test_trees_that_cannot_be_saved(path):
    wn.save(path, {"w": node()})
    before = path.read_bytes()
    for tree, message in (
        ({}, "no arrays"),
        ({"f": jnp.tanh, "n": 3.0}, "no arrays"),
        ({"__metadata__": jnp.ones(1)}, "a word of the format"),
        ({"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)}, "two leaves have the path 'a/b'"),
        (jax.eval_shape(lambda: {"w": jnp.ones(3)}), "'w' is abstract"),
        ({"w": wn.labels({"w": node()})["w"]}, "'w' is a node that holds no arrays"),
        ({"w": jnp.ones(3, jnp.float8_e5m2)}, "'w' is float8_e5m2; a file can hold .*bfloat16"),
        ({"w": nnx.Variable((jnp.ones(3),))}, "'w' is a Variable around a tuple"),
    ):
        with pytest.raises(ValueError, match=message):
            wn.save(path, tree)
    with pytest.raises(TypeError, match=r"save\(path, params\)"):
        wn.save({"w": node()}, path)
    with pytest.raises(ValueError, match="abstract"):
        jax.jit(lambda tree: wn.save(path, tree))({"w": node()})
    with pytest.raises(FileNotFoundError, match=r"no folder .*missing; make it first"):
        wn.save(path.parent / "missing" / "params.safetensors", {"w": node()})
    with pytest.raises(IsADirectoryError, match="is a folder; name a file in it"):
        wn.save(path.parent, {"w": node()})
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_write_that_fails_leaves_the_old_file(path, monkeypatch):
    wn.save(path, {"w": node()})
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        wn.save(path, {"w": node(50)})
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


WRITER = """
import os, signal, sys
import jax.numpy as jnp
import wn_jax as wn

path, moment = sys.argv[1:]

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def save(i):
    v = jnp.full((2000, 2000), i, jnp.float32)
    wn.save(path, {"w": wn.WeightNorm(jnp.full((1, 2000), i, jnp.float32), v, (-2,))})
    print(i, flush=True)

save(1)
replace = os.replace
if moment == "before it is flushed":
    os.fsync = die
elif moment == "before the rename":
    os.replace = die
elif moment == "after the rename":
    os.replace = lambda *names: die(replace(*names))
for i in range(2, 1000):
    save(i)
"""


@pytest.mark.parametrize(
    "moment", ["before it is flushed", "before the rename", "after the rename", "while it is written"]
)
def test_a_process_that_is_killed_leaves_the_old_file_or_the_new_one(path, moment):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path), moment], stdout=subprocess.PIPE)
    assert writer.stdout.readline() == b"1\n"
    if moment == "while it is written":  # 16 MB, a few milliseconds
        while not list(path.parent.glob(f".{path.name}.*")):
            pass
        writer.send_signal(signal.SIGKILL)
    last = [1, *map(int, writer.communicate()[0].split())][-1]
    assert writer.returncode == -signal.SIGKILL
    w = wn.load(path)["w"]
    number = int(w.g[0, 0])
    assert number in ({"after the rename": (2,), "while it is written": (last, last + 1)}.get(moment, (1,)))
    assert bool((w.g == number).all())
    assert bool((w.v == number).all())
    wn.save(path, {"w": node()})  # what the killed one left is in nobody's way
    assert wn.load(path)["w"].v.shape == (2, 3)
