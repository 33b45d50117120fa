"""What holds for every file: experiments use public names only, and files stay short."""

import ast

import pytest

from tests.experiments.commands import ROOT, invoke


def test_help_reads():
    commands = ["compare", "train", "sweep", "conditioning", "report", "fetch", "bench", "overhead", "vocoder"]
    for command in ([], *([name] for name in commands)):
        result = invoke(*command, "--help")
        assert result.exit_code == 0
        assert "Usage: " in result.output


def test_experiments_import_only_public_names():
    for path in (ROOT / "experiments").rglob("*.py"):
        for statement in ast.walk(ast.parse(path.read_text())):
            if isinstance(statement, ast.ImportFrom) and (statement.module or "").split(".")[0] == "wn_jax":
                names = [*statement.module.split("."), *(alias.name for alias in statement.names)]
            elif isinstance(statement, ast.Import):
                names = [
                    part
                    for alias in statement.names
                    if alias.name.startswith("wn_jax")
                    for part in alias.name.split(".")
                ]
            elif (
                isinstance(statement, ast.Attribute)
                and isinstance(statement.value, ast.Name)
                and statement.value.id == "wn"
            ):
                names = [statement.attr]
            else:
                continue
            assert not any(name.startswith("_") and name != "__version__" for name in names), path


@pytest.mark.parametrize("folder", ["wn_jax", "experiments", "tests"])
def test_files_stay_short(folder):
    for path in (ROOT / folder).rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 300, path
