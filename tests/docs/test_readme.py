"""The README's code runs, as printed."""

import re

import pytest

from tests.docs.documents import ROOT, blocks, run

README = (ROOT / "README.md").read_text()


def test_the_python_blocks_run_in_order():
    names = run("README.md")
    assert len(blocks("README.md")) == 5
    assert names["logits"].shape == (32, 10)
    assert names["y"].shape == (4, 3)
    assert len([line for line in blocks("README.md")[0].splitlines() if line.strip()]) <= 20


@pytest.mark.slow
def test_the_guide_to_curvature_runs():
    names = run("docs/curvature.md")
    assert names["natural"].converged
    assert names["every"].exact


def test_the_guide_to_performance_runs():
    assert run("docs/performance.md")["summed"]["kernel"].axes == (-2,)


def test_the_table_of_peers_names_tests_that_exist():
    tests = (ROOT / "tests" / "docs" / "test_peers.py").read_text()
    named = re.findall(r"\| `(test_\w+)` \|", README)
    assert len(named) == 7
    assert all(f"def {name}(" in tests for name in named)


def test_the_two_commands_can_be_found_by_ci():
    for name in ("main-command", "test-command"):
        (command,) = re.findall(rf"<!-- {name} -->\n```bash\n(.*?)\n```", README, re.DOTALL)
        assert command.startswith("python3 -m venv .venv && ")
