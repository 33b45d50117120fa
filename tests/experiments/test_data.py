"""Data sets: formats read byte by byte, every damaged or missing file told, and cut to the examples asked for."""

import dataclasses
import functools
import gzip
import hashlib
import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import experiments.data as data
from experiments.data import cifar10, mnist
from experiments.data.load import _prepared, _raw
from experiments.data.source import Download, File
from experiments.errors import ConfigError
from tests.experiments.data_sets import Config, own_folders  # noqa: F401

REAL = os.environ.get("WN_JAX_DATA")
RECORDS = 5


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def tiny_mnist() -> dict[str, bytes]:
    random = np.random.default_rng(0)
    return {
        f"{split}-{kind}": idx(random.integers(0, top, (examples, *shape)))
        for split, examples in (("train", 6), ("t10k", 4))
        for kind, top, shape in (("images-idx3-ubyte", 256, (28, 28)), ("labels-idx1-ubyte", 10, ()))
    }


def tiny_cifar10() -> dict[str, bytes]:
    random = np.random.default_rng(1)
    names = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
    tables = {name: random.integers(0, 256, (RECORDS, 3073), np.uint8) for name in names}
    for table in tables.values():
        table[:, 0] %= 10
    return {name: table.tobytes() for name, table in tables.items()}


TINY = {"mnist": tiny_mnist(), "cifar10": tiny_cifar10()}


@pytest.fixture
def provide(tmp_path, monkeypatch):
    """Write files of a set below a folder, and let these be, unless `whole` is, what its checksums are of."""

    def write(name: str, contents: dict[str, bytes], whole: dict[str, bytes] | None = None) -> Path:
        files = (
            File(file, len(content), hashlib.md5(content).hexdigest()) for file, content in (whole or contents).items()
        )
        source = dataclasses.replace(data.SOURCES[name], downloads=(Download((), "", tuple(files)),))
        if name == "cifar10":
            source = dataclasses.replace(source, read=functools.partial(cifar10.read, records=RECORDS))
        monkeypatch.setitem(data.SOURCES, name, source)
        folder = tmp_path / "data" / source.folder
        folder.mkdir(parents=True)
        for file, content in contents.items():
            (folder / file).write_bytes(content)
        return folder

    return write


def load(name: str, folder: Path, **options) -> data.Dataset:
    return data.load(Config(name, dir=str(folder), **options))


def test_a_cifar10_record_by_hand(provide):
    pixels = np.zeros((3, 32, 32), np.uint8)
    pixels[0, 1, 2], pixels[1, 1, 2], pixels[2, 31, 0] = 255, 128, 1  # channel, row, column
    records = bytes([7]) + pixels.tobytes() + TINY["cifar10"]["data_batch_1.bin"][3073:]
    dataset = load("cifar10", provide("cifar10", TINY["cifar10"] | {"data_batch_1.bin": records}))
    image, zero = dataset.train["x"][0], -127.5 / 128
    assert dataset.train["y"][0] == 7
    assert image[1, 2].tolist() == [127.5 / 128, 0.5 / 128, zero]
    assert image[31, 0].tolist() == [zero, zero, -126.5 / 128]
    assert (image == zero).sum() == 32 * 32 * 3 - 3


def test_cifar10_is_its_files_in_order(provide):
    dataset = load("cifar10", provide("cifar10", TINY["cifar10"]).parent)
    assert dataset.train["x"].shape == (25, 32, 32, 3)
    assert dataset.held_out["x"].shape == (5, 32, 32, 3)
    labels = [content[::3073] for name, content in TINY["cifar10"].items()]
    assert dataset.train["y"].tolist() == list(b"".join(labels[:5]))
    assert dataset.held_out["y"].tolist() == list(labels[5])
    for part in (dataset.train, dataset.held_out):
        assert (part["x"].dtype, part["y"].dtype) == (np.float32, np.int32)


def test_mnist_is_its_bytes_over_255(provide):
    dataset = load("mnist", provide("mnist", TINY["mnist"]))
    for part, split in ((dataset.train, "train"), (dataset.held_out, "t10k")):
        pixels, labels = (TINY["mnist"][f"{split}-{kind}"] for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
        assert (part["x"].dtype, part["y"].dtype) == (np.float32, np.int32)
        assert part["x"].shape == (len(labels) - 8, 28, 28, 1)
        np.testing.assert_array_equal(part["x"].ravel(), np.array(list(pixels[16:]), np.float32) / np.float32(255))
        assert part["y"].tolist() == list(labels[8:])
    assert (dataset.classes, dataset.held_out_name) == (10, "test")


@pytest.mark.parametrize("name", TINY)
def test_gzipped_files_are_the_plain_ones(name, provide):
    """A client that unpacks what it downloads keeps the name: what is gzipped shows in the bytes."""
    folder = provide(name, TINY[name])
    plain = load(name, folder)
    first, *others = sorted(folder.iterdir())
    first.rename(f"{first}.gz")
    for path in others:
        Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    _raw.cache_clear()
    _prepared.cache_clear()
    again = load(name, folder)
    assert again.train["x"] is not plain.train["x"]
    for key in ("x", "y"):
        np.testing.assert_array_equal(again.train[key], plain.train[key])
        np.testing.assert_array_equal(again.held_out[key], plain.held_out[key])


@pytest.mark.parametrize("name", ["train-labels-idx1-ubyte", "train-images-idx3-ubyte.gz"])
def test_a_gzip_bomb_unpacks_no_further_than_the_largest_file(name, provide):
    """Whatever the file is called: 64 MB of zeros in 64 kB."""
    folder = provide("mnist", TINY["mnist"])
    (folder / name.removesuffix(".gz")).unlink()
    (folder / name).write_bytes(gzip.compress(bytes(2**26), 1))
    tracemalloc.start()
    with pytest.raises(ConfigError) as caught:
        load("mnist", folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"{folder / name}: unpacks to more than 1,053,296 bytes, which no file of mnist does" in str(caught.value)
    assert "run `python -m experiments fetch mnist`" in str(caught.value)
    assert peak < 2**23


def test_a_plain_file_that_is_far_too_large(provide):
    folder = provide("mnist", TINY["mnist"])
    with (folder / "train-labels-idx1-ubyte").open("ab") as file:
        file.truncate(2**40)  # without a block on the disk
    with pytest.raises(ConfigError, match="train-labels-idx1-ubyte: holds more than 1,053,296 bytes, which no file of"):
        load("mnist", folder)


IMAGES, LABELS = TINY["mnist"]["train-images-idx3-ubyte"], TINY["mnist"]["train-labels-idx1-ubyte"]
RECORD = TINY["cifar10"]["data_batch_2.bin"]

# Files that are what their checksum says, and not what the format allows: the file, its bytes, and the error.
WRONG = {
    "labels for images": ("train-images-idx3-ubyte", LABELS, "has 1 dimensions (labels); expected 3 (images); are two"),
    "images for labels": ("train-labels-idx1-ubyte", IMAGES, "has 3 dimensions (images); expected 1 (labels); are two"),
    "no IDX": ("train-images-idx3-ubyte", b"<html>", "starts with bytes '3c 68 74 6d'; expected '00 00 08 03'"),
    "empty": ("t10k-labels-idx1-ubyte", b"", "is no IDX file: starts with bytes ''; expected '00 00 08 01'"),
    "floats": ("train-images-idx3-ubyte", b"\0\0\x0d" + IMAGES[3:], "IDX type 0x0d; expected type 0x08, unsigned"),
    "only a header": ("train-images-idx3-ubyte", IMAGES[:9], "ends in its header, after 9 bytes; expected a header of"),
    "too few values": ("train-images-idx3-ubyte", IMAGES[:-1], "holds 4,703 values; expected 6 x 28 x 28 = 4,704"),
    "too many values": ("train-images-idx3-ubyte", IMAGES + b"\0", "holds 4,705 values; expected 6 x 28 x 28 = 4,704"),
    "small images": ("train-images-idx3-ubyte", idx(np.zeros((6, 28, 27))), "of 28 x 27 pixels; expected 28 x 28"),
    "a label less": ("train-labels-idx1-ubyte", idx(np.zeros(5)), "holds 5 labels; expected 6, one for each image of"),
    "an eleventh digit": ("t10k-labels-idx1-ubyte", idx(np.full(4, 10)), "holds the label 10; expected labels 0 to 9"),
    "part of a record": (
        "data_batch_2.bin",
        RECORD[:-1],
        "holds 4 records and 3,072 bytes; expected 5 records of 3,073",
    ),
    "a record less": ("data_batch_2.bin", RECORD[3073:], "holds 4 records; expected 5 records"),
    "an eleventh class": ("test_batch.bin", b"\x0a" * 5 * 3073, "record 0 has the label 10; expected labels 0 to 9"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_the_format_does_not_allow(case, provide):
    file, content, message = WRONG[case]
    name = "mnist" if "idx" in file else "cifar10"
    folder = provide(name, TINY[name] | {file: content})
    with pytest.raises(ConfigError) as error:
        load(name, folder)
    assert str(error.value).startswith(f"{folder / file}: ")
    assert message in str(error.value)
    assert str(error.value).endswith(
        f"run `python -m experiments fetch {name}`, or set data.dir to a folder with a whole copy"
    )


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def gzipped(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


# Files that are not what their checksum says: the file, its bytes, and the error.
DAMAGED = {
    "truncated": ("data_batch_2.bin", RECORD[:-9], "and is truncated to 15,356 bytes; expected 15,365 bytes with md5 "),
    "too long": ("data_batch_2.bin", RECORD + b"\0", "and 15,366 bytes; expected 15,365 bytes with md5 "),
    "one bit": ("data_batch_2.bin", flipped(RECORD, 99), "and 15,365 bytes; expected 15,365 bytes with md5 "),
    "another file": ("data_batch_2.bin", TINY["cifar10"]["test_batch.bin"], "and is that of test_batch.bin; expected"),
    "swapped": ("train-images-idx3-ubyte", LABELS, "and is that of train-labels-idx1-ubyte; expected 4,720 bytes"),
    "truncated gzip": ("train-images-idx3-ubyte", gzipped(IMAGES)[:-99], "the gzip stream is truncated"),
    "damaged gzip": ("train-images-idx3-ubyte", flipped(gzipped(IMAGES), -6 % len(gzipped(IMAGES))), "is damaged: CRC"),
    "broken gzip": (
        "train-images-idx3-ubyte",
        gzipped(IMAGES)[:10] + b"\xff" * 99,
        "the gzip stream is damaged: Error",
    ),
    "gzip of less": ("train-images-idx3-ubyte", gzipped(IMAGES[:-9]), "and is truncated to 4,711 bytes"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_file_with_another_checksum(case, provide):
    file, content, message = DAMAGED[case]
    name = "mnist" if "idx" in file else "cifar10"
    folder = provide(name, TINY[name] | {file: content}, whole=TINY[name])
    with pytest.raises(ConfigError) as error:
        load(name, folder)
    assert str(error.value).startswith(f"{folder / file}: ")
    assert message in str(error.value)
    assert f"run `python -m experiments fetch {name}`, or set data.dir" in str(error.value)


def test_files_that_are_not_there(provide, tmp_path, monkeypatch):
    folder = provide("mnist", TINY["mnist"])
    (folder / "t10k-images-idx3-ubyte").unlink()
    monkeypatch.setenv("WN_JAX_DATA", str(tmp_path / "data"))
    with pytest.raises(ConfigError) as error:
        data.load(Config("mnist"))
    every = ", ".join(TINY["mnist"])
    assert str(error.value).splitlines() == [
        "data.name = 'mnist': no folder has all of its files; looked in",
        f"  {folder}: lacks t10k-images-idx3-ubyte",
        f"  {tmp_path / 'data'}: lacks {every}",
        f"  {tmp_path / 'cache' / 'mnist'}: no such folder",
        f"  {tmp_path / 'cache'}: no such folder",
        "run `python -m experiments fetch mnist` and leave data.dir out, or set data.dir (or the environment variable "
        "WN_JAX_DATA) to the folder that has them, plain or as .gz",
    ]


def test_a_folder_in_the_config_is_the_only_one(provide, tmp_path, monkeypatch):
    folder = provide("mnist", TINY["mnist"])
    monkeypatch.setenv("WN_JAX_DATA", str(folder))
    with pytest.raises(ConfigError, match="elsewhere: no such folder") as error:
        load("mnist", tmp_path / "elsewhere")
    assert "cache" not in str(error.value)
    assert str(folder) not in str(error.value)


@pytest.mark.parametrize("place", ["data", "data/mnist", "cache"])
def test_the_places_where_files_are_found(place, provide, tmp_path, monkeypatch):
    provide("mnist", TINY["mnist"])
    if place == "cache":
        (tmp_path / "data").rename(tmp_path / "cache")
    monkeypatch.setenv("WN_JAX_DATA", str(tmp_path / place if place != "cache" else tmp_path / "nowhere"))
    assert len(data.load(Config("mnist")).train["y"]) == 6


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="everything may be read")
def test_a_file_that_may_not_be_read(provide):
    folder = provide("mnist", TINY["mnist"])
    (folder / "train-labels-idx1-ubyte").chmod(0)
    with pytest.raises(ConfigError, match=r"train-labels-idx1-ubyte: cannot be read: .*Permission denied"):
        load("mnist", folder)


def test_the_order_of_idx_files_is_that_of_the_definition():
    """A file by hand: 2 x 3 values in rows."""
    content = mnist.Content("mnist", Path("file"), bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 6]))
    assert mnist.parse_idx(content, 2).tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.skipif(not REAL, reason="WN_JAX_DATA names no folder with the real files")
@pytest.mark.parametrize(
    ("name", "shape", "train", "test"),
    [("mnist", (28, 28, 1), 60_000, 10_000), ("cifar10", (32, 32, 3), 50_000, 10_000)],
)
def test_the_real_files(name, shape, train, test):
    dataset = load(name, Path(REAL))
    assert dataset.train["x"].shape == (train, *shape)
    assert dataset.held_out["x"].shape == (test, *shape)
    assert np.bincount(dataset.train["y"]).sum() == train
    # Mean and deviation of the pixels and first labels, as widely published.
    if name == "mnist":
        np.testing.assert_allclose(dataset.train["x"].mean(dtype=np.float64), 0.1307, atol=5e-5)
        np.testing.assert_allclose(dataset.train["x"].std(dtype=np.float64), 0.3081, atol=5e-5)
        assert dataset.train["y"][:5].tolist() == [5, 0, 4, 1, 9]
    else:
        pixels = (dataset.train["x"] * 128 + 127.5) / 255
        np.testing.assert_allclose(pixels.mean(axis=(0, 1, 2), dtype=np.float64), [0.4914, 0.4822, 0.4465], atol=5e-5)
        assert (np.bincount(dataset.train["y"]) == 5000).all()
        assert dataset.train["y"][:5].tolist() == [6, 9, 9, 4, 1]
