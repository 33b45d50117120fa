"""Reports on run folders that are made up here, against numbers worked out by hand."""

import json
import math
import re

import numpy as np
import pytest

from experiments import files
from experiments.errors import ConfigError
from experiments.report import charts, report, runs, summary
from experiments.report.targets import Target
from tests.experiments.run_folders import RECORDS, TIMES, printed, record, write_run


def summarized(*paths):
    return summary.summarize(runs.read_all(paths))


def test_a_summary_against_numbers_worked_out_by_hand(tmp_path):
    a, b = summarized(write_run(tmp_path, times=TIMES))
    assert (a.metric, a.held_out, a.held_out_se) == ("test_error", pytest.approx(0.2), pytest.approx(0.1))
    assert (a.seeds, a.diverged, a.step, a.train_loss) == (2, 0, 20, pytest.approx(0.075))
    assert a.targets == (Target(0.1, 2, 15, 5, None, None),)
    assert (a.relative_time, b.relative_time) == (1.0, 1.25)  # the median of 1.5 and 1
    assert (a.chosen, b.chosen) == (None, None)
    # the first seed of b diverged, so that what is left is one seed
    assert (b.diverged, b.held_out, b.held_out_se, b.train_loss) == (1, 0.2, None, 0.1)
    assert b.targets == (Target(0.1, 1, 10, None, None, None),), "a ratio to one seed of two would flatter"


def test_the_report_is_written_beside_the_run_and_printed(tmp_path):
    path = write_run(tmp_path, times=TIMES)
    found = report([path])
    assert [found.summary, found.curves, found.page] == [
        path / n for n in ("summary.json", "curves.png", "report.html")
    ]
    assert json.loads(found.summary.read_text())[0]["held_out"] == pytest.approx(0.2)
    assert found.curves.read_bytes().startswith(b"\x89PNG")
    assert not list(path.glob(".*")), "a temporary file was left behind"
    text = printed(found.table)
    assert "made-up: 20 steps, 2 seeds" in text
    for cell in ("20.00 ± 10.00", "7.5e-02", "15 ± 5", "1.25", "10 (1/2)", "1/2"):
        assert cell in text
    assert "rate" not in text, "one learning rate needs no column"


def test_steps_at_which_seeds_diverged(tmp_path):
    noted = record("a", 20, [0.2, None], nonfinite_step=[None, 13])
    recovered = [record("b", 10, [0.3, 0.3]), record("b", 20, [0.2, 0.2], nonfinite_step=[7, None])]
    a, b = runs.read(write_run(tmp_path, [record("a", 10, [0.3, 0.3]), noted, *recovered])).curves
    assert (a.nonfinite, b.nonfinite) == ((None, 13), (7, None))
    (unnoted,) = runs.read(
        write_run(tmp_path, [record("a", 10, [1, None]), record("a", 20, [1, None])], name="old")
    ).curves
    assert unnoted.nonfinite == (None, 10)


def sweep(metric, **rest):
    """Two rates of an arm: the higher one is better, and a third, still better, at which one of the seeds is left."""
    return [
        record("a", 10, [0.5, 0.5], [0.4, 0.6], 0.3, metric, **rest),
        record("a", 10, [0.5, 0.5], [0.5, 0.7], 0.1, metric, **rest),
        record("a", 10, [None, None], [0.0, 0.0], 3.0, metric),
        record("b", 10, [0.5, 0.5], [0.1, 0.2], 0.1, metric, **rest),
    ]


def test_the_best_rate_is_one_only_where_a_validation_set_chose_it(tmp_path):
    by_validation = summarized(write_run(tmp_path, sweep("validation_error"), name="validation"))
    assert [(row.arm, row.learning_rate, row.chosen) for row in by_validation] == [
        ("a", 0.1, None), ("a", 0.3, "best"), ("a", 3.0, None), ("b", 0.1, None),
    ]  # fmt: skip
    by_test = summarized(write_run(tmp_path, sweep("test_error"), name="test"))
    assert [row.chosen for row in by_test] == [None, "lowest", None, None]
    text = " ".join(printed(summary.table(by_test, "")).split())
    assert "0.3 *" in text
    assert "chosen on the test set" in text
    assert "best" not in text
    assert "best rate, chosen on the validation set" in " ".join(printed(summary.table(by_validation, "")).split())


def test_of_a_sweep_a_figure_shows_the_last_metric_and_where_seeds_diverged(tmp_path):
    found = runs.read_all([write_run(tmp_path, sweep("validation_error"))])
    (chart,) = charts.sweep(found, summary.summarize(found))
    (line,) = chart.panels[0].lines  # b has one rate
    np.testing.assert_allclose(line.x, [0.1, 0.3, 3.0])
    np.testing.assert_allclose(line.mean, [60, 50, math.nan])
    np.testing.assert_allclose(line.error, [10, 10, 0])
    assert (line.lost, line.chosen) == (((3.0, "2/2"),), 0.3)


def test_lines_are_means_over_the_seeds_that_stayed_finite(tmp_path):
    dead = [record("dead", 10, [0.2, 0.4], [0.1, 0.1]), record("dead", 20, [None, None], [0.9, 0.9])]
    found = runs.read_all([write_run(tmp_path, [*RECORDS, *dead])])
    loss, error = charts.over_time(found, summary.summarize(found))
    a, b, dead = loss.panels[0].lines
    np.testing.assert_allclose(a.mean, [0.3, 0.075])
    np.testing.assert_allclose(a.error, [0.2, 0.025])
    np.testing.assert_allclose(b.mean, [0.1, 0.1])
    np.testing.assert_allclose((dead.x, dead.mean), ([10], [0.3]))
    assert (b.label, dead.label, a.ends, dead.ends) == ("b (1/2 diverged)", "dead (2/2 diverged)", False, True)
    np.testing.assert_allclose(error.panels[0].lines[0].mean, [30, 20])
    np.testing.assert_allclose(error.panels[0].lines[2].mean, [10])  # 0.9 later on is of networks that are lost
    assert loss.panels[0].targets == (0.1,)


def test_long_series_are_thinned_and_it_is_said(tmp_path):
    found = runs.read_all([write_run(tmp_path, [record("a", step, [1.0 / step]) for step in range(1, 1001)])])
    (chart,) = charts.over_time(found, summary.summarize(found), most=100)
    (line,) = chart.panels[0].lines
    assert (len(line.x), line.x[0], line.x[-1]) == (100, 1, 1000)
    assert "at 100 of the 1000 records" in chart.caption
    (whole,) = charts.over_time(found, summary.summarize(found))
    assert len(whole.panels[0].lines[0].x) == 1000


def test_what_a_crash_left_is_read(tmp_path):
    path = write_run(tmp_path)
    whole = (path / "metrics.jsonl").read_bytes()
    (path / "metrics.jsonl").write_bytes(whole + '{"arm": "ä'.encode()[:-1])
    assert [len(curve.metrics["train_loss"].steps) for curve in runs.read(path).curves] == [2, 2]
    lines = whole.splitlines()
    (path / "metrics.jsonl").write_bytes(
        b"\n".join([*reversed(lines), *lines])
    )  # of a step that is there twice, one counts
    assert [curve.metrics["train_loss"].steps.tolist() for curve in runs.read(path).curves] == [[10, 20], [10, 20]]
    (path / "metrics.jsonl").write_bytes(b"\n".join([lines[0], lines[1][:9], *lines[2:]]))
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 2: not valid JSON"):
        runs.read(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", None, "not a run folder: it has no metrics.jsonl"),
        ("metrics.jsonl", "", "holds no record"),
        ("metrics.jsonl", "[1]\n", "line 1: must be a JSON object"),
        ("metrics.jsonl", '{"arm": "a", "step": 1, "train_loss": [1]}\n', "line 1: learning_rate is 'missing'"),
        ("metrics.jsonl", json.dumps(record("a", 1, [1, 2], [1])) + "\n", "test_error must be a list of 2 numbers"),
        ("metrics.jsonl", json.dumps(record("a", 1, [1], norms={"x": [1, 2]})) + "\n", "norms, x must be a list of 1"),
        ("metrics.jsonl", json.dumps(record("a", 1, ["x"])) + "\n", "train_loss must be a list of 1 numbers"),
        ("metrics.jsonl", json.dumps(record("a", 1, [])) + "\n", "train_loss must be a list"),
        ("times.jsonl", '{"arm": "a"}\n', "line 1: expected arm, step and seconds_per_step"),
        ("config.toml", "a = \n", "config.toml: not valid TOML"),
        ("environment.json", "{", "environment.json: not valid JSON"),
        ("environment.json", "[]", "must be a JSON object"),
    ],
)
def test_errors_name_the_file_and_the_line(tmp_path, name, content, message):
    path = write_run(tmp_path)
    (path / name).unlink(missing_ok=True)
    if content is not None:
        (path / name).write_text(content)
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        report([path])
    assert str(path) in str(error.value)


def test_errors_of_folders(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        report([tmp_path / "nothing"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="not a folder"):
        report([tmp_path / "file"])
    with pytest.raises(ConfigError, match="no run folder given"):
        report([])
    with pytest.raises(ConfigError, match="cannot be written"):
        report([write_run(tmp_path)], tmp_path / "file" / "in-a-file")


def test_a_rate_at_which_seeds_diverged_is_not_the_best(tmp_path):
    """However well the seed did that is left."""
    records = [
        record("a", 10, [0.5, 0.5], [0.4, 0.4], rate=0.1, metric="validation_error"),
        record("a", 10, [0.5, None], [0.1, 0.9], rate=0.3, metric="validation_error", nonfinite_step=[None, 4]),
    ]
    rows = summarized(write_run(tmp_path, records))
    assert [(row.diverged, row.held_out, row.chosen) for row in rows] == [(0, 0.4, "best"), (1, 0.1, None)]


def test_a_file_that_cannot_be_replaced_stays_whole(tmp_path, monkeypatch):
    files.write(tmp_path / "a", "before")

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        files.write(tmp_path / "a", "after")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "before")]


def test_times_are_compared_only_where_they_can_be(tmp_path):
    assert all(row.relative_time is None for row in summarized(write_run(tmp_path, name="none")))
    assert "time" not in printed(report([write_run(tmp_path, name="unprinted")]).table)
    of_two_rates = [*RECORDS, record("b", 10, [1, 1], rate=0.2)]
    times = [row.relative_time for row in summarized(write_run(tmp_path, of_two_rates, TIMES, name="more"))]
    assert times == [1.0, None, None], "b trained twice as many members as a"


def test_several_runs_are_shown_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = [record("a", 10, [1.0, 2.0], [0.5, 0.7], metric="validation_error")]
    paths = [
        write_run(tmp_path, name="one"),
        write_run(tmp_path, other, name="two"),
        write_run(tmp_path, other, name="sub/two"),
    ]
    found = report([*paths, paths[0]])
    assert found.page.resolve() == tmp_path / "report" / "report.html"
    names = ["one", "one", str(paths[1]), str(paths[2])]
    assert [row.run for row in found.rows] == names
    assert [row.label for row in found.rows[:2]] == ["one: a", "one: b"]
    assert [row.metric for row in found.rows] == ["test_error", "test_error", "validation_error", "validation_error"]
    read = runs.read_all(paths)
    held_out = charts.over_time(read, found.rows)[1]
    assert [(panel.title, len(panel.lines)) for panel in held_out.panels] == [
        ("test error %", 2), ("validation error %", 2),
    ]  # fmt: skip


def test_the_table_fits_the_terminal(tmp_path):
    records = [
        record(f"{arm}_with_a_name_of_some_length", 123456, [0.5, None], [0.1, 0.2], rate, "validation_error")
        for arm in ("a", "b") for rate in (0.001, 0.0003)
    ]  # fmt: skip
    text = printed(report([write_run(tmp_path, records, [("a", 123456, 1.0)])]).table, width=200)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 100


def test_steps_to_the_target_are_shown_where_all_seeds_reached_it(tmp_path):
    """The target is 0.1. A mean over those that reached it would flatter the rate at which one did not."""
    records = [
        *(record("a", step, [loss, 0.1], [0.1, 0.2], rate=0.1) for step, loss in ((10, 0.1), (20, 0.1))),
        *(record("a", step, [0.5, 0.1], [0.1, 0.2], rate=0.3) for step in (10, 20)),
    ]
    found = runs.read_all([write_run(tmp_path, records)])
    (chart,) = charts.sweep(found, summary.summarize(found))
    steps = chart.panels[-1]
    assert steps.title == "steps to the target loss"
    np.testing.assert_array_equal(steps.lines[0].mean, [10, np.nan])
    np.testing.assert_allclose(chart.panels[1].lines[0].mean, [0.1, 0.3])
