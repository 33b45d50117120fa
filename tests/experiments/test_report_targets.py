"""Steps to several losses, the terms of a loss, and losses below zero, on run folders that are made up here."""

import numpy as np
import pytest

from experiments.report import charts, report, runs, summary
from experiments.report.summary import Figure
from experiments.report.targets import Target
from tests.experiments.run_folders import CONFIG, printed, record, write_run

TWO = CONFIG.replace("target_loss = 0.1", "target_loss = [0.5, -0.2]")
RECORDS = [
    record("a", 10, [0.4, 0.6]),
    record("b", 10, [0.6, 0.6]),
    record("a", 20, [0.3, 0.5]),
    record("b", 20, [0.5, -0.1]),
    record("a", 30, [-0.2, -0.3]),
    record("b", 30, [0.2, -0.2]),
]


def summarized(path):
    return summary.summarize(runs.read_all([path]))


def test_steps_and_their_ratios_against_numbers_worked_out_by_hand(tmp_path):
    """To 0.5, a takes 10 and 20 steps, b 20 and 20: ratios of 2 and 1. To -0.2, one seed of b does not come."""
    a, b = summarized(write_run(tmp_path, RECORDS, config=TWO))
    assert a.targets == (Target(0.5, 2, 15, 5, None, None), Target(-0.2, 2, 30, 0, None, None))
    assert b.targets == (Target(0.5, 2, 20, 0, 1.5, 0.5), Target(-0.2, 1, 30, None, None, None))


def test_the_steps_have_a_table_of_their_own(tmp_path):
    path = write_run(tmp_path, RECORDS, config=TWO)
    lines = [line.split() for line in printed(report([path]).table, width=80).splitlines()]
    for row in ("a 0.5 15 ± 5 -", "-0.2 30 ± 0 -", "b 0.5 20 ± 0 1.50 ± 0.50", "-0.2 30 (1/2) -"):
        assert row.split() in lines, lines
    assert "Steps to training losses" in (path / "report.html").read_text()


def test_an_arm_alone_has_no_ratio(tmp_path):
    rows = summarized(write_run(tmp_path, [r for r in RECORDS if r["arm"] == "a"], config=TWO))
    assert [column.title for column in summary.steps_columns(rows)] == ["arm", "training loss", "steps"]
    assert "Over the first" not in summary.steps_caption(rows)


def test_a_first_arm_at_several_rates_is_none_to_compare_with(tmp_path):
    records = [*RECORDS, *(record("a", step, [0.1, 0.1], rate=0.3) for step in (10, 20, 30))]
    rows = summarized(write_run(tmp_path, records, config=TWO))
    assert all(target.ratio is None for row in rows for target in row.targets)


def test_a_sweep_has_a_panel_for_each_target_that_was_reached(tmp_path):
    records = [record("a", 10, [0.4, 0.4], [0.1, 0.2], rate=rate) for rate in (0.1, 0.3)]
    found = runs.read_all([write_run(tmp_path, records, config=TWO)])
    (chart,) = charts.sweep(found, summary.summarize(found))
    assert [panel.title for panel in chart.panels][-1] == "steps to the target loss"
    both = [*records, *(record("a", 20, [-0.3, -0.3], [0.1, 0.2], rate=rate) for rate in (0.1, 0.3))]
    found = runs.read_all([write_run(tmp_path, both, name="both", config=TWO)])
    (chart,) = charts.sweep(found, summary.summarize(found))
    panels = {panel.title: panel.lines[0].mean for panel in chart.panels}
    np.testing.assert_array_equal(panels["steps to the target loss 0.5"], [10, 10])
    np.testing.assert_array_equal(panels["steps to the target loss -0.2"], [20, 20])


def test_terms_are_what_the_training_loss_has_too(tmp_path):
    rest = {"train_kl": [1.0, 1.0], "test_kl": [2.0, 4.0], "test_log_likelihood": [-9.0, -9.0]}
    path = write_run(tmp_path, [record("a", 10, [-122.96, -122.96], [20.0, 22.0], metric="test_loss", **rest)])
    (run,) = found = runs.read_all([path])
    assert run.curves[0].terms == ["test_kl"]
    (row,) = summary.summarize(found)
    assert (row.metric, row.held_out) == ("test_loss", 21)
    assert row.others == (Figure("test_kl", True, 3, 1), Figure("test_log_likelihood", False, -9, 0))
    assert [chart.id for chart in charts.over_time(found, [row])] == ["loss", "held-out", "terms"]
    in_terminal = printed(report([path]).table)
    assert "-123" in in_terminal
    assert "kl" not in in_terminal
    assert "test kl" in (path / "report.html").read_text()


@pytest.mark.parametrize("value", ["0.1", "[0.1]"])
def test_one_target_may_be_a_number_or_a_list(tmp_path, value):
    (run,) = runs.read_all([write_run(tmp_path, config=CONFIG.replace("target_loss = 0.1", f"target_loss = {value}"))])
    assert run.target_losses == (0.1,)
