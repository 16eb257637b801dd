"""The layout of the code: no import cycle, one place that imports the tasks, short files, a short loop and step.

Imports are read, not run: late ones inside functions and those under TYPE_CHECKING count like any other. A unit is a
folder or a file directly in sbs_jax; tasks is one unit. sbs_jax/export/artefact is code that runs elsewhere: left out.
"""

import ast
import functools
import graphlib
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("sbs_jax", "tasks")
    for path in sorted((ROOT / package).rglob("*.py"))
    if "artefact" not in path.relative_to(ROOT).parts
}


def imports(path: Path) -> set[str]:
    """Lists everything that a file imports; a submodule of ours under its own name, not its package's."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = node.module
            assert package is not None, f"{path}:{node.lineno} is a relative import."
            names = (f"{package}.{alias.name}" for alias in node.names)
            found |= {name if name in FILES else package for name in names}
    return found


@functools.cache
def imported() -> dict[str, set[str]]:
    """Maps each module to what it imports; read at the first use, not by every worker that collects this file."""
    return {module: imports(path) for module, path in FILES.items()}


def unit(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "sbs_jax" else parts[0]


def cycle(node_of: Callable[[str], str]) -> list[str]:
    """Returns an import cycle, each node importing the next and the last the first; empty if there is none."""
    graph: dict[str, set[str]] = {}
    for module, others in imported().items():
        if module != "sbs_jax":
            nodes = {node_of(other) for other in others & FILES.keys() if other != "sbs_jax"}
            graph.setdefault(node_of(module), set()).update(nodes - {node_of(module)})
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1][::-1]
    return []


def test_no_files_import_one_another() -> None:
    found = cycle(str)
    assert not found, " imports ".join(found)


def test_no_units_import_one_another() -> None:
    found = cycle(unit)
    assert not found, " imports ".join(found)


def test_only_the_command_line_imports_the_tasks() -> None:
    importers = {unit(module) for module, names in imported().items() if any(unit(name) == "tasks" for name in names)}
    assert importers - {"tasks"} == {"sbs_jax.cli"}


def test_the_package_imports_neither_scripts_nor_tests() -> None:
    outside = {"scripts", "tests", *(path.stem for name in ("scripts", "tests") for path in (ROOT / name).glob("*.py"))}
    found = {
        module: {name for name in names if name.partition(".")[0] in outside} for module, names in imported().items()
    }
    assert {module: names for module, names in found.items() if names} == {}


def test_no_test_file_imports_another() -> None:
    """Shared builders are in tests/builders/."""
    tests = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    found = {
        path.name: {name for name in imports(path) if name.rpartition(".")[2] in tests}
        for path in (ROOT / "tests").rglob("*.py")
    }
    assert {file: names for file, names in found.items() if names} == {}


def test_files_and_folders_are_few_enough_to_read() -> None:
    lengths = {module: len(path.read_text("utf-8").splitlines()) for module, path in FILES.items()}
    assert {module: count for module, count in lengths.items() if count > 600} == {}
    assert sum(1 for _ in (ROOT / "sbs_jax").glob("*/__init__.py")) <= 17


@pytest.mark.parametrize(
    ("function", "most"),
    [("train", 90), ("train_step", 45)],
)
def test_the_loop_and_the_step_are_short(function: str, most: int) -> None:
    [lines] = [
        (node.end_lineno or 0) - node.lineno + 1
        for module, path in FILES.items()
        if unit(module) == "sbs_jax.training"
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == function
    ]
    assert lines <= most
