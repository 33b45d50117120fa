"""ZCA whitening against definitions in float64, and its cache: used, refitted when damaged, done without."""

import io
import os
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

from experiments.data import cifar10, files, whitening

REAL = os.environ.get("WN_JAX_DATA")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WN_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "zca"


def images(examples=300, features=20, seed=0):
    """Correlated, off-center, and of deviations from 0.003 to 3."""
    random = np.random.default_rng(seed)
    mixed = random.normal(size=(examples, features)) * np.geomspace(3, 3e-3, features)
    rotation = np.linalg.qr(random.normal(size=(features, features)))[0]
    return (mixed @ rotation + random.normal(size=features)).astype(np.float32)


def by_svd(x, epsilon):
    """The whitening matrix from the singular values of the centered examples; directions without any have S = 0."""
    rows = x.reshape(len(x), -1).astype(np.float64)
    _, singular, directions = np.linalg.svd(rows - rows.mean(0), full_matrices=True)
    variances = np.zeros(len(directions))
    variances[: len(singular)] = singular**2 / len(x)
    return directions.T @ np.diag(1 / np.sqrt(variances + epsilon)) @ directions


@pytest.mark.parametrize("block", [4096, 64])
@pytest.mark.parametrize("epsilon", [1e-5, 0.1])
@pytest.mark.parametrize("examples", [300, 12])
def test_the_matrix_is_that_of_the_singular_values(examples, epsilon, block, monkeypatch):
    monkeypatch.setattr(whitening, "_BLOCK", block)
    x = images(examples)
    fitted = whitening.fit(x, epsilon)
    np.testing.assert_allclose(fitted.mean, x.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(fitted.matrix, by_svd(x, epsilon), rtol=0, atol=1e-9 / epsilon**0.5)
    np.testing.assert_array_equal(fitted.matrix, fitted.matrix.T)


def test_it_is_the_rotation_back_of_sklearns_whitening():
    from sklearn.decomposition import PCA

    x = images().astype(np.float64)
    pca = PCA(whiten=True, svd_solver="full").fit(x)
    unbiased = (len(x) / (len(x) - 1)) ** 0.5
    expected = pca.transform(x) @ pca.components_ * unbiased
    fitted = whitening.fit(x, epsilon=1e-14)
    np.testing.assert_allclose((x - fitted.mean) @ fitted.matrix, expected, rtol=0, atol=1e-6)


def test_the_covariance_of_whitened_examples():
    """U diag(S / (S + epsilon)) U^T, which is C (C + epsilon)^-1 without an eigendecomposition."""
    x, epsilon = images().astype(np.float64), 1e-3
    fitted = whitening.fit(x, epsilon)
    covariance = np.cov(x.T, bias=True)
    expected = covariance @ np.linalg.inv(covariance + epsilon * np.eye(len(covariance)))
    white = (x - fitted.mean) @ fitted.matrix
    np.testing.assert_allclose(white.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(np.cov(white.T, bias=True), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("block", [4096, 64])
def test_applying_keeps_shapes_and_rounds_little(block, monkeypatch):
    monkeypatch.setattr(whitening, "_BLOCK", block)
    x = images(features=27).reshape(-1, 3, 3, 3)
    fitted = whitening.fit(x)
    white = fitted.apply(x)
    expected = (x.reshape(300, 27) - fitted.mean) @ fitted.matrix
    assert (white.shape, white.dtype) == (x.shape, np.float32)
    np.testing.assert_allclose(white.reshape(300, 27), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("x", "epsilon", "message"),
    [
        (images()[:0], 1e-5, "got 0 examples"),
        (images(), 0.0, "a positive epsilon; got 300 examples, epsilon 0.0"),
        (images(), float("nan"), "epsilon nan"),
        (np.full((3, 2), np.inf, np.float32), 1e-5, "NaN or infinity"),
    ],
)
def test_what_cannot_be_fitted(x, epsilon, message):
    with pytest.raises(ValueError, match=message):
        whitening.zca(x, epsilon)


def test_a_cached_fit_that_unpacks_to_too_much_is_made_again(cache):
    """A zip of zeros; and one whose array says that it is larger than its file."""
    x = images()
    first = whitening.zca(x)
    (path,) = cache.iterdir()
    bomb = io.BytesIO()
    np.savez_compressed(bomb, mean=first.mean, matrix=np.zeros(2**24, np.float32))
    lying = io.BytesIO()
    with zipfile.ZipFile(lying, "w") as archive:
        header = str({"descr": "<f4", "fortran_order": False, "shape": (2**58,)}).ljust(117) + "\n"
        archive.writestr("mean.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())
    tracemalloc.start()
    path.write_bytes(bomb.getvalue())
    assert whitening._load(path, first.mean.size) is None
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
    for content in (bomb.getvalue(), lying.getvalue()):
        path.write_bytes(content)
        np.testing.assert_array_equal(whitening.zca(x).matrix, first.matrix)


def test_the_cache_is_used(cache, monkeypatch):
    x = images()
    first = whitening.zca(x)
    assert [path.suffix for path in cache.iterdir()] == [".npz"]
    monkeypatch.setattr(whitening, "fit", None)  # cannot be called
    again = whitening.zca(x.copy())
    np.testing.assert_array_equal(again.matrix, first.matrix)
    np.testing.assert_array_equal(again.mean, first.mean)


def test_anything_else_is_fitted_itself(cache):
    x = images()
    changed = x.copy()
    changed[-1, -1] += 1e-3
    for other, epsilon in ((x, 1e-5), (x, 1e-4), (changed, 1e-5), (x[:-1], 1e-5), (x.reshape(600, 10), 1e-5)):
        np.testing.assert_array_equal(whitening.zca(other, epsilon).matrix, whitening.fit(other, epsilon).matrix)
    assert len(list(cache.iterdir())) == 5


def middle_flipped(path: Path) -> bytes:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    return bytes(content)


DAMAGES = {
    "empty": lambda path: b"",
    "truncated": lambda path: path.read_bytes()[:-50],
    "a bit of a number": middle_flipped,
    "no zip": lambda path: b"not a zip file",
    "no array": lambda path: b"\x93NUMPY",
}


@pytest.mark.parametrize("damage", [*DAMAGES, "another shape", "another name"])
def test_a_damaged_cache_is_replaced(damage, cache):
    x = images()
    expected = whitening.zca(x)
    (path,) = cache.iterdir()
    if damage in DAMAGES:
        path.write_bytes(DAMAGES[damage](path))
    else:
        np.savez(path, mean=expected.mean[1:], **{"matrix" if damage == "another shape" else "m": expected.matrix})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(whitening.zca(x).matrix, expected.matrix)
    assert list(cache.iterdir()) == [path]
    np.testing.assert_array_equal(np.load(path)["matrix"], expected.matrix)


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder would be")
    with pytest.warns(UserWarning, match=r"\.npz: the whitening cannot be kept, .*set WN_JAX_CACHE"):
        fitted = whitening.zca(images())
    np.testing.assert_array_equal(fitted.matrix, whitening.fit(images()).matrix)


def test_a_full_disk_leaves_no_part(cache, monkeypatch):
    def full(file, **arrays):
        file.write(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.warns(UserWarning, match="No space left"):
        whitening.zca(images())
    assert list(cache.iterdir()) == []


@pytest.mark.skipif(not REAL, reason="WN_JAX_DATA names no folder with the real files")
def test_real_images_whiten():
    """Every other pixel of the middle of CIFAR-10 images, for the time that its reference takes."""
    content = files.opener(cifar10.CIFAR10, [Path(REAL)])("test_batch.bin")
    x = cifar10._arrays(cifar10._records(content, 10_000))[0][:2000, 8:24:2, 8:24:2]
    fitted = whitening.fit(x)
    np.testing.assert_allclose(fitted.matrix, by_svd(x, 1e-5), rtol=0, atol=1e-8)
    white = fitted.apply(x).reshape(2000, -1)
    np.testing.assert_allclose(np.cov(white.T.astype(np.float64), bias=True), np.eye(192), atol=0.02)
