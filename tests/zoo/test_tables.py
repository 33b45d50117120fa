"""The zoo's hand-written tables: complete, and true of the models as far as numbers show it, without inference."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.zoo import ZOO
from wn_jax._boxes import is_box, rebox, unbox

QUICKLY = {"xla_backend_optimization_level": 0}  # to compile takes most of the time

REASONS = {"unused", "elementwise", "indexed", "penalty", "no data", "disagree", "carried", "reshaped", "sliced"}
REASONS |= {"returned", "opaque", "dtype", "product", "frozen"}


@functools.cache
def zoo(name):
    return ZOO[name]()


def arrays_of(params):
    """Arrays by leaf path, and a function that puts such a dict back."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_box)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in pairs]
    leaves = [leaf for _, leaf in pairs]
    assert len(set(paths)) == len(paths)
    found = {path: unbox(leaf) for path, leaf in zip(paths, leaves, strict=True) if hasattr(unbox(leaf), "shape")}

    def merge(arrays):
        pairs = zip(paths, leaves, strict=True)
        return jax.tree.unflatten(treedef, [rebox(x, arrays[path]) if path in arrays else x for path, x in pairs])

    return found, merge


every_model = pytest.mark.parametrize("name", ZOO)


@every_model
def test_each_array_is_in_one_table_and_fn_runs_under_jit(name):
    model = zoo(name)
    arrays, merge = arrays_of(model.params)
    assert sorted([*model.axes, *model.left]) == sorted(arrays)
    assert set(model.left.values()) <= REASONS
    assert model.output | model.biased <= set(model.axes)
    assert 0 <= model.initialized <= len(model.axes)
    for path, axes in model.axes.items():
        assert list(axes) == sorted(set(axes))
        assert all(-arrays[path].ndim <= axis < 0 for axis in axes)
    out = jax.jit(lambda arrays, x: model.fn(merge(arrays), x), compiler_options=QUICKLY)(arrays, model.x)
    assert jnp.issubdtype(out.dtype, jnp.floating)
    assert np.isfinite(np.asarray(out, np.float32)).all()


@every_model
def test_a_feature_is_linear_in_its_own_slice_of_the_weight(name):
    """Of the weight, the slice of one index of its other axes makes one column of the pre-activations, by itself."""
    model = zoo(name)
    if model.preactivations is None:
        pytest.skip("no pre-activations are written for it")
    arrays, merge = arrays_of(model.params)
    preactivations = jax.jit(lambda arrays: model.preactivations(merge(arrays), model.x), compiler_options=QUICKLY)
    plain = preactivations(arrays)
    assert set(plain) == set(model.axes)
    for path, axes in model.axes.items():
        weight, z = arrays[path], np.asarray(plain[path])
        features = [1 if i - weight.ndim in axes else size for i, size in enumerate(weight.shape)]
        assert weight.dtype == z.dtype == np.float32
        assert z.shape == (z.shape[0], np.prod(features))
        feature = z.shape[1] * 2 // 3
        one_hot = jnp.zeros(z.shape[1]).at[feature].set(1.0).reshape(features)
        doubled, dropped = (
            np.asarray(preactivations({**arrays, path: weight * (1 + by * one_hot)})[path]) for by in (1, -1)
        )
        limit = 1e-5 * max(1.0, np.abs(z).max())
        others = np.arange(z.shape[1]) != feature
        np.testing.assert_allclose(doubled - z, z - dropped, rtol=0, atol=limit)
        np.testing.assert_allclose(doubled[:, others], z[:, others], rtol=0, atol=limit)
        if np.any(np.asarray(weight)):
            assert np.abs(doubled - z)[:, feature].max() > 100 * limit
