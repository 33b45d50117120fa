"""The layout shows the architecture: imports run downwards, and files and functions stay short.

Both packages are ordered once, here, from what everything may use to what uses everything. A new room needs a place in
this order.
"""

import ast
import functools
from pathlib import Path

import pytest

from tests.experiments.commands import ROOT, invoke

ORDER = {
    "wn_jax": [
        ["_types", "_pickles"],
        ["_norms", "_boxes"],
        ["_node"],
        ["_tree", "_interop"],
        ["_foreign"],
        ["_transform", "_sharding", "_by_path", "_from_dicts"],
        ["_shard_map", "_calls"],
        ["_program"],
        ["_uses"],
        ["_wrap", "_data_init"],
        ["_mean_only", "_flax_weight_norm"],
        ["optim", "linen", "nnx", "equinox"],
        ["curvature", "_saving"],
        ["torch"],
        ["__init__"],
    ],
    "wn_jax._data_init": [
        ["grid", "statistics"],
        ["plan"],
        ["initialize"],
        ["__init__"],
    ],
    "wn_jax._program": [
        ["__init__", "jaxpr"],
        ["facts", "contractions", "factored", "dead_code"],
        ["views", "products", "repeats"],
        ["notes", "cuts"],
        ["values", "moves"],
        ["walk", "run"],
        ["reading"],
        ["strict"],
    ],
    "wn_jax._saving": [
        ["files", "facts", "kinds"],
        ["file_format", "nodes"],
        ["trees"],
        ["__init__"],
    ],
    "experiments": [
        ["__init__", "errors"],
        ["schema", "drawing"],
        ["files"],
        ["environment", "parametrizations", "processes"],
        ["optimizers"],
        ["data"],
        ["tasks"],
        ["devices"],
        ["config"],
        ["run_folder"],
        ["engine", "report"],
        ["conditioning", "tpu", "vocoder", "bench"],
        ["cli"],
        ["__main__"],
    ],
}
FOLDERS = ["wn_jax", "experiments", "tests"]


def sources(folder):
    """The files of a folder, with their syntax trees."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        yield path, ast.parse(path.read_text())


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@functools.cache
def modules():
    """The names of all modules here."""
    return {module_of(path).removesuffix(".__init__") for folder in FOLDERS for path, _ in sources(folder)}


def imported(tree):
    """The modules that a file imports, by their whole names."""
    known = modules()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are written by their whole names"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in known else node.module


def room(module, package):
    """The part of a package that a module is in."""
    return module.removeprefix(f"{package}.").partition(".")[0] if module != package else "__init__"


def test_help_reads():
    commands = ["compare", "train", "sweep", "conditioning", "report", "fetch", "bench", "overhead", "vocoder"]
    commands += ["tpu-compile"]
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


@pytest.mark.parametrize("package", ORDER)
def test_imports_run_downwards(package):
    """From a room to one that stands below it in the order; and not across, so that there is no circle."""
    level = {name: i for i, names in enumerate(ORDER[package]) for name in names}
    for path, tree in sources(package.replace(".", "/")):
        own = room(module_of(path), package)
        assert own in level, f"{path}: give its room a place in ORDER"
        for module in imported(tree):
            if not f"{module}.".startswith(f"{package}.") or (other := room(module, package)) == own:
                continue
            assert level[other] < level[own], f"{path} imports {module}, which stands beside or above it"


@pytest.mark.parametrize("package", ["wn_jax", "experiments"])
def test_no_two_files_need_each_other(package):
    """No circle between files, of any length."""
    graph = {module_of(path).removesuffix(".__init__"): set(imported(tree)) for path, tree in sources(package)}
    left = {module: names & set(graph) - {module} for module, names in graph.items()}
    while leaves := [module for module, names in left.items() if not names]:
        left = {module: names - set(leaves) for module, names in left.items() if module not in leaves}
    assert not left, f"a circle among {sorted(left)}"


def test_the_library_has_few_rooms():
    packages = {path.parent for path in (ROOT / "wn_jax").glob("*/__init__.py")}
    assert len(list((ROOT / "wn_jax").glob("*.py"))) + len(packages) < 30


def test_nothing_below_the_command_line_prints_tables():
    for path, tree in sources("experiments"):
        if "cli" not in path.relative_to(ROOT).parts:
            assert not {module.partition(".")[0] for module in imported(tree)} & {"typer", "rich"}, path


def documented(tree):
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return [(node, text) for node in ast.walk(tree) if isinstance(node, kinds) and (text := ast.get_docstring(node))]


def code_lines(function, text):
    """The lines of a function but for docstrings, comments and blank ones."""
    prose = set()
    for node in ast.walk(function):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            prose |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = text.splitlines()[function.lineno - 1 : function.end_lineno]
    code = [number for number, line in enumerate(lines, function.lineno) if line.strip() and line.strip()[0] != "#"]
    return len(set(code) - prose)


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_stay_short(folder):
    for path, _ in sources(folder):
        assert len(path.read_text().splitlines()) <= 500, path


@pytest.mark.parametrize("package", ["wn_jax", "experiments"])
def test_functions_stay_short(package):
    for path, tree in sources(package):
        text = path.read_text()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert code_lines(node, text) <= 40, f"{path}: {node.name}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_say_the_noun_or_the_verb(folder):
    for path, tree in sources(folder):
        for node, text in documented(tree):
            assert not text.startswith("What "), f"{path}: {getattr(node, 'name', 'its first line')}"


def test_each_folder_of_tests_is_a_package():
    """Else `tests/torch` could stand in for torch, and `tests/nnx` for a module of that name."""
    folders = {path.parent for path in Path(ROOT / "tests").rglob("*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders)
