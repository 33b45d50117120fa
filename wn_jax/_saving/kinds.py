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
_PICKLE = "reading it can run code, so do that only where you trust it, and pass a dict from names to arrays"

# The first bytes of a file, what it is, and what to do.
_STARTS: tuple[tuple[bytes, str, str], ...] = (
    (b"\x93NUMPY", "an array of NumPy (.npy)", "load it with np.load, and pass a dict from names to arrays"),
    (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "a pickle of PyTorch", _TENSORS),  # before PyTorch 1.6
    *((bytes((0x80, version)), "a pickle of Python", _PICKLE) for version in (2, 3, 4, 5)),
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
_PAGES = (b"<!", b"<html", b"<head", b"<body")
_ZIP = b"PK\x03\x04"
_IN_TAR = 257  # where a tar archive says that it is one
_ENOUGH = 2**16  # bytes in which an index comes to its map, after what is said about it


def described(path: Path) -> str:
    """The kind of a file with what to do with it, as the end of a sentence; or nothing, where it is not known."""
    start = _start(path)
    if not start:
        return "it is empty: the download or the copy of it failed"
    if _has_header(start):
        return ""
    if start.startswith(_ZIP):
        return _of_zip(path, start)
    for beginning, kind, remedy in _STARTS:
        if start.startswith(beginning):
            return f"it is {kind}; {remedy}"
    if start[_IN_TAR:].startswith(b"ustar"):
        return f"it is a tar archive; {_UNPACK}"
    return _of_text(path, start)


def is_index(path: Path) -> bool:
    """Whether a file is the index of a checkpoint in parts, by its name or, under any other, by what is in it."""
    if path.name.endswith(".index.json"):
        return True
    start = _start(path)
    return not _has_header(start) and _text(start).startswith(b"{") and b'"weight_map"' in start


def _start(path: Path) -> bytes:
    """The first bytes of a file."""
    with path.open("rb") as file:
        return file.read(_ENOUGH)


def _has_header(start: bytes) -> bool:
    """Whether these are the first bytes of a safetensors file. Its header's length may be those of anything."""
    return start[4:9] == b"\0\0\0\0{"


def _text(start: bytes) -> bytes:
    """Text without what may stand before it."""
    return start.removeprefix(b"\xef\xbb\xbf").lstrip()


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
    """Of text: a page of the web; JSON, which may be the index of a checkpoint in parts; or a line from a server."""
    text = _text(start)
    if text[:5].lower().startswith(_PAGES):
        return f"it is a page of the web (HTML), such as a login or an error; {_DOWNLOAD}"
    if text.startswith(b"<?xml"):
        return f"it is XML, such as an error of a server; {_DOWNLOAD}"
    if text.startswith((b"{", b"[")):
        if is_index(path):
            return (
                "it is the index of a checkpoint in parts (shards); wn_jax.torch.from_state_dict reads it with all of "
                "its parts"
            )
        return "it is JSON, such as a config; pass the file with the weights"
    if path.suffix in (".msgpack", ".flax"):
        return "it is a msgpack file of Flax; read it with flax.serialization.msgpack_restore"
    if text.isascii() and (line := text[:40].decode().partition("\n")[0].strip()).isprintable():
        return f"it is text that begins {line!r}; {_DOWNLOAD} where that is an error of a server"
    return ""
