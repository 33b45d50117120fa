"""`save` and `load` with bad input: files that do not fit, are broken or half-written; trees that cannot be saved."""

import json
import os
import re
import signal
import subprocess
import sys
from collections import OrderedDict

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
        ({"version": 3}, "of format 3; this wn_jax reads 1 and 2: install a newer one"),
        ({"version": 2}, "'others' is None, and not an object"),
        ({"version": None}, "of format None; this wn_jax reads 1 and 2$"),
        ({"nodes": {"w": [-7]}}, "axis -7 is out of range"),
        ({"nodes": {"w": [1]}}, r"'w' has axes \(1,\) and a v of shape \(2, 3\)"),
        ({"nodes": {"w": [-1]}}, r"'w' has a g of shape \(1, 3\), a v of shape \(2, 3\) and axes \(-1,\)"),
        ({"nodes": {"w": ["a"]}}, r"'nodes' has \['a'\] for 'w', and not a list of axes"),
        ({"nodes": {"w": [True]}}, r"'nodes' has \[True\] for 'w'"),
        ({"nodes": {"w": [float("nan")]}}, r"'nodes' has \[nan\] for 'w'"),
        ({"nodes": {"w": [-(10**4000)]}}, r"axis -10+\.* is out|axis -10+ "),
        ({"nodes": {"w": 5}}, "'nodes' has 5 for 'w', and not a list of axes"),
        ({"nodes": ["w"]}, r"'nodes' is \['w'\], and not an object"),
        ({"nodes": {}}, "names do not fit the arrays"),
        ({"nodes": {"w": [-2], "b": [-1]}}, r"names do not fit the arrays: \['b', 'b/g', 'b/v'\]"),
        ({"nodes": {"w": [-2], "x": [-1]}}, "names do not fit the arrays"),
        ({"paths": None}, "'paths' is None, and not an object"),
        ({"paths": {"w": ["w"], "b": "b"}}, "'paths' has 'b' for 'b', and not a list of strings"),
        ({"paths": {"w": ["w"], "b": [["b"]]}}, r"'paths' has \[\['b'\]\] for 'b'"),
        ({"paths": {"w": ["w"], "b": ["c"]}}, r"the keys of 'b' are \['c'\]"),
        ({"paths": {"w": ["w"]}}, r"names do not fit the arrays: \['b'\]"),
        ({"numbers": {"n": 3}}, "names do not fit"),
        ({"numbers": {"b": 3}}, "names do not fit"),
        ({"numbers": [3]}, "'numbers' is"),
        ({"keys": {"b": "fry"}}, "damaged"),
        ({"keys": {"b": ["fry"]}}, r"'keys' has \['fry'\] for 'b', and not a string"),
        ({"keys": {"w/v": "fry"}}, "names do not fit"),
        ({"version": True}, "of format True"),
        ({"version": 1.0}, "of format 1.0"),
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


def crafted(path, change):
    """A file of `save` whose metadata were changed: by a function of what they say, or put as another text."""
    wn.save(path, {"a": {"b": jnp.ones(3)}, "n": 3})
    with safetensors.safe_open(path, framework="numpy") as file:
        facts = json.loads(file.metadata()["wn_jax"])
    text = change(facts)
    arrays = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(arrays, path, {"wn_jax": text if isinstance(text, str) else json.dumps(facts)})


def number(keys, value=1):
    """A change that adds a number under these keys."""

    def change(facts):
        facts["paths"]["/".join(keys)] = keys
        facts["numbers"]["/".join(keys)] = value

    return change


DEEP = ["x"] * 5000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (number(["n", "x"]), "the leaf 'n/x' lies inside another leaf"),
        (number(["a", "b", "c"]), "the leaf 'a/b/c' lies inside another leaf"),
        (number(["a"]), "other leaves lie inside the leaf 'a'"),
        (number([]), "other leaves lie inside the leaf ''"),
        (number(DEEP), "x' is nested too deep"),
        (number(["n"], [1, {"x": "y"}]), r"'numbers' has \[1, {'x': 'y'}\] for 'n', and not a number"),
        (number(["n"], {}), r"'numbers' has {} for 'n', and not a number"),
        (number(["n"], "3"), "'numbers' has '3' for 'n', and not a number"),
        (number(["n"], None), "'numbers' has None for 'n', and not a number"),
        (lambda facts: json.dumps(facts).replace(" 3", " 3" + "0" * 5000), "damaged: .*5001 digits"),
        (lambda facts: json.dumps(facts)[:-1] + ', "paths": {}}', "'paths' stands in it twice"),
        (lambda facts: json.dumps(facts).replace('"n": 3', '"n": 3, "n": 4'), "'n' stands in it twice"),
        (lambda facts: facts.pop("keys") and None, "'keys' is None"),
        (lambda _: "[" * 200_000, "nested too deep"),
        (lambda _: '{"version": ' + '{"a": ' * 200_000, "nested too deep"),
        (lambda _: "[1]", r"it is \[1\], and not an object"),
        (lambda _: "{", "damaged: Expecting"),
        (lambda _: "", "damaged: Expecting"),
        (lambda _: "NaN", "it is nan, and not an object"),
    ],
)
def test_crafted_metadata(path, change, message):
    """No leaf is lost without a word, whatever a file says."""
    crafted(path, change)
    for target in (None, {"a": {"b": jnp.ones(3)}, "n": 3}):
        with pytest.raises(ValueError, match=f"its metadata is damaged.*|.*{message}") as caught:
            wn.load(path, target)
        text = str(caught.value)
        assert re.search(message, text)
        assert text.startswith(str(path))
        assert len(text) < 1000


def test_an_array_of_a_dtype_that_numpy_has_not(path):
    header = {"__metadata__": {"wn_jax": "{}"}, "a": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(2))
    with pytest.raises(ValueError, match="'a' is F8_E8M0, which its reader for NumPy does not know"):
        wn.load(path)


@pytest.mark.parametrize(
    ("saved", "held"),
    [(0.5, jnp.int32(0)), (10**30, jnp.int32(0)), (2**31, np.int32(0)), (-1, np.uint8(0)), (3, jnp.bool_(0))],
)
def test_a_number_that_the_target_s_array_cannot_hold(path, saved, held):
    wn.save(path, {"w": node(), "n": saved})
    with pytest.raises(ValueError, match=r"'n' is .* in the file, which .*\[\] of the target cannot hold"):
        wn.load(path, {"w": node(), "n": held})
    with pytest.raises(ValueError, match=r"'n' is a number in the file and key<fry>\[\] in the target"):
        wn.load(path, {"w": node(), "n": jax.random.key(0)})


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
        (OrderedDict([(1, jnp.ones(1)), ("1", {"b": jnp.ones(1)})]), "the leaf '1/b' lies inside another leaf"),
        ({"w": node(), "n": 10**5000}, "'n' is an int that no file can hold"),
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
        while not list(path.parent.glob(f".{path.name}.*/file")):
            pass
        writer.send_signal(signal.SIGKILL)
    last = [1, *map(int, writer.communicate()[0].split())][-1]
    assert writer.returncode == -signal.SIGKILL
    w = wn.load(path)["w"]
    number = int(w.g[0, 0])
    assert number in ({"after the rename": (2,), "while it is written": (last, last + 1)}.get(moment, (1,)))
    assert bool((w.g == number).all())
    assert bool((w.v == number).all())
    wn.save(path, {"w": node()})
    assert wn.load(path)["w"].v.shape == (2, 3)
    assert os.listdir(path.parent) == [path.name]  # what the killed one left is gone
