"""The measurement of what the engine adds to a step."""

import pytest

from experiments.bench import overhead
from tests.experiments.commands import DIGITS, fails, invoke, settings


@pytest.mark.slow
def test_the_overhead_is_a_ratio_of_medians():
    found = overhead.Overhead(bare=[1.0, 2.0, 4.0], engine=[1.1, 2.0, 6.0])
    assert found.ratio() == pytest.approx(1.1)  # the median of 1.1, 1 and 1.5
    result = invoke("overhead", DIGITS, "--arm", "weight_norm", "--rounds", 2, *settings("train.seeds=1"))
    assert result.exit_code == 0, result.output
    assert "ratio" in result.output
    assert "has 2 of them" in fails("overhead", DIGITS, *settings())
