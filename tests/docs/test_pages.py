"""The pages about Keras, recurrent cells and questions run, and links between documents lead somewhere."""

import importlib.util
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import wn_jax as wn
from tests.docs.documents import ROOT, run

DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))


@pytest.mark.slow
def test_the_page_of_questions_runs():
    run("docs/questions.md")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="needs Keras")
def test_the_page_about_keras_runs():
    # In a process of its own: Keras takes its backend when it is first imported, for as long as the process lives.
    code = "from tests.docs.documents import run; run('docs/keras.md')"
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def primitives_in_loops(jaxpr, inside=False):
    """The names of all primitives in the bodies of a program's scans."""
    names = set()
    for eqn in jaxpr.eqns:
        looped = inside or eqn.primitive.name == "scan"
        if inside:
            names.add(eqn.primitive.name)
        for value in eqn.params.values():
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                names |= primitives_in_loops(getattr(value, "jaxpr", value), looped)
    return names


@pytest.mark.slow
def test_the_page_about_recurrent_cells_runs_and_norms_are_computed_before_the_loop():
    page = run("docs/recurrent.md")
    x, gru = page["x"], page["gru"]
    nodes = page["params"]["gru"]
    assert "dot_general" in primitives_in_loops(jax.make_jaxpr(wn.wrap(gru.apply))(nodes, x).jaxpr)
    assert not {"sqrt", "rsqrt"} & primitives_in_loops(jax.make_jaxpr(wn.wrap(gru.apply))(nodes, x).jaxpr)

    def in_each_step(nodes, x):
        def step(state, row):
            params = wn.reconstruct(nodes)["params"]["cell"]
            return jnp.tanh(row @ params["in"]["kernel"] + state @ params["hn"]["kernel"]), None

        return jax.lax.scan(step, jnp.zeros((len(x), 8)), x.swapaxes(0, 1))[0]

    assert {"sqrt", "rsqrt"} & primitives_in_loops(jax.make_jaxpr(in_each_step)(nodes, x).jaxpr)  # so it can be seen


def anchors(text):
    """The anchors that GitHub gives to headings."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.strip().replace(" ", "-") for title in kept}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", *DOCUMENTS])
def test_links_lead_to_files_and_headings(name):
    text = re.sub(r"```.*?```", "", (ROOT / name).read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text()), target
