"""Kinds of files: what a file is that should hold arrays and is no `.safetensors` file.

People have weights in many formats, and an error page or the pointer of a large file in the place of some. This file
owns how these are told, by their first bytes or their names, and what to do with each.
"""

from __future__ import annotations

from pathlib import Path

_TENSORS = (
    "that can run code, so load it with torch.load(path, weights_only=True) and pass the dict of tensors that is in it"
)
_DOWNLOAD = "download the file itself"
_UNPACK = "unpack it first"

# The first bytes of a file, what it is, and what to do.
_STARTS: tuple[tuple[bytes, str, str], ...] = (
    (b"\x93NUMPY", "an array of NumPy (.npy)", "load it with np.load, and pass a dict from names to arrays"),
    *((bytes((0x80, version)), "a pickle of PyTorch", _TENSORS) for version in (2, 3, 4, 5)),  # before PyTorch 1.6
    (b"GGUF", "a GGUF file of llama.cpp", "its arrays are quantized; take the checkpoint that it was made from"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as of Keras", "read it with h5py, and pass a dict from names to arrays"),
    (b"\x1f\x8b", "a gzip archive", _UNPACK),
    (b"BZh", "a bzip2 archive", _UNPACK),
    (b"\xfd7zXZ\x00", "an xz archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"version https://git-lfs", "a pointer of Git LFS, and not the file", f"run git lfs pull, or {_DOWNLOAD}"),
    (b"RIFF", "a sound or a picture (RIFF)", "pass a file of weights"),
    (b"\x89PNG", "a picture (PNG)", "pass a file of weights"),
    (b"%PDF", "a document (PDF)", "pass a file of weights"),
)
_ZIP = b"PK\x03\x04"
_IN_TAR = 257  # where a tar archive says that it is one


def described(path: Path) -> str:
    """The kind of a file with what to do with it, as the end of a sentence; or nothing, where it is not known."""
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return "it is empty: the download or the copy of it failed"
    if start[4:9] == b"\0\0\0\0{":  # the length of a header may be the first bytes of anything
        return ""
    if start.startswith(_ZIP):
        return _of_zip(path, start)
    for beginning, kind, remedy in _STARTS:
        if start.startswith(beginning):
            return f"it is {kind}; {remedy}"
    if start[_IN_TAR:].startswith(b"ustar"):
        return f"it is a tar archive; {_UNPACK}"
    return _of_text(path, start)


def _of_zip(path: Path, start: bytes) -> str:
    """Of a zip archive: the name of its first entry tells what it is the archive of."""
    length = int.from_bytes(start[26:28], "little")
    name = start[30 : 30 + length]
    if name.endswith(b".npy"):
        return "it is an .npz archive of NumPy; pass what np.load(path) returns"
    if name.endswith((b"config.json", b"metadata.json", b".h5")):
        return "it is a .keras archive; load it with Keras, and pass a dict from names to arrays"
    if path.suffix == ".zip":
        return f"it is a zip archive; {_UNPACK}"
    return f"it is a pickle of PyTorch; {_TENSORS}"


def _of_text(path: Path, start: bytes) -> str:
    """Of text: a page of the web, or JSON, which may be the index of a checkpoint in parts."""
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text[:9].lower().startswith((b"<!doctype", b"<html")):
        return f"it is a page of the web (HTML), such as a login or an error; {_DOWNLOAD}"
    if text.startswith(b"<?xml"):
        return f"it is XML, such as an error of a server; {_DOWNLOAD}"
    if text.startswith((b"{", b"[")):
        if path.name.endswith(".index.json") or b"weight_map" in start:
            return (
                "it is the index of a checkpoint in parts (shards); wn_jax.torch.from_state_dict reads it with all of "
                "its parts"
            )
        return "it is JSON, such as a config; pass the file with the weights"
    if path.suffix in (".msgpack", ".flax"):
        return "it is a msgpack file of Flax; read it with flax.serialization.msgpack_restore"
    return ""
