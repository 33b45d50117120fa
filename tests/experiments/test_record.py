"""The records of a run: as types, as lines of a file, and what is said of a line that is none."""

import json
import math
import re

import pytest

from experiments.errors import ConfigError
from experiments.run_folder import record
from experiments.run_folder.record import Record

WHOLE = Record(
    arm="a",
    learning_rate=0.1,
    step=20,
    figures={"train_loss": [0.5, None], "test_error": [0.25, 0.5]},
    by_layer={"effective_step": {"Dense_0/kernel": [1.0, 2.0]}, "norms": {"Dense_0/kernel": [3.0, 4.0]}},
    nonfinite_step=[None, 13],
    at_fault={"1": "kl"},
)
LINE = (
    '{"arm": "a", "learning_rate": 0.1, "step": 20, "train_loss": [0.5, null], "test_error": [0.25, 0.5], '
    '"effective_step": {"Dense_0/kernel": [1.0, 2.0]}, "norms": {"Dense_0/kernel": [3.0, 4.0]}, '
    '"nonfinite_step": [null, 13], "at_fault": {"1": "kl"}}\n'
)
BARE = Record("a", 0.1, 20, {"train_loss": [0.5, 0.25]})


def test_a_line_has_the_keys_in_this_order():
    assert record.line(WHOLE.to_json()) == LINE


def test_what_is_empty_has_no_key():
    assert list(BARE.to_json()) == ["arm", "learning_rate", "step", "train_loss"]


@pytest.mark.parametrize("original", [WHOLE, BARE])
def test_a_record_is_what_its_line_is_read_as(original, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(record.line(original.to_json()))
    assert record.read_metrics(tmp_path / "metrics.jsonl") == [original]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_null_wherever_it_stands(number):
    written = Record("a", 0.1, 20, {"train_loss": [number, 0.5]}, {"norms": {"x": [1.0, number]}})
    found = json.loads(record.line(written.to_json()))
    assert (found["train_loss"], found["norms"]) == ([None, 0.5], {"x": [1.0, None]})


def test_marks_are_no_figures_and_layers_have_tags_of_their_own():
    assert [tag for tag, _ in WHOLE.by_tag()] == [
        "train_loss", "test_error", "norms/Dense_0/kernel", "effective_step/Dense_0/kernel",
    ]  # fmt: skip
    assert dict(WHOLE.by_tag())["norms/Dense_0/kernel"] == [3.0, 4.0]


def changed(**changes):
    """The line with other values; None takes the key out."""
    return {key: value for key, value in {**WHOLE.to_json(), **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (changed(arm=None), "arm is 'missing'; is this file from another program?"),
        (changed(arm=3), "arm is 3; is this file from another program?"),
        (changed(learning_rate="0.1"), "learning_rate is '0.1'; is this file from another program?"),
        (changed(step=2.5), "step is 2.5; is this file from another program?"),
        (changed(train_loss=0.5), "train_loss is 0.5; is this file from another program?"),
        (changed(train_loss=[]), "train_loss must be a list of 1 numbers, one a seed; got []"),
        (changed(test_error=[0.5]), "test_error must be a list of 2 numbers, one a seed; got [0.5]"),
        (changed(test_error=[0.5, "x"]), "test_error must be a list of 2 numbers, one a seed; got [0.5, 'x']"),
        (changed(nonfinite_step=[1]), "nonfinite_step must be a list of 2 numbers, one a seed; got [1]"),
        (changed(norms={"x": 1.0}), "norms, x must be a list of 2 numbers, one a seed; got 1.0"),
    ],
)
def test_a_line_that_is_no_record_is_told_with_its_number(line, message, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(map(record.line, [changed(arm="b"), line])))
    with pytest.raises(ConfigError, match=re.escape(f"{path}, line 2: {message}")):
        record.read_metrics(path)


def test_an_arm_has_as_many_seeds_at_a_rate_as_its_first_record_says(tmp_path):
    path, later = tmp_path / "metrics.jsonl", Record("a", 0.1, 30, {"train_loss": [0.5]})
    other = Record("a", 0.2, 20, {"train_loss": [0.5]})
    path.write_text("".join(record.line(own.to_json()) for own in (BARE, other, later)))
    with pytest.raises(ConfigError, match=r"line 3: train_loss must be a list of 2 numbers, one a seed; got \[0\.5\]"):
        record.read_metrics(path)


def test_times_are_read_by_arm_and_step(tmp_path):
    path = tmp_path / "times.jsonl"
    assert record.read_seconds(path) == {}
    times = [record.Time("a", 10, 0.5), record.Time("b", 10, 1.5), record.Time("a", 20, 0.25)]
    path.write_text("".join(record.line(time._asdict()) for time in times))
    assert record.read_seconds(path) == {"a": {10: 0.5, 20: 0.25}, "b": {10: 1.5}}
    path.write_text('{"arm": "a", "step": 10}\n')
    with pytest.raises(ConfigError, match=r"line 1: expected arm, step and seconds_per_step; got \{'arm': 'a', 'step"):
        record.read_seconds(path)


def test_lines_to_go_on_from_keep_what_this_version_does_not_know(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert record.read_records(path) == []
    old = {"step": 10, "new": {"x": 1}, "arm": "a"}
    path.write_text(record.line(old) + '{"step": "x"}\n')
    assert record.read_records(path, strict=False) == [old]
    with pytest.raises(ConfigError, match="line 2: has no arm or no step; remove or mend the line"):
        record.read_records(path)


def test_lines_of_curvature_say_where_it_was_measured(tmp_path):
    path = tmp_path / "conditioning.jsonl"
    assert record.read_measured(path) == []
    place = {"seed": 0, "step": 10, "coordinates": "plain", "loss": 0.5}
    path.write_text(record.line(place))
    assert record.read_measured(path) == [place]
    path.write_text(record.line(place) + '{"seed": 0, "step": 10}\n')
    with pytest.raises(ConfigError, match="line 2: has no seed, step or coordinates; remove or mend the line"):
        record.read_measured(path)
