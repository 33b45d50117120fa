"""Files in which anything may stand, or that are none: one message each, which names the file; nobody waits."""

import codecs
import json
import os

import pytest

from experiments import environment, files
from experiments.config import toml_file
from experiments.errors import ConfigError
from experiments.report import curvature, runs
from experiments.run_folder.folder import check
from tests.experiments.commands import DIGITS
from tests.experiments.run_folders import record, write_run
from tests.experiments.test_report_curvature import measured

NO_FILES = {
    "a folder": lambda path: path.mkdir(),
    "a FIFO": os.mkfifo,
    "a device without an end": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to itself": lambda path: path.symlink_to(path),
}


def message(path, what, *arguments):
    """The one message, which names the file and is short."""
    with pytest.raises(ConfigError) as caught:
        what(*arguments)
    text = str(caught.value)
    assert str(path) in text
    assert len(text) < 700 + len(str(path))
    return text


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_neither_read_nor_waited_for(kind, tmp_path):
    config = tmp_path / "config.toml"
    NO_FILES[kind](config)
    assert "cannot be read: " in message(config, toml_file.load, config)
    for name in ("environment.json", "metrics.jsonl", "times.jsonl", "conditioning.jsonl"):
        run = write_run(tmp_path, name=name.partition(".")[0])
        (run / name).unlink(missing_ok=True)
        NO_FILES[kind](run / name)
        assert "cannot be read: " in message(run / name, lambda run=run: curvature.read(runs.read(run).path, "run"))
    assert "cannot be read: " in message(run / name, environment.of_run, run / name, {})


@pytest.mark.parametrize("kind", NO_FILES)
def test_only_files_are_written_over(kind, tmp_path):
    path = tmp_path / "report.html"
    NO_FILES[kind](path)
    before = os.lstat(path)
    if kind == "a link to nothing":
        files.write(path, "new")
        assert (path.is_symlink(), (tmp_path / "nothing").read_text()) == (True, "new")
        return
    with pytest.raises(OSError):  # noqa: PT011 (in the system's words)
        files.write(path, "new")
    assert (os.lstat(path), os.listdir(tmp_path)) == (before, ["report.html"])


@pytest.mark.parametrize("folder", ["checkpoints", "pictures", "tensorboard"])
def test_a_file_in_a_folder_s_place_is_told_before_anything_is_trained(folder, tmp_path):
    experiment = toml_file.load(DIGITS)
    for kind in ("a FIFO", "a link to nothing"):
        run = tmp_path / kind
        run.mkdir()
        NO_FILES[kind](run / folder)
        text = message(run / folder, check, run, experiment, False)
        assert "is no folder, and a run needs one there; move it away, or choose another folder with --out" in text


TEXT = DIGITS.read_text()
ENCODINGS = {
    "UTF-16": (TEXT.encode("utf-16"), "is in UTF-16 or UTF-32, as its byte-order mark says; save it as UTF-8"),
    "UTF-16, the other way": (codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"), "is in UTF-16, as its byte-order mark"),
    "UTF-32": (codecs.BOM_UTF32_BE + TEXT.encode("utf-32-be"), "is in UTF-32, as its byte-order mark says"),
    "Latin-1": ("a = 1\n# ä".encode("latin-1"), "is not in UTF-8: unexpected end of data (at line 2); save it as"),
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_other_encodings_are_named(name, tmp_path):
    content, expected = ENCODINGS[name]
    (tmp_path / "it.toml").write_bytes(content)
    assert expected in message(tmp_path / "it.toml", toml_file.load, tmp_path / "it.toml")


def test_a_byte_order_mark_of_utf_8_is_none_of_the_content(tmp_path):
    (tmp_path / "it.toml").write_bytes(codecs.BOM_UTF8 + TEXT.encode())
    assert toml_file.load(tmp_path / "it.toml") == toml_file.load(DIGITS)
    run = write_run(tmp_path)
    for path in (run / "environment.json", run / "metrics.jsonl"):
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    assert len(runs.read(run).curves) == 2


BIG = "9" * 5000
NO_OBJECTS = {
    "[]": "must be a JSON object; got []",
    "null": "must be a JSON object; got None",
    json.dumps("x" * 100_000): "must be a JSON object; got 'xxx",
    "{": "not valid JSON",
    "[" * 100_000: "it is nested too deep",
    '{"a":' * 500 + "1" + "}" * 500: "tables and lists are nested more than 30 deep",
    f'{{"cpus": {BIG}}}': "a number cannot be read: Exceeds the limit (4300 digits)",
    f'{{"cpus": {10**30}}}': "an int has more than 64 bits",
    r'{"command": "\ud800"}': "has half a letter, a surrogate without its other one",
}


@pytest.mark.parametrize("number", range(len(NO_OBJECTS)))
def test_json_that_is_not_meant(number, tmp_path):
    text, expected = list(NO_OBJECTS.items())[number]
    run = write_run(tmp_path)
    (run / "environment.json").write_text(text)
    assert expected in message(run / "environment.json", runs.read, run)
    run = write_run(tmp_path, name="lines")
    (run / "metrics.jsonl").write_text(text + "\n")
    assert f"metrics.jsonl, line 1: {expected}" in message(run / "metrics.jsonl", runs.read, run)


ODD = {
    "environment.json": [
        ({"packages": ["jax"]}, "packages: Input should be a valid dictionary"),
        ({"devices": None}, "devices: Input should be a valid list"),
        ({"command": 5}, "command: Input should be a valid string; got 5; is it from another program?"),
        ({"resumed": [{"devices": 5}]}, "resumed, 0, devices: Input should be a valid list; got 5"),
        ({"resumed": "x"}, "resumed: Input should be a valid list; got 'x'"),
    ],
    "metrics.jsonl": [
        (record("a", 10, [1.0], norms=5), "line 1: norms must be a table of layers; got 5"),
        (record("a", 10, [1.0], effective_step=[1]), "effective_step must be a table of layers; got [1]"),
        (record("a", 10, [1.0], nonfinite_step=5), "nonfinite_step must be a list of 1 numbers, one a seed; got 5"),
        (record("a", 10, [1.0], nonfinite_step={}), "nonfinite_step must be a list of 1 numbers, one a seed; got {}"),
        (record("x" * 5000, 10, [1.0]), "which no folder of pictures can be called"),
        (record("a", 10, [1.0] * 1000 + ["x"]), "train_loss must be a list of 1001 numbers, one a seed; got [1.0, "),
    ],
    "times.jsonl": [({"arm": "a", "step": [1], "seconds_per_step": 1}, "expected arm, step and seconds_per_step")],
    "conditioning.jsonl": [
        (measured([1], 0, 0, 1.0), "line 1: coordinates: Input should be a valid string; got [1]"),
        (measured("plain", 0, None, 1.0), "step: Input should be a valid integer; got None"),
        (measured("plain", 0, 0, "x"), "matrices, fisher, to_mean: Input should be a valid number; got 'x'"),
        (measured("plain", 0, 0, 1.0) | {"matrices": 5}, "matrices: Input should be a valid dictionary; got 5"),
        (measured("plain", 0, 0, 1.0) | {"matrices": {"fisher": {"above": [1]}}}, "fisher, above: List should have at"),
        (measured("plain", 0, 0, 1.0) | {"decrease": {}}, "decrease: Input should be a valid number; got {}"),
    ],
}
CASES = [(name, number) for name, cases in ODD.items() for number in range(len(cases))]


@pytest.mark.parametrize(("name", "number"), CASES)
def test_values_of_other_types(name, number, tmp_path):
    content, expected = ODD[name][number]
    run = write_run(tmp_path)
    (run / name).write_text(json.dumps(content) + "\n")
    assert expected in message(run / name, lambda: curvature.read(runs.read(run).path, "run"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train = 5", "train: Input should be a valid dictionary"),
        ("[train]\nsteps = 'x'", "train, steps: Input should be a valid integer; got 'x'"),
        ("[train]\ntarget_loss = ['x']", "train, target_loss, 0: Input should be a valid number; got 'x'"),
        ("[train]\nfirst_seed = {}", "train, first_seed: Input should be a valid integer"),
        (f"[train]\nsteps = {BIG}", "a number cannot be read"),
    ],
)
def test_a_resolved_config_of_other_types(text, expected, tmp_path):
    run = write_run(tmp_path, config=text)
    assert expected in message(run / "config.toml", runs.read, run)


@pytest.mark.parametrize(
    "setting",
    ["x" * 100_000 + "=1", "data.name=" + "x" * 100_000, "optimizer.learning_rate=[" + "1," * 100_000 + "]",
     "conditioning.steps=[" + "1," * 100_000 + "]", "arms." + "x" * 100_000 + ".model.norm='none'"],
)  # fmt: skip
def test_however_much_is_given_the_message_is_short(setting):
    message(DIGITS, toml_file.load, DIGITS, [setting])


@pytest.mark.parametrize("content", ["", "\0\0\0", '{"comm'])
def test_a_run_goes_on_with_an_environment_that_was_cut_off(content, tmp_path):
    (tmp_path / "environment.json").write_text(content)
    found = environment.of_run(tmp_path / "environment.json", {})
    assert found is not None
    assert "resumed" not in found


def test_a_run_does_not_go_on_over_an_environment_of_something_else(tmp_path):
    path = tmp_path / "environment.json"
    for content in ("[1]", '{"resumed": 5}'):
        path.write_text(content)
        message(path, environment.of_run, path, {})
