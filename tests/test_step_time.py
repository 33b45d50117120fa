"""The measurement of step times, and of what the engine adds to a step."""

import functools
import json

import flax.linen as nn
import jax
import numpy as np
import pytest

from experiments import overhead, step_time, timed_models
from tests.experiments import DIGITS, fails, invoke, settings


@pytest.mark.slow
def test_step_times_have_a_figure_for_each_arm_and_round(monkeypatch, tmp_path):
    monkeypatch.setattr(step_time, "_SECONDS_PER_TURN", 1e-4)
    tiny = {
        "dense": timed_models.Case(
            "dense",
            functools.partial(timed_models.mlp, width=4),
            (2, 4),
            target=1.5,
            equinox=functools.partial(timed_models.equinox_mlp, width=4),
        ),
        "bare": timed_models.Case("bare", lambda _: nn.Dense(3), (2, 4), target=1.5, layers_wrap=False),
    }
    monkeypatch.setattr(step_time, "CASES", tiny)
    result = invoke("step-time", "--rounds", 2, "--json", tmp_path / "times.json")
    assert result.exit_code == 0, result.output
    assert f"jax {jax.__version__}, cpu" in result.output
    dense, bare = json.loads((tmp_path / "times.json").read_text())["cases"]
    for times in (*dense["milliseconds"].values(), *bare["milliseconds"].values()):
        assert len(times) == 2
        assert min(times) > 0
    assert set(dense["milliseconds"]) == {"plain", "auto", "weight", "output", "flax", "plain equinox", "equinox"}
    assert [name for name, ratio in bare["ratios"].items() if ratio is None] == ["flax", "equinox"]
    assert set(bare["milliseconds"]) == {"plain", "auto", "weight", "output"}


def test_step_time_ratios_against_numbers_worked_out_by_hand():
    times = {"plain": [1.0, 2.0, 4.0], "auto": [1.1, 2.4, 4.0], "plain equinox": [2.0] * 3, "equinox": [3.0, 5.0, 8.0]}
    row = step_time.Row("x", 1.2, times)
    assert row.plain() == 2
    assert row.ratio("auto") == pytest.approx(1.1)  # the median of 1.1, 1.2 and 1
    assert row.ratio("equinox") == 2.5
    assert row.ratio("flax") is None


def test_the_timed_models_do_what_they_do_in_equinox():
    apply, params = timed_models.equinox_mlp(lambda layer: layer, width=4)
    kernels = {f"layers_{2 * i}": {"kernel": layer.weight.T, "bias": layer.bias} for i, layer in enumerate(params)}
    x = jax.random.normal(jax.random.key(0), (2, 4))
    expected = timed_models.mlp(lambda layer: layer, width=4).apply({"params": kernels}, x)
    np.testing.assert_allclose(apply(params, x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_overhead_is_a_ratio_of_medians():
    found = overhead.Overhead(bare=[1.0, 2.0, 4.0], engine=[1.1, 2.0, 6.0])
    assert found.ratio() == pytest.approx(1.1)  # the median of 1.1, 1 and 1.5
    result = invoke("overhead", DIGITS, "--arm", "weight_norm", "--rounds", 2, *settings("train.seeds=1"))
    assert result.exit_code == 0, result.output
    assert "ratio" in result.output
    assert "has 2 of them" in fails("overhead", DIGITS, *settings())
