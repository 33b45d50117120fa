"""The report on `conditioning.jsonl`, on records made up here, against numbers worked out by hand."""

import json

import numpy as np
import pytest

from experiments.errors import ConfigError
from experiments.report import curvature, report
from experiments.run_folder.conditioning import LEVELS
from tests.experiments.run_folders import write_run


def measured(coordinates, seed, step, to_mean, cosine=0.5, size=50):
    above = np.where(LEVELS < 1e-3, 1.0, 0.25).tolist()
    fisher = {"size": size, "to_mean": to_mean, "to": {"10": 2.0}, "numerical_range": 4.0, "above": above}
    return {
        "seed": seed, "step": step, "coordinates": coordinates, "loss": 1.0, "difference": 1e-7,
        "cosine_natural": cosine, "cosine_gradient": 1.0, "decrease": 0.25, "matrices": {"fisher": fisher},
    }  # fmt: skip


RECORDS = [
    measured("plain", 0, 0, 10.0),
    measured("weight norm", 0, 0, 20.0),
    measured("plain", 1, 0, 30.0),
    measured("weight norm", 1, 0, 30.0),
    measured("plain", 0, 5, 40.0),  # a place that was not measured as a whole
]


def run(tmp_path, records=RECORDS, name="run"):
    path = write_run(tmp_path, name=name)
    (path / "conditioning.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_the_summary_against_numbers_worked_out_by_hand(tmp_path):
    path = run(tmp_path)
    report([path])
    rows = {
        (row["parametrization"], row["quantity"]): row
        for row in json.loads((path / "curvature.json").read_text())
        if row["step"] == 0
    }
    plain, ours = (rows[name, "Fisher matrix: largest / mean"] for name in ("plain", "weight norm"))
    assert (plain["mean"], plain["se"]) == (20, pytest.approx(10))
    assert (ours["mean"], ours["se"]) == (25, pytest.approx(5))
    # the ratios are 2 and 1: not the ratio of the means
    assert (ours["over_plain_mean"], ours["over_plain_se"]) == (1.5, pytest.approx(0.5))
    assert rows["plain", "best step's decrease %"]["mean"] == 25
    assert rows["plain", "Fisher matrix: largest / smallest"]["mean"] == 4
    assert not [row for row in json.loads((path / "curvature.json").read_text()) if row["step"] == 5]


def test_the_figures_and_the_table(tmp_path):
    found = curvature.read(run(tmp_path), "run")
    charts = {chart.id: chart for chart in curvature.charts(found, named=False)}
    assert list(charts) == ["condition", "tenth", "spectrum", "alignment", "decrease"]
    line = charts["condition"].panels[0].lines[1]
    assert (line.label, line.x.tolist(), line.mean.tolist(), line.error.tolist()) == ("weight norm", [0], [25], [5])
    spectrum = charts["spectrum"].panels[0].lines[0]
    np.testing.assert_allclose(spectrum.mean[spectrum.x < 0.99e-3], 1)
    np.testing.assert_allclose(spectrum.mean[spectrum.x > 1.01e-3], 0.25)
    table = {column.title: column.cells for column in curvature.columns(found)}
    assert table["Fisher matrix: largest / mean, step 0"] == ["20.0 ± 10.0", "25.0 ± 5.0"]
    assert table["cosine with natural gradient, step 0"] == ["0.500 ± 0.000"] * 2


def test_the_smallest_eigenvalue_is_not_shown_where_it_is_rounding(tmp_path):
    found = curvature.read(run(tmp_path, [measured("plain", 0, 0, 10.0, size=5000)]), "run")
    assert not [column for column in curvature.columns(found) if "smallest" in column.title]
    assert "One seed" in curvature.caption(found)


def test_nor_where_not_all_eigenvalues_are_known_or_it_is_no_property_of_the_problem(tmp_path):
    """As of a Hessian, which weight norm gives an eigenvalue that goes to 0 with the gradient."""
    own = measured("plain", 0, 0, 10.0)
    fisher = own["matrices"]["fisher"]
    for number, matrices in enumerate(({"fisher": {**fisher, "exact": False}}, {"hessian": fisher})):
        found = curvature.read(run(tmp_path, [{**own, "matrices": matrices}], name=str(number)), "run")
        assert not [column for column in curvature.columns(found) if "smallest" in column.title]


def test_of_two_runs_each_has_figures_of_its_own(tmp_path):
    paths = [run(tmp_path, name=name) for name in ("one", "two")]
    out = tmp_path / "out"
    report(paths, out)
    assert {path.name for path in (out / "figures").iterdir()} >= {"condition-one.png", "condition-two.png"}
    assert (out / "curvature-one.json").exists()
    ids = [line.split('"')[1] for line in (out / "report.html").read_text().splitlines() if "<figure id=" in line]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", "line 1: seed, step, coordinates, loss, .* missing; remove or mend the line"),
        ("what", "line 1: not valid JSON"),
    ],
)
def test_a_damaged_file_is_named(line, message, tmp_path):
    path = run(tmp_path, [])
    (path / "conditioning.jsonl").write_text(line + "\n")
    with pytest.raises(ConfigError, match=message):
        report([path])


def test_a_run_that_measured_nothing_has_no_such_part(tmp_path):
    path = run(tmp_path, [])
    report([path])
    assert not (path / "curvature.json").exists()
    assert "Curvature at the same function" not in (path / "report.html").read_text()
