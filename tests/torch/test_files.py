"""Files that people have: checkpoints in parts, folders, and files of other kinds, which errors name."""

import gzip
import io
import json
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from flax import serialization

import wn_jax as wn
from wn_jax.torch import Array, from_state_dict, to_flax, to_state_dict

STATE = {
    "up.weight_g": np.arange(1, 7, dtype=np.float32).reshape(6, 1, 1),
    "up.weight_v": np.ones((6, 4, 3), np.float32),
    "up.bias": np.zeros(6, np.float32),
}
PARTS = {
    "model-00001-of-00002.safetensors": ["up.weight_g", "up.bias"],
    "model-00002-of-00002.safetensors": ["up.weight_v"],
}


@pytest.fixture
def folder(tmp_path):
    """A checkpoint in two parts, a weight's halves in one each."""
    for part, names in PARTS.items():
        safetensors.numpy.save_file({name: STATE[name] for name in names}, tmp_path / part)
    write_index(tmp_path, {name: part for part, names in PARTS.items() for name in names})
    return tmp_path


def write_index(folder, weight_map):
    text = json.dumps({"metadata": {"total_size": 336}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def check_is_state(tree):
    assert tree["up"]["weight"].axes == (-2, -1)
    again = to_state_dict(tree, "old")
    assert again.keys() == STATE.keys()
    assert all(np.array_equal(again[name], value) for name, value in STATE.items())


def test_a_checkpoint_in_parts(folder):
    check_is_state(from_state_dict(folder / "model.safetensors.index.json"))
    check_is_state(from_state_dict(folder))
    check_is_state(from_state_dict(str(folder)))


def test_an_index_with_a_byte_order_mark(folder):
    index = folder / "model.safetensors.index.json"
    index.write_bytes(b"\xef\xbb\xbf" + index.read_bytes())
    check_is_state(from_state_dict(index))


@pytest.mark.parametrize(
    "name", ["model.safetensors.index.fp16.json", "renamed.json", "5f70bf18a086007016e948b04aed3b82"]
)
def test_an_index_of_another_name(folder, name):
    """As diffusers name that of a variant, people copy it, and the cache of Hugging Face keeps it."""
    index = (folder / "model.safetensors.index.json").rename(folder / name)
    index.write_text(index.read_text().replace("336", "336" + " " * 2000))
    check_is_state(from_state_dict(index))


def test_a_folder_with_the_index_of_a_variant(folder):
    (folder / "model.safetensors.index.json").rename(folder / "model.safetensors.index.fp16.json")
    check_is_state(from_state_dict(folder))


def test_hidden_files_are_no_checkpoints(folder):
    (folder / "._model.safetensors.index.json").write_bytes(b"\0\5\x16\7")  # as macOS leaves beside copies
    check_is_state(from_state_dict(folder))


def test_a_folder_with_one_file(tmp_path):
    safetensors.numpy.save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    check_is_state(from_state_dict(tmp_path))
    safetensors.numpy.save_file(STATE, tmp_path / "other.safetensors")
    with pytest.raises(IsADirectoryError, match=r"several checkpoints in it; name one: 'model.safetensors', 'oth"):
        from_state_dict(tmp_path)


def test_a_folder_without_one(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"is a folder without a .safetensors file in it; name the file$"):
        from_state_dict(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(IsADirectoryError, match=r"'pytorch_model.bin' are pickles: load them with torch.load"):
        from_state_dict(tmp_path)


def test_a_missing_part(folder):
    os.remove(folder / "model-00002-of-00002.safetensors")
    with pytest.raises(FileNotFoundError, match=r"model-00002-.* is missing: .* is the index of a checkpoint in parts"):
        from_state_dict(folder)


def test_a_part_that_was_cut_off(folder):
    part = folder / "model-00002-of-00002.safetensors"
    part.write_bytes(part.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors: not a complete safetensors file"):
        from_state_dict(folder)


def test_parts_that_hold_more_or_less_than_the_index_says(folder):
    part = folder / "model-00002-of-00002.safetensors"
    safetensors.numpy.save_file({"up.weight_v": STATE["up.weight_v"], "extra": np.ones(1)}, part)
    with pytest.raises(ValueError, match=r"'extra' is in the part only. Are they of one download"):
        from_state_dict(folder)
    safetensors.numpy.save_file({"other": np.ones(1)}, part)
    with pytest.raises(ValueError, match="'other' is in the part only"):
        from_state_dict(folder)
    safetensors.numpy.save_file({}, part)
    with pytest.raises(ValueError, match=r"'up.weight_v' is in the index only"):
        from_state_dict(folder)


@pytest.mark.parametrize(
    "part",
    ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", "a\x00b", "C:\\x\\..\\y/z", "x" * 5000],
)
def test_a_part_outside_of_the_folder_is_refused(folder, part):
    write_index(folder, {"up.bias": part})
    with pytest.raises(ValueError, match="names a part that is not beside it") as caught:
        from_state_dict(folder)
    assert len(str(caught.value)) < 600


def test_the_name_of_a_missing_part_can_be_printed(folder):
    write_index(folder, {"up.bias": "\ud800"})
    with pytest.raises(FileNotFoundError, match="is missing: ") as caught:
        from_state_dict(folder)
    str(caught.value).encode("utf-8")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "broken: Expecting value"),
        (b"{", "broken: Expecting"),
        (b"\xff\xfe{}", "broken: .*utf-8"),
        (b"[" * 100_000, "broken: it is nested too deep"),
        (b'{"weight_map": ' + b"[" * 100_000, "broken: it is nested too deep"),
        (b"[]", "it has no 'weight_map'"),
        (b"{}", "it has no 'weight_map'"),
        (b'{"weight_map": {}}', "it has no 'weight_map'"),
        (b'{"weight_map": {"a": 3}}', "it has no 'weight_map' from arrays to files"),
        (
            b'{"weight_map": {"a": "pytorch_model-1-of-2.bin"}}',
            "index of parts that are pickles of .*torch.load",
        ),
        (b'{"total": ' + b"9" * 5000 + b"}", "broken: .*digits"),
    ],
)
def test_an_index_that_is_none(tmp_path, content, message):
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        from_state_dict(index)
    assert len(str(caught.value)) < 600


def npz():
    file = io.BytesIO()
    np.savez(file, **STATE)
    return file.getvalue()


def npy():
    file = io.BytesIO()
    np.save(file, STATE["up.bias"])
    return file.getvalue()


def tar():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.safetensors"))
    return file.getvalue()


def archive(name):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr(name, "x")
    return file.getvalue()


KINDS = [
    ("weights.npz", npz, r"an .npz archive of NumPy; pass what np.load\(path\) returns"),
    ("weights.npy", npy, r"an array of NumPy \(.npy\); load it with np.load"),
    ("model.pt", lambda: archive("model/data.pkl"), r"a pickle of PyTorch; .*torch.load\(path, weights_only=True\)"),
    ("model.pth", lambda: b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "a pickle of PyTorch; "),  # before 1.6
    (
        "params.pkl",
        lambda: pickle.dumps(STATE),
        "a pickle of Python; reading it can run code",
    ),  # as people keep Haiku's
    ("model.keras", lambda: archive("metadata.json"), "a .keras archive; load it with Keras"),
    ("model.zip", lambda: archive("model.safetensors"), "a zip archive; unpack it first"),
    ("model.gguf", lambda: b"GGUF\x03\0\0\0", "a GGUF file"),
    ("model.h5", lambda: b"\x89HDF\r\n\x1a\n" + bytes(8), "an HDF5 file, as of Keras; read it with h5py"),
    ("model.safetensors.gz", lambda: gzip.compress(b"x"), "a gzip archive; unpack it first"),
    ("model.tar", tar, "a tar archive; unpack it first"),
    ("page.safetensors", lambda: b"\n<!DOCTYPE html><html>", r"a page of the web \(HTML\).*download the file itself"),
    ("page.safetensors", lambda: b"<!-- saved --><head>", r"a page of the web \(HTML\)"),
    ("error.safetensors", lambda: b"Entry not found", "text that begins 'Entry not found'; download the file itself"),
    ("error.safetensors", lambda: b"<?xml version='1.0'?><Error>", "XML, such as an error of a server"),
    (
        "model.safetensors",
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n",
        "a pointer of Git LFS, and not the file; run git lfs pull",
    ),
    ("config.json", lambda: b'{"model_type": "vits"}', "JSON, such as a config; pass the file with the weights"),
    ("model.safetensors", lambda: b"", "it is empty: the download or the copy of it failed"),
    ("model.msgpack", lambda: serialization.to_bytes({"a": np.ones(3)}), "a msgpack file of Flax; read it with flax"),
]


@pytest.mark.parametrize("read", [from_state_dict, wn.load])
@pytest.mark.parametrize(
    ("name", "content", "message"), KINDS, ids=[f"{name} {i}" for i, (name, _, _) in enumerate(KINDS)]
)
def test_a_file_of_another_kind_is_named(tmp_path, read, name, content, message):
    path = tmp_path / name
    path.write_bytes(content())
    with pytest.raises(ValueError, match=f"not a complete safetensors file.*{message}"):
        read(path)


def test_load_leads_from_an_index_to_the_function_that_reads_it(folder):
    with pytest.raises(ValueError, match=r"index of a checkpoint in parts \(shards\); wn_jax.torch.from_state_dict"):
        wn.load(folder / "model.safetensors.index.json")


def test_a_tree_in_another_byte_order():
    torch = pytest.importorskip("torch")
    lstm_biases = {f"bias_{side}": np.arange(4, dtype=">f4") for side in ("ih", "hh")}
    tree = {"up": {"weight": wn.WeightNorm(np.full((2, 1), 3, ">f4"), np.ones((2, 3), ">f4"), (-1,))}, **lstm_biases}
    state = {name: torch.from_numpy(value).tolist() for name, value in to_state_dict(tree, "old").items()}
    assert state["up.weight_g"] == [[3.0], [3.0]]
    assert state["bias_ih"] == [0.0, 1.0, 2.0, 3.0]
    names = {name: Array("bias", add=True) for name in lstm_biases}
    params = to_flax(lstm_biases, {"bias": np.zeros(4, np.float32)}, names)
    assert params["bias"].tolist() == [0.0, 2.0, 4.0, 6.0]


def test_arrays_in_another_byte_order():
    state = {name: value.astype(value.dtype.newbyteorder(">")) for name, value in STATE.items()}
    tree = from_state_dict(state)
    check_is_state(tree)
    np.testing.assert_allclose(wn.reconstruct(tree)["up"]["weight"][3], 4 / np.sqrt(12), rtol=1e-6)
