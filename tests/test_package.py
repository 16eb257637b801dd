"""The package as users receive it: the wheel, the entry point, and allowed imports."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import sbs_jax

REPOSITORY = Path(__file__).resolve().parents[1]
SHIPPED = ("sbs_jax", "tasks", "gin_configs")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Packages whose import name differs from the name to install.
DISTRIBUTIONS = {
    "absl": "absl-py",
    "gin": "gin-config",
    "google.api_core": "google-api-core",
    "google.auth": "google-auth",
    "google.cloud": "google-cloud-storage",
    "google.genai": "google-genai",
    "mlflow": "mlflow-skinny",
    "orbax": "orbax-checkpoint",
}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (REPOSITORY / folder).rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def package(module: str) -> str:
    """Returns the top-level package of a module; several distributions share "google"."""
    return ".".join(module.split(".")[: 2 if module.startswith("google.") else 1])


def imported(path: Path, *, inside_functions: bool = True) -> set[str]:
    """Lists the top-level packages that a file imports."""
    names: set[str] = set()
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names |= {package(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(package(f"{node.module}.{node.names[0].name}"))
        elif inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            nodes += ast.iter_child_nodes(node)
    return names


def requirements(groups: list[list[str]]) -> Iterator[str]:
    for group in groups:
        for requirement in group:
            yield re.split(r"[\[<>=~! ]", requirement)[0].lower().replace("_", "-")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without network and without isolation."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    built = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_version_of_the_metadata_is_the_package_s() -> None:
    assert importlib.metadata.version("sbs-jax") == sbs_jax.__version__


def test_sbs_is_a_console_script() -> None:
    scripts = importlib.metadata.distribution("sbs-jax").entry_points
    (entry,) = scripts.select(group="console_scripts", name="sbs")
    assert callable(entry.load())


def test_wheel_holds_every_source_and_data_file(wheel: Path) -> None:
    expected = {
        name(path)
        for folder in SHIPPED
        for path in (REPOSITORY / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {entry for entry in archive.namelist() if ".dist-info/" not in entry}
    assert held == expected
    assert any(entry.startswith("gin_configs/runs/") for entry in held)
    assert any(entry.startswith("tasks/") and not entry.endswith(".py") for entry in held)


def test_wheel_carries_the_license_and_the_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = f"sbs_jax-{sbs_jax.__version__}.dist-info"
        text = archive.read(f"{info}/METADATA").decode()
        license_text = archive.read(f"{info}/licenses/docs/LICENSE").decode()
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Python: >=3.11" in text
    assert "Apache License" in license_text


def test_unpacked_wheel_is_complete_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r});"
        "import pathlib, sbs_jax;"
        "root = pathlib.Path(sbs_jax.__file__).parents[1];"
        "print(root); print(len(list((root / 'gin_configs').rglob('*.gin'))))"
    )
    # -I: neither the current folder nor PYTHONPATH can supply what the wheel lacks.
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    root, count = done.stdout.splitlines()
    assert Path(root) == tmp_path
    assert int(count) == len(list((REPOSITORY / "gin_configs").rglob("*.gin"))) > 0


def test_unpacked_wheel_makes_a_dataset_in_any_folder(wheel: Path, tmp_path: Path) -> None:
    """From a table to the first error of training, without TensorFlow; `make test-wheel` goes on from there."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "unpacked")
    (tmp_path / "own").mkdir()
    rows = "".join(f'"Buoy {number} is {word}.",{word}\n' for number in range(20) for word in ("dry", "wet"))
    (tmp_path / "own" / "buoys.csv").write_text(f"text,label\n{rows}", "utf-8")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'unpacked')!r}); from sbs_jax.cli import main;"
        "print(main.main(['init', 'buoys.csv']),"
        "main.main(['train', '--gin_file=buoys/laptop.gin', '--gin.MODEL_DIR=runs/buoys']), 'jax' in sys.modules)"
    )
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, cwd=tmp_path / "own", capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "0 1 False", done.stderr
    assert "There are no records of buoys" in done.stderr
    assert "sbs teach --dataset buoys --provider" in done.stderr


def test_no_module_is_a_drawer_for_the_rest() -> None:
    forbidden = {"utils", "util", "common", "helpers", "base", "misc"}
    found = [name(path) for path in sources(*SHIPPED, "scripts", "tests") if path.stem in forbidden]
    assert not found, f"{found}: name a module after the one thing it holds"


def test_one_module_imports_gin() -> None:
    found = {name(path) for path in sources("sbs_jax", "tasks") if "gin" in imported(path)}
    assert found <= {"sbs_jax/training/gin_files.py"}


def test_nothing_imports_t5x_but_its_model() -> None:
    found = [name(path) for path in sources("sbs_jax", "tasks") if "t5x" in imported(path, inside_functions=True)]
    assert found == ["sbs_jax/training/t5x_model.py"]
    importing = re.compile(r"import.*\bt5x_model\b")
    assert not [name(path) for path in sources("sbs_jax", "tasks") if importing.search(path.read_text("utf-8"))]


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        # The student and its loss are plain JAX, and so are the modules of this project that they import.
        ("student/t5", {"jax", "flax", "numpy", "jaxtyping", "sbs_jax"}),
        ("student/losses", {"jax", "numpy", "jaxtyping", "sbs_jax"}),
        ("student/attention", {"jax", "jaxtyping", "sbs_jax"}),
        ("student/partitioning", {"jax", "numpy", "sbs_jax"}),
        ("student/stacking", {"jax", "optax"}),
        ("data/records", {"sbs_jax"}),
    ],
)
def test_modules_that_stay_light(module: str, allowed: set[str]) -> None:
    found = imported(REPOSITORY / "sbs_jax" / f"{module}.py") - sys.stdlib_module_names
    assert found <= allowed


@pytest.mark.parametrize("inside_functions", [False, True])
def test_every_import_is_declared(inside_functions: bool) -> None:
    """Modules import only runtime dependencies at the top; functions import the packages of an extra.

    The server extends classes of its extra's: its modules import that, and a function imports them.
    """
    serve = set(requirements([PROJECT["optional-dependencies"]["serve"]]))
    allowed = set(requirements([PROJECT["dependencies"]]))
    if inside_functions:
        extras = PROJECT["optional-dependencies"]
        names = ("teacher", "t5x", "serve", "trackers", "metrics")
        allowed |= {*requirements([extras[name] for name in names])}
    undeclared = {}
    for path in sources("sbs_jax", "tasks"):
        names = imported(path, inside_functions=inside_functions)
        names -= sys.stdlib_module_names | {"sbs_jax", "tasks"}
        if path.parent.name == "artefact":  # copied into exports, and run where those are
            continue
        if path.name == "t5x_model.py":  # the gin files of unmodified T5X alone import it
            names -= {"t5x", "clu"}
        found = {DISTRIBUTIONS.get(import_name, import_name).replace("_", "-") for import_name in names}
        if path.parent.name == "serve":
            found -= serve
        else:
            assert not re.search(r"^(from|import) sbs_jax\.serve\b", path.read_text("utf-8"), re.MULTILINE), name(path)
        if found - allowed:
            undeclared[name(path)] = sorted(found - allowed)
    assert not undeclared, f"{undeclared}: declare in pyproject.toml, explain in docs/decisions.md"


def test_every_dependency_is_pinned_once_and_explained() -> None:
    declared = set(requirements([PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]))
    lines = (REPOSITORY / "scripts" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split(" ;")[0] for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[\w.]+", pin) for pin in pins)
    pinned = [pin.split("==")[0] for pin in pins]
    assert len(pinned) == len(set(pinned))
    # libtpu has two versions: JAX's own for the extra `tpu`, and a newer one that pyproject.toml pins for the others.
    assert declared - set(pinned) == {"libtpu"}
    extras = PROJECT["optional-dependencies"]
    pin, *others = (each for extra in ("plan", "test") for each in extras[extra] if each.startswith("libtpu"))
    assert others == [pin]
    assert re.match(r"libtpu==[\d.]+;", pin)
    reasons = (REPOSITORY / "docs" / "decisions.md").read_text(encoding="utf-8").lower()
    assert not sorted(dependency for dependency in declared if f"`{dependency}`" not in reasons)


def test_makefile_targets_are_explained() -> None:
    done = subprocess.run(["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for target in (
        "demo",
        "test",
        "test-faults",
        "test-teacher",
        "test-wheel",
        "check",
        "bench",
        "test-parity",
        "clean",
    ):
        assert re.search(rf"^  make {target} +\w", done.stdout, flags=re.MULTILINE)


def test_every_test_that_the_promises_name_exists():
    text = (REPOSITORY / "docs" / "reliability.md").read_text("utf-8")
    files = {path.name: path.read_text("utf-8") for path in (REPOSITORY / "tests").glob("test_*.py")}
    functions = {name for code in files.values() for name in re.findall(r"^def (test_\w+)", code, re.MULTILINE)}
    named = set(re.findall(r"\btest_\w+(?:\.py)?", text))
    assert len(named) > 50
    assert {name for name in named if name not in files and name not in functions} == set()
