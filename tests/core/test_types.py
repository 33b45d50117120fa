"""Types and names as a user meets them: everything public is there, is lazy where it says so, and is typed."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import wn_jax as wn
from tests import user_code
from wn_jax import _types

PACKAGE = Path(wn.__file__).parent
MODULES = ("wn_jax", "wn_jax.curvature", "wn_jax.linen", "wn_jax.nnx", "wn_jax.optim", "wn_jax.torch")
# Every public function and its arguments with their defaults, as version 0.1 had them.
SIGNATURES = {
    "wn_jax": {
        "in_shard_map": "(params, specs)",
        "infer_axes": "(fn, argnums=0)",
        "init_from_data": "(fn, init_scale=1.0, argnums=0, zeros='keep')",
        "kernel_axes": "(params)",
        "labels": "(params)",
        "load": "(path, target=None)",
        "nodes_from_dicts": "(params, axes=None)",
        "reconstruct": "(tree)",
        "reparameterize": "(params, axes)",
        "save": "(path, params)",
        "shardings": "(params, specs)",
        "weight_uses": "(fn, argnums=0)",
        "wrap": "(fn, argnums=0, scale='auto', strict=False)",
        "WeightNorm": "(g, v, axes)",
    },
    "wn_jax.optim": {
        "project_directions": "()",
        "transfer_state": "(opt_state, params, new_params)",
        "ProjectDirectionsState": "(norms)",
    },
    "wn_jax.linen": {"from_weight_norm": "(params, feature_axes=-1, epsilon=1e-12)"},
    "wn_jax.nnx": {
        "from_weight_norm": "(model, feature_axes=-1, epsilon=1e-12)",
        "infer_axes": "(fn)",
        "init_from_data": "(fn, init_scale=1.0, zeros='keep')",
        "on_nodes": "(tx, model)",
        "split": "(model)",
        "update": "(model, params)",
    },
    "wn_jax.torch": {
        "batch_norm": "(path, stats)",
        "conv": "(path)",
        "conv_transpose": "(path, transpose_kernel=False, groups=1)",
        "embedding": "(path)",
        "from_flax": "(params, names)",
        "from_state_dict": "(state, dim=None, plain=())",
        "linear": "(path)",
        "lstm": "(path, layer=0, reverse=False)",
        "norm": "(path)",
        "to_flax": "(tree, target, names)",
        "to_state_dict": "(tree, scheme='new')",
    },
    "wn_jax.curvature": {
        "condition_numbers": "(eigenvalues, damping=0.0, ks=(10,), cutoff=None)",
        "cosine": "(first, second)",
        "diagonal": "(operator, key, probes=100)",
        "eigenvalues": "(operator, key, steps=100, count=1, tolerance=0.001)",
        "empirical_fisher": "(losses, batch_size=None)",
        "fisher": "(model, likelihood, batch_size=None)",
        "gauss_newton": "(model, loss, batch_size=None)",
        "gradient_covariance": "(losses, batch_size=None)",
        "hessian": "(loss, batch_size=None)",
        "natural_gradient": "(operator, gradient, damping, tolerance=0.0001, max_steps=500)",
        "norm_growth": "(before, after)",
        "spectral_density": "(operator, key, probes=4, steps=60)",
        "trace": "(operator, key, probes=100)",
        "ConditionNumbers": "(damped, numerical_range, to, to_mean)",
        "Eigenvalues": "(values, errors, exact)",
        "Estimate": "(value, standard_error)",
        "NaturalGradient": "(value, residual, steps, converged)",
        "SpectralDensity": "(values, weights, exact=False)",
    },
}


@pytest.mark.parametrize("module", MODULES)
def test_what_is_public_is_listed_and_documented(module):
    module = importlib.import_module(module)
    assert sorted(module.__all__) == sorted(set(module.__all__))
    assert sorted(dir(module)) == sorted(module.__all__)
    assert all(getattr(module, name).__doc__ for name in module.__all__)


@pytest.mark.parametrize("module", SIGNATURES)
def test_signatures_stay(module):
    found = importlib.import_module(module)
    for name, signature in SIGNATURES[module].items():
        own = inspect.signature(getattr(found, name))
        bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in own.parameters.values()]
        assert str(own.replace(parameters=bare, return_annotation=inspect.Signature.empty)) == signature, name


def test_the_family_is_imported_when_it_is_touched():
    lazy = [name for name in wn.__all__ if inspect.ismodule(getattr(wn, name))]
    program = f"""
import sys
import wn_jax as wn
assert not any(f"wn_jax.{{name}}" in sys.modules for name in {lazy})
for name in {lazy}:
    assert getattr(wn, name) is sys.modules[f"wn_jax.{{name}}"], name
"""
    assert lazy == ["curvature", "linen", "nnx", "optim", "torch"]
    subprocess.run([sys.executable, "-c", program], check=True)
    with pytest.raises(AttributeError, match=r"module 'wn_jax' has no attribute 'optimizers'"):
        _ = wn.optimizers


def test_the_code_of_a_user_runs_and_uses_every_public_name():
    source = (Path(user_code.__file__)).read_text()
    words = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    words |= {
        alias.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    for module in MODULES:
        assert set(importlib.import_module(module).__all__) <= words, module
    for function in user_code.EVERYTHING:
        function()


def annotations(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.AnnAssign | ast.arg) and node.annotation is not None:
            yield node.annotation
        elif isinstance(node, ast.FunctionDef) and node.returns is not None:
            yield node.returns


def test_few_annotations_say_no_more_than_any():
    found = [ast.unparse(annotation) for path in PACKAGE.rglob("*.py") for annotation in annotations(path)]
    assert len(found) > 1000
    assert found.count("Any") < 150  # there were 418


def test_the_aliases_are_few_and_documented():
    body = ast.parse(Path(_types.__file__).read_text()).body
    aliases = [i for i, node in enumerate(body) if isinstance(node, ast.AnnAssign)]
    assert 0 < len(aliases) <= 10
    for i in aliases:
        assert isinstance(body[i + 1], ast.Expr), ast.unparse(body[i])
