"""The guide to porting runs, as printed."""

import pytest

from tests.docs.documents import run


@pytest.mark.slow
def test_the_guide_runs(capsys):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    run("docs/porting.md")
    assert capsys.readouterr().out == "(-2, -1) (32, 80, 7) (32, 1, 1)\n"
