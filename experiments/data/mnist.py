"""MNIST (LeCun et al.): 60,000 handwritten digits of 28 x 28 pixels to train on, 10,000 to test on; IDX files.

An IDX file is two zero bytes, a type, the number of dimensions, each of them in four bytes, and the values.
"""

from __future__ import annotations

import math
import struct

import numpy as np

from experiments.data.source import Content, Download, File, Open, Raw, Source

CLASSES = 10
_BYTES = 8  # IDX's number for the type of unsigned bytes
_SIDE = 28
_KINDS = {1: "labels", 3: "images"}


def read(open_file: Open) -> Raw:
    """Inputs (examples, 28, 28, 1) from 0 to 1.

    Raises:
        ConfigError: a file is no IDX file, or of another type, shape or size; images and labels differ in number;
            or a label is not 0 to 9.
    """
    return Raw(*_pair(open_file, "train"), *_pair(open_file, "t10k"), classes=CLASSES)


def _pair(open_file: Open, split: str) -> tuple[np.ndarray, np.ndarray]:
    images, labels = open_file(f"{split}-images-idx3-ubyte"), open_file(f"{split}-labels-idx1-ubyte")
    x, y = parse_idx(images, 3), parse_idx(labels, 1)
    if x.shape[1:] != (_SIDE, _SIDE):
        raise images.wrong(f"holds images of {x.shape[1]} x {x.shape[2]} pixels", f"{_SIDE} x {_SIDE}")
    if len(x) != len(y):
        raise labels.wrong(f"holds {len(y):,} labels", f"{len(x):,}, one for each image of {images.path.name}")
    if (y >= CLASSES).any():
        raise labels.wrong(f"holds the label {y.max()}", f"labels 0 to {CLASSES - 1}")
    return x[..., None].astype(np.float32) / np.float32(255), y.astype(np.int32)


def parse_idx(content: Content, dimensions: int) -> np.ndarray:
    """The values of an IDX file of unsigned bytes with this many dimensions.

    Raises:
        ConfigError: the file is something else.
    """
    data = content.data
    if len(data) < 4 or data[:2] != b"\0\0":
        raise content.wrong(f"is no IDX file: starts with bytes '{data[:4].hex(' ')}'", f"'00 00 08 0{dimensions}'")
    if data[2] != _BYTES:
        raise content.wrong(f"holds values of IDX type 0x{data[2]:02x}", f"type 0x{_BYTES:02x}, unsigned bytes")
    if data[3] != dimensions:
        found, wanted = (_KINDS.get(count, "something else") for count in (data[3], dimensions))
        raise content.wrong(f"has {data[3]} dimensions ({found})", f"{dimensions} ({wanted}); are two files swapped?")
    start = 4 + 4 * dimensions
    if len(data) < start:
        raise content.wrong(f"ends in its header, after {len(data)} bytes", f"a header of {start} bytes")
    shape = struct.unpack(f">{dimensions}I", data[4:start])
    if len(data) - start != math.prod(shape):
        sizes = " x ".join(f"{size:,}" for size in shape)
        raise content.wrong(
            f"holds {len(data) - start:,} values", f"{sizes} = {math.prod(shape):,}, as its header says"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _download(name: str, size: int, md5: str, md5_gz: str) -> Download:
    mirrors = ("https://storage.googleapis.com/cvdf-datasets/mnist/", "https://ossci-datasets.s3.amazonaws.com/mnist/")
    return Download(tuple(f"{mirror}{name}.gz" for mirror in mirrors), md5_gz, (File(name, size, md5),))


MNIST = Source(
    "mnist",
    read,
    folder="mnist",
    downloads=tuple(
        _download(*file)
        for file in (
            (
                "train-images-idx3-ubyte",
                47_040_016,
                "6bbc9ace898e44ae57da46a324031adb",
                "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            ),
            (
                "train-labels-idx1-ubyte",
                60_008,
                "a25bea736e30d166cdddb491f175f624",
                "d53e105ee54ea40749a09fcbcd1e9432",
            ),
            (
                "t10k-images-idx3-ubyte",
                7_840_016,
                "2646ac647ad5339dbf082846283269ea",
                "9fb629c4189551a2d022fa330f9573f3",
            ),
            (
                "t10k-labels-idx1-ubyte",
                10_008,
                "27ae3e4e09519cfbb04c329615203637",
                "ec29112dd5afa0611ce80d1b7f02629c",
            ),
        )
    ),
)
