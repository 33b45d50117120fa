"""The benchmark's figures, and what the command writes."""

import importlib.util
import json
import subprocess
import sys

import jax
import pytest

from experiments.bench import libraries, measure, networks, rows, table
from experiments.bench.arms import Arm, CannotError
from experiments.bench.libraries import linen, ours
from experiments.bench.rows import Row
from tests.experiments.commands import ROOT, invoke


def arm(name, against="plain", peak=None):
    return Arm(name, against, lambda steps: None, lambda: 1.0, peak, 0.25)


def test_figures_against_numbers_worked_out_by_hand():
    made = {"plain": arm("plain", peak=100), "own": arm("own", peak=150)}
    times = {"plain": [1.0, 2.0, 4.0], "own": [1.1, 2.4, 4.0]}
    compilations = {"plain": [1.0, 2.0, 4.0], "own": [3.0, 4.0, 10.0]}
    cell = measure.cell(made["own"], made, times, compilations)
    assert cell.ratio == pytest.approx(1.1)  # the median of 1.1, 1.2 and 1
    assert cell.spread == pytest.approx((1.05, 1.15))
    assert cell.compile_ratio == 2.5  # of 3, 2 and 2.5
    assert (cell.memory_ratio, cell.peak_memory, cell.deviation) == (1.5, 150, 0.25)
    without = measure.cell(arm("x", "x"), {"x": arm("x", "x")}, {"x": [1.0]}, {"x": []})
    assert (without.ratio, without.compile_ratio, without.memory_ratio) == (1.0, None, None)


@pytest.fixture
def small(monkeypatch):
    """Two small rows, of two libraries and one that fails, timed in no time."""
    monkeypatch.setattr(measure, "_SECONDS_PER_TURN", 1e-4)
    monkeypatch.setattr("jax.clear_caches", lambda: None)  # the tests that follow have use for them
    monkeypatch.setattr(rows, "NETWORKS", {"mlp": lambda: networks.mlp(6)})
    own = (Row("train x2", "mlp", 2, quick=True), Row("serve x1", "mlp", 1, "serve"))
    monkeypatch.setattr(rows, "ROWS", {row.name: row for row in own})

    def fails(row):
        raise CannotError("it does not know how") if row.work == "serve" else RuntimeError("it broke\nand more")

    def arms(row, names):
        made = {"wn_jax": ours.arms, "linen": linen.arms, "nnx": fails}
        return {name: lambda make=make: make(row) for name, make in made.items()}

    monkeypatch.setattr(measure, "arms", arms)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.mark.slow
def test_the_command_writes_tables_figures_and_a_chart(small, tmp_path):
    result = invoke("bench", "--seconds", 1, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert not jax.config.jax_enable_compilation_cache, "a cache of the user's would be taken for the time to compile"
    assert "no nnx: RuntimeError: it broke\n" in result.output
    assert "no nnx: it does not know how" in result.output
    report = json.loads((tmp_path / "out" / "bench.json").read_text())
    train, serve = report["rows"]
    assert report["environment"]["devices"][0].startswith("cpu")
    ways = {"on weights", "on outputs", "projected", "carried", "norm for free"}
    assert set(train["cells"]) == {"linen plain", "control", "wn_jax", "linen", *ways}
    assert set(serve["cells"]) == {"linen plain", "control", "wn_jax", "linen", "folded"}
    for row in (train, serve):
        assert row["bytes"][1] > row["bytes"][0] > 0
        for cell in row["cells"].values():
            assert min(cell["milliseconds"]) > 0
            assert cell["deviation"] < 1e-5
            assert len(cell["compile_seconds"]) == 3
    page = (tmp_path / "out" / "bench.md").read_text()
    assert "| row | plain ms | bound | wn_jax | flax.linen | control |" in page
    assert (tmp_path / "out" / "bench.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_ctrl_c_leaves_the_rows_before_it(small, tmp_path, monkeypatch):
    whole = measure.measure

    def stop(row, *rest):
        if row.work == "serve":
            raise KeyboardInterrupt
        return whole(row, *rest)

    monkeypatch.setattr(measure, "measure", stop)
    result = invoke("bench", "--seconds", 1, "--out", tmp_path)
    assert result.exit_code == 130
    assert "the rows that were done are in " in result.stderr
    assert "train x2" in result.output
    assert "Traceback" not in result.output
    assert [row["row"]["name"] for row in json.loads((tmp_path / "bench.json").read_text())["rows"]] == ["train x2"]


def test_rows_are_chosen_by_name_and_by_pattern():
    assert [row.name for row in rows.choose(["gru*", "mlp-1024 x8", "mlp-1024 x*"], quick=True)][:2] == [
        "gru x32",
        "mlp-1024 x8",
    ]
    assert all(row.quick for row in rows.choose([], quick=True))
    assert len(rows.choose([], quick=False)) == len(rows.ROWS)


def test_on_an_accelerator_each_row_comes_in_two_dtypes(monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    assert [row.title for row in rows.choose(["gru x32"], quick=False)] == ["gru x32", "gru x32, bfloat16"]


def test_all_columns_have_an_arm():
    assert set(table.LIBRARIES) >= set(libraries.choose((), quick=False))


FREED = """
import resource, sys
from experiments.bench import memory
assert sys.argv[1] == "default" or memory.keep()
before = int(open("/proc/self/statm").read().split()[1])
block = b'x' * 10**8
block = None
print((int(open("/proc/self/statm").read().split()[1]) - before) * resource.getpagesize())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_freed_memory_is_kept():
    left = [int(subprocess.check_output([sys.executable, "-c", FREED, way], cwd=ROOT)) for way in ("default", "keep")]
    assert left[0] < 10**7 < 9 * 10**7 < left[1]


def test_nothing_but_what_is_required_need_be_installed(monkeypatch):
    find = importlib.util.find_spec
    absent = ("equinox", "paramax", "torch")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in absent else find(name))
    assert libraries.choose((), quick=False) == ["wn_jax", "linen", "nnx"]


def test_a_library_comes_with_what_it_is_compared_with():
    assert libraries.choose(("paramax",), quick=True) == ["wn_jax", "equinox", "paramax"]
