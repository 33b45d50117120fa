"""Eight CPU devices for the tests that need several, set before JAX starts; and the models that many tests share."""

import importlib.metadata
import os

import pytest

_LEVEL = "--xla_backend_optimization_level"


def pytest_configure(config):
    """Before JAX starts. The suite is compiled quickly, and not as users compile.

    To test programs as users compile them, as `.ci/run` does where it matters, set the level:
    `XLA_FLAGS=--xla_backend_optimization_level=3`.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # with libtpu installed, JAX would look for a TPU in each process
    given = os.environ.get("XLA_FLAGS", "")
    flags = [given, "--xla_force_host_platform_device_count=8"]
    if _LEVEL not in given:
        flags += _quick_to_compile()
    os.environ["XLA_FLAGS"] = " ".join(flags)


def _quick_to_compile():
    """Flags that spare half of the time to compile: no optimization, XLA's older emitters, and a program in one part.

    JAX 0.12 has the older emitters no more, and XLA stops a process at a flag that it does not know.
    """
    flags = [f"{_LEVEL}=0"]
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        flags += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
    return flags


@pytest.fixture
def quickly_compiled():
    """For tests that compile much: without LLVM's optimization also where the level is another."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def model():
    from tests.zoo import ZOO

    return ZOO["linen_mlp"]()


@pytest.fixture
def nodes(model):
    import wn_jax as wn

    return wn.reparameterize(model.params, model.axes)


@pytest.fixture
def plain():
    from flax import nnx

    from tests.nnx.net import Net

    return Net(nnx.Rngs(0))


@pytest.fixture
def wrapped(plain):
    from tests.nnx.net import AXES
    from wn_jax.nnx import WeightNormed

    return WeightNormed(plain, AXES)
