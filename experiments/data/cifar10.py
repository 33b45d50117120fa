"""CIFAR-10, the binary version (Krizhevsky 2009): 50,000 color images of 32 x 32 pixels to train on, 10,000 to test on.

A file is records of one label byte and 3,072 pixel bytes in the order channel, row, column.
"""

from __future__ import annotations

import numpy as np

from experiments.data.source import Content, Download, File, Open, Raw, Source

CLASSES = 10
_SHAPE = (3, 32, 32)
_RECORD = 1 + 3 * 32 * 32
_TRAIN = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
_TEST = "test_batch.bin"


def read(open_file: Open, records: int = 10_000) -> Raw:
    """Inputs (examples, 32, 32, 3) in bytes, which `scale` turns into `(pixel - 127.5) / 128`.

    Arguments:
        open_file: opens a file by name.
        records: how many each file has.

    Raises:
        ConfigError: a file is not this many records, or a label is not 0 to 9.
    """
    train, test = [_records(open_file(name), records) for name in _TRAIN], _records(open_file(_TEST), records)
    return Raw(*_arrays(np.concatenate(train)), *_arrays(test), CLASSES, scale)


def scale(pixels: np.ndarray) -> np.ndarray:
    """Bytes as the paper's code has them, in float32."""
    images = np.ascontiguousarray(pixels).astype(np.float32)
    images -= np.float32(127.5)
    images /= np.float32(128)
    return images


def _records(content: Content, records: int) -> np.ndarray:
    """The bytes of a file, (records, 3073) in uint8."""
    found, rest = divmod(len(content.data), _RECORD)
    if rest or found != records:
        remainder = f" and {rest:,} bytes" if rest else ""
        raise content.wrong(f"holds {found:,} records{remainder}", f"{records:,} records of {_RECORD:,} bytes")
    table = np.frombuffer(content.data, np.uint8).reshape(records, _RECORD)
    if (largest := table[:, 0].max()) >= CLASSES:
        record = int(table[:, 0].argmax())
        raise content.wrong(f"record {record:,} has the label {largest}", f"labels 0 to {CLASSES - 1}")
    return table


def _arrays(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return table[:, 1:].reshape(-1, *_SHAPE).transpose(0, 2, 3, 1), table[:, 0].astype(np.int32)


_FILES = tuple(
    File(name, 10_000 * _RECORD, md5)
    for name, md5 in zip(
        (*_TRAIN, _TEST),
        (
            "5dd7e06a14cb22eb9f671a540d1b7c25",
            "5ea93a67294ea407fff1d09f752e9692",
            "942cd6a4bcdd0dd3c604fbe906cb4421",
            "ae636b3ba5c66a11e91e8cb52e771fcb",
            "53f37980c15c3d472c316c40844f3f0d",
            "803d5f7f4d78ea53de84dbe85f74fb6d",
        ),
        strict=True,
    )
)

CIFAR10 = Source(
    "cifar10",
    read,
    folder="cifar-10-batches-bin",
    downloads=(
        Download(
            ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",), "c32a1d4ab5d03f1284b67883e8d87530", _FILES
        ),
    ),
)
