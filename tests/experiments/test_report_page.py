"""The page and the pictures of a report: what is on them, that it is well-formed, and that a browser shows it."""

import html.parser
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest

from experiments.report import charts, curves, report, svg
from tests.experiments.run_folders import CONFIG, ENVIRONMENT, TIMES, printed, record, write_run

CHROMIUM = os.environ.get("WN_JAX_CHROMIUM") or next(
    filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome", "chrome"])), None
)


class Page(html.parser.HTMLParser):
    """The parts of a page that a test asks for: its elements with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def having(self, attribute):
        return [attributes[attribute] for _, attributes in self.elements if attribute in attributes]


def layered(rate, **rest):
    statistics = {"norms": {"Dense_0": [1.0, 3.0]}, "effective_step": {"Dense_0": [0.1, 0.3]}}
    return [record("a", step, [1 / step, 1 / step], [0.1, 0.3], rate, **statistics, **rest) for step in (10, 20)]


def test_a_page_holds_every_figure_and_what_the_run_took(tmp_path):
    page = Page(report([write_run(tmp_path, [*layered(0.1), *layered(0.3)], TIMES)]).page.read_text())
    figures = [attributes["id"] for tag, attributes in page.elements if tag == "figure"]
    assert figures == ["loss", "held-out", "learning-rate", "norms", "effective-step"]
    # Error, loss and steps to the target against the rate; then a panel for each rate, twice.
    assert page.having("role").count("img") == 1 + 1 + 3 + 2 + 2
    assert (
        "training loss (minibatch mean) against step. a, rate 0.1: 0.1 at step 10, then 0.05"
        in page.having("aria-label")[0]
    )
    held_out = json.loads(page.having("data-readout")[1])
    assert held_out["lines"][0]["values"] == [[20.0, 10.0], [20.0, 10.0]]
    assert held_out["at"] == ["step 10", "step 20"]
    for text in (*ENVIRONMENT["devices"], "c0ffee", "jax 0.10.0", ENVIRONMENT["started"], CONFIG):
        assert text.strip() in page.text
    ids = page.having("id")
    assert len(ids) == len(set(ids))
    assert not [value for _, element in page.elements for key, value in element.items()
                if key in ("src", "href", "xlink:href") and not value.startswith("#")]  # fmt: skip


def test_many_devices_are_counted(tmp_path):
    environment = {**ENVIRONMENT, "devices": ["tpu: TPU v5e"] * 8 + ["cpu: cpu"], "processes": 2}
    assert (
        "8 x tpu: TPU v5e, cpu: cpu in 2 processes"
        in report([write_run(tmp_path, environment=environment)]).page.read_text()
    )


def test_odd_names_are_text_on_the_page(tmp_path):
    name = "_<b onclick='x'>&\"$x^$ [red]"
    odd = [record(name, 10, [1.0, None], [0.1, 0.2], norms={name: [1.0, 2.0]}, metric="test_<i>_error")]
    environment = {**ENVIRONMENT, "command": "<script>alert(1)</script>", "resumed": [{**ENVIRONMENT, "commit": "<u>"}]}
    found = report([write_run(tmp_path, odd, config=f"{CONFIG}# <script>\n", environment=environment)])
    page = Page(found.page.read_text())
    assert name in page.text
    assert {tag for tag, _ in page.elements}.isdisjoint({"b", "u"})
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert "seed 6" in page.text, "the second seed of those from 5 on diverged"
    assert name[:8] in printed(found.table)


def test_a_page_of_five_long_arms_is_small(tmp_path):
    layers = {f"Dense_{layer}/kernel": [1.0, 2.0] for layer in range(6)}
    records = [
        record(f"arm{arm}", step, [1 / step, 2 / step], [0.1, 0.3], norms=layers, effective_step=layers)
        for step in range(1, 801) for arm in range(5)
    ]  # fmt: skip
    assert 100_000 < report([write_run(tmp_path, records)]).page.stat().st_size < 2_000_000


@pytest.mark.parametrize("loss", [[-1.0], [0.0], [None]])
def test_losses_that_no_logarithm_has_are_drawn(tmp_path, loss):
    path = write_run(tmp_path, [record("a", 10, loss), record("a", 20, loss)])
    assert "<svg" in report([path]).page.read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; WN_JAX_CHROMIUM names one")
def test_the_page_opens_in_a_browser(tmp_path):
    page = report([write_run(tmp_path, [*layered(0.1), *layered(0.3)])]).page
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    for id_ in ("loss", "held-out", "learning-rate", "norms", "effective-step"):
        figure = re.search(f'<figure id="{id_}".*?</figure>', dom, re.DOTALL)[0]
        assert "<path" in figure
        assert 'class="cursor"' in figure, "the script has not run"


def test_ticks_are_whole_numbers_though_paths_are_rounded():
    line = charts.Line("a", 0, np.array([1, 2]), np.array([0.0012, 0.04]), np.zeros(2))
    (picture,) = svg.pictures(charts.Chart("x", "", "", [charts.Panel("", "step", "loss", [line], log_y=True)]))
    assert {"0.002", "0.005", "0.01", "0.02"} <= set(re.findall(">([^<]*)<", picture.svg))
    assert not re.findall(r'="[^"]*\d\.\d{3}', picture.svg)


def test_every_line_of_a_figure_looks_different():
    lines = [charts.Line("", style, *np.zeros((3, 1))) for style in range(28)]
    assert len({curves.look(line) for line in lines}) == 28
