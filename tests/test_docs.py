"""The documentation names only what exists: links, commands, macros, files, tests, navigation; the notebook ran.
Commands of training, evaluating, planning and sweeping have a configuration, so that they can start.

Without MkDocs; `make docs` builds the site, and fails on what only the site can tell.
"""

import ast
import contextlib
import io
import json
import re
import shlex
import sys
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import markdown
import pytest
import yaml

from sbs_jax.cli import main
from sbs_jax.cli.commands import evaluate, plan, sweep, train
from sbs_jax.training import gin_files

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS / "site"))
import pages  # noqa: E402

sys.path.pop(0)

WRITTEN = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *DOCS.rglob("*.md")])
NOTEBOOKS = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.ipynb"))
CONFIGURED = {
    "train": "train.TrainConfig",
    "plan": "train.TrainConfig",
    "evaluate": "evaluate.EvaluateConfig",
    "sweep": "sweep.Sweep",
}
SETTLED = {"evaluate": evaluate.settled, "plan": plan.settled, "sweep": sweep.settled}
# Files that the reader of a how-to page writes.
READERS_OWN = {
    *("tickets.gin", "my_task.py", "tasks/prompts/tickets.json"),
    *("tickets/laptop.gin", "tickets/t5_base.gin"),
}
MACROS = {
    name
    for path in (ROOT / "gin_configs").rglob("*.gin")
    for name in re.findall(r"^([A-Z][A-Z_]*) =", path.read_text("utf-8"), re.MULTILINE)
}
MACROS |= {macro for names in pages._CONFIGURED_BY.values() for name in names for macro in pages.field_macros(name)}


@cache
def made() -> dict[str, str]:
    return pages.made()


@cache
def html(page: str) -> str:
    """Renders a page by its path from the repository's root; generated pages are `docs/index.md` and the like."""
    name = page.removeprefix("docs/")
    path = ROOT / page
    text = made()[name] if name in made() and page != "README.md" else path.read_text("utf-8")
    return markdown.Markdown(extensions=["attr_list", "fenced_code", "tables", "toc"]).convert(text)


def is_page(path: str) -> bool:
    return path in WRITTEN or path.removeprefix("docs/") in made()


def dead_links(page: str) -> list[str]:
    """Lists links of a page to missing files and to missing anchors."""
    dead = []
    for link in re.findall(r'(?:href|src)="([^"]+)"', html(page)):
        parts = urlsplit(link.replace("&amp;", "&"))
        if parts.scheme:
            continue
        target = (ROOT / page).parent / unquote(parts.path) if parts.path else ROOT / page
        name = Path(re.sub(r"[^/]+/\.\./", "", target.relative_to(ROOT).as_posix())).as_posix()
        notebook = name.removesuffix(".md") + ".ipynb"
        there = is_page(name) or (ROOT / name).exists() or notebook.removeprefix("docs/") in NOTEBOOKS
        if not there or (parts.fragment and is_page(name) and f'id="{parts.fragment}"' not in html(name)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", WRITTEN)
def test_links_lead_somewhere(page):
    assert dead_links(page) == []


def test_links_of_pages_that_are_made_lead_somewhere():
    assert {page: found for page in made() if page != "index.md" and (found := dead_links(f"docs/{page}"))} == {}


def commands(text: str) -> list[str]:
    """Lists the `sbs ..` command lines in blocks of code, without comments and the rest of the line."""
    found = []
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        # Printed lines do not start with a command; comments of gin files hold examples.
        lines = re.sub(r"\\\n", " ", re.sub(r"^# +", "", block, flags=re.MULTILINE)).splitlines()
        for line in lines:
            match = re.search(r"(?:^|&& |-- |until |do |\$ )\s*(sbs [a-z]+(?: .*)?)$", line)
            if match:
                found.append(re.split(r" #| ; | && | \| | > |; do", match[1])[0].strip())
    return found


@cache
def parsers():
    """The parser of `sbs`, and those of its commands by name."""
    return main._parser()


def problem(line: str) -> str | None:
    """Returns what the command's parser or the gin files reject in a command line, else None."""
    line = re.sub(r"\[[A-Z .]+\]", "", line)
    words = shlex.split(line)[1:]
    parser, commands_of = parsers()
    if words[0] not in commands_of:
        return f"no command {words[0]}"
    known = commands_of[words[0]]._option_string_actions
    for number, word in enumerate(words[1:]):  # a variable of the shell stands for any of the choices
        if word.startswith("$") and (action := known.get(words[number])) is not None and action.choices:
            words[number + 1] = next(iter(action.choices))
    short = any(word == ".." for word in words)  # the rest is as above, or up to the reader
    complaint = io.StringIO()
    if short:
        rest = [word for word in words[1:] if word.startswith("--") and word.split("=")[0] not in known]
    else:
        try:
            with contextlib.redirect_stderr(complaint):
                arguments, rest = main.parsed(parser, commands_of, words)
        except SystemExit:
            return complaint.getvalue().splitlines()[-1]
    for word in rest:
        match = re.fullmatch(r"--gin\.([\w./]+)=.*", word, re.DOTALL)
        if match is None or "--gin_file" not in known:
            return f"unknown argument {word}"
        if match[1] not in MACROS and "." not in match[1]:
            return f"no macro {match[1]}"
    for word in words:
        if word.startswith("--gin_file=") and not files(word.partition("=")[2]):
            return f"no gin file {word}"
    if short or "--module" in words or words[0] not in CONFIGURED or not READERS_OWN.isdisjoint(arguments.gin_file):
        return None
    bindings = [word.removeprefix("--gin.") for word in rest]
    if words[0] in SETTLED:
        bindings = SETTLED[words[0]](arguments, bindings)
    if words[0] == "train":
        bindings = train.each_of(arguments, bindings)[0]
    arguments.gin_file = [files(name)[0] for name in arguments.gin_file]
    # `sbs plan` needs no data and no weights.
    unread = ("MODEL_DIR", "RECORDS_DIR", "INITIAL_CHECKPOINT_PATH") if words[0] == "plan" else ()
    try:
        gin_files.configured(CONFIGURED[words[0]], arguments, bindings, unread=unread)
    except gin_files.UsageError as error:
        return str(error)
    return None


def files(name: str) -> list[str]:
    """Lists the files of a path; a part in capitals or braces stands for several names."""
    pattern = re.sub(r"\{[^}]*\}|\$\w+|\b[A-Z]+\b", "*", name)
    return [name] if name in READERS_OWN else sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))


@pytest.mark.parametrize("page", WRITTEN)
def test_commands_are_those_that_the_parsers_know(page):
    lines = commands((ROOT / page).read_text("utf-8"))
    assert {line: found for line in lines if (found := problem(line))} == {}


def test_commands_in_gin_files_and_in_help_are_those_that_the_parsers_know():
    texts = [path.read_text("utf-8") for path in (ROOT / "gin_configs").rglob("*.gin")]
    texts += [sub.epilog or "" for sub in parsers()[1].values()]
    lines = [line for text in texts for line in commands(f"```\n{text}\n```")]
    assert len(lines) > 40
    assert {line: found for line in lines if (found := problem(line))} == {}


def test_the_readme_and_the_tutorial_have_commands():
    """Without commands, the tests above would check nothing."""
    assert len(commands((ROOT / "README.md").read_text("utf-8"))) >= 8
    assert len(commands((DOCS / "tutorial.md").read_text("utf-8"))) >= 8


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("sbs trian --gin_file=gin_configs/experiments/svamp/cpu.gin", "no command trian"),
        ("sbs train --gin_fiel=gin_configs/experiments/svamp/cpu.gin", "unknown argument"),
        ("sbs train --gin_file=gin_configs/experiments/svamp/cpuu.gin", "no gin file"),
        ("sbs train .. --gin.APLHA=0.5", "no macro APLHA"),
        ("sbs train .. --bach_size=5", "unknown argument --bach_size"),
        ("sbs records --dataset svamp --release DIR", "required: --records_dir"),
        ("sbs convert --to tf runs/svamp out", "invalid choice: 'tf'"),
        ("sbs demo --gin.ALPHA=1", "unknown argument"),
        (
            "sbs train --gin_file=gin_configs/experiments/svamp/base.gin --gin.RECORDS_DIR=r --gin.MODEL_DIR=m",
            "needs values that no gin file gives: --gin.INITIAL_CHECKPOINT_PATH=..",
        ),
        (
            "sbs plan --gin_file=gin_configs/experiments/svamp/base.gin --topology v5e:2x4 --gin.SLICES=2",
            "Nothing uses",
        ),
    ],
)
def test_a_wrong_command_would_be_seen(line, found):
    assert found in (problem(line) or "")


@pytest.mark.parametrize("page", WRITTEN)
def test_files_macros_and_make_targets_that_are_named_are_there(page):
    text = (ROOT / page).read_text("utf-8")
    macros = set(re.findall(r"(?:--gin\.|`)([A-Z][A-Z_]{3,})=", text)) - {"NAME"}
    scripts = "\n".join(path.read_text("utf-8") for path in [ROOT / "Makefile", *ROOT.glob("scripts/*.sh")])
    assert sorted(name for name in macros - MACROS if not re.search(rf"\b{name}\b", scripts)) == []
    names = set(re.findall(r"(?<![\w/])(?:sbs_jax|tasks|tests|scripts|gin_configs|docs)/[\w/.{},*-]*\.[a-z]\w*", text))
    assert sorted(name for name in names if not files(name)) == []
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)|^make ([a-z-]+)", text, re.MULTILINE))
    assert {first or second for first, second in named} <= targets


@pytest.mark.parametrize(
    "page", ["howto/from_hugging_face.md", "howto/from_flax_t5.md", "howto/trackers.md", "glossary.md"]
)
def test_macros_that_a_newcomer_is_told_are_there(page):
    """In tables too, where no value follows the name."""
    text = (DOCS / page).read_text("utf-8")
    named = set(re.findall(r"`([A-Z][A-Z_]{3,})(?:`| = |=)", text)) - {"NAME"}
    named = {name for name in named if not name.startswith(("MLFLOW_", "WANDB_"))}  # variables of the environment
    assert named
    assert sorted(named - MACROS) == []


@cache
def _tests_of(file: str) -> frozenset[str]:
    """Lists the tests of a file in tests/; empty if the file does not exist."""
    path = ROOT / "tests" / file
    nodes = ast.walk(ast.parse(path.read_text("utf-8"))) if path.is_file() else ()
    return frozenset(node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"))


def missing_tests(text: str) -> list[str]:
    """Lists test files and tests that a page names and that do not exist.

    `::test_x` belongs to the file named last on the page, a bare `test_x` to the file named before it on its line; on a
    line without a file, a bare name may stand in any file.
    """
    everywhere = frozenset().union(*(_tests_of(path.name) for path in (ROOT / "tests").glob("test_*.py")))
    missing, last = [], ""
    for line in text.splitlines():
        known = everywhere
        for file, mark, name in re.findall(r"\b(test_\w+\.py)|(::|`)(test_\w+)\b(?!\.py)", line):
            if file:
                last, known = file, _tests_of(file)
                missing += [] if known else [file]
            elif name not in (_tests_of(last) if mark == "::" else known):
                missing.append(name)
    return missing


@pytest.mark.parametrize("page", WRITTEN)
def test_tests_that_are_named_exist(page):
    assert missing_tests((ROOT / page).read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("`test_docs.py`: `test_tests_that_are_named_exist`", []),
        ("`test_docs.py`: `test_tests_that_are_named_exists`", ["test_tests_that_are_named_exists"]),
        ("`test_losses.py`: `test_tests_that_are_named_exist`", ["test_tests_that_are_named_exist"]),
        ("tests/test_doc.py checks", ["test_doc.py"]),
        ("`test_docs.py`\n`::test_a`, `::test_links_lead_somewhere`", ["test_a"]),
        ("`test_links_lead_somewhere`, `test_links`", ["test_links"]),
    ],
)
def test_a_wrong_test_name_would_be_seen(text, missing):
    assert missing_tests(text) == missing


def test_every_page_is_in_the_navigation():
    settings = yaml.safe_load((DOCS / "site" / "mkdocs.yml").read_text("utf-8"))
    listed = {entry for section in settings["nav"] for entry in _pages(section)} - {"index.md"}
    there = {page.removeprefix("docs/") for page in WRITTEN if page != "README.md"}
    there |= {page for page in made() if not re.match(r"reference/api/(?!index)|index", page)}
    there |= {str(Path(name).with_suffix(".md")) for name in NOTEBOOKS}
    assert there == listed


def _pages(entry):
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in _pages(part)]


def test_pages_that_are_made_tell_every_command_macro_and_module():
    text = made()["reference/commands.md"]
    assert all(f"## sbs {name}\n" in text and f"usage: sbs {name} " in text for name in main.SUMMARIES)
    text = made()["reference/gin.md"]
    for name in ("train", "evaluate"):
        lines = (ROOT / "gin_configs" / "runs" / f"{name}.gin").read_text("utf-8")
        for macro in re.findall(r"^([A-Z_]+) =", lines, re.MULTILINE):
            assert f"| `{macro}` |" in text
    assert "| `SAVE_PATIENCE` | `300.0` | seconds to retry" in text
    assert "| `LABEL_SOURCE` | `'human'` | train on" in text
    for path in (ROOT / "gin_configs").rglob("*.gin"):
        assert f"| `{path.name}` |" in text
    assert {"sbs_jax.student.t5", "sbs_jax.pages.report", "tasks.svamp"} <= set(pages.modules())
    assert not any(".commands" in name for name in pages.modules())


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_was_run_from_top_to_bottom_and_uses_what_is_there(name):
    cells = [cell for cell in json.loads((DOCS / name).read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert all(output["output_type"] != "error" and output.get("name") != "stderr" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    tree = ast.parse("\n".join("".join(cell["source"]) for cell in cells))
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and "sbs_jax" in (alias.name for alias in node.names):
            modules["sbs_jax"] = {"Settings", "Student", "distill"}  # test_api.py holds these
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in ("sbs_jax", "tasks"):
            for alias in node.names:
                path = (ROOT / str(node.module).replace(".", "/") / alias.name).with_suffix(".py")
                if path.exists():
                    modules[alias.asname or alias.name] = defined(path)
                else:
                    assert alias.name in defined(path.parent.with_suffix(".py")), alias.name
    assert len(modules) > 5 or set(modules) == {"sbs_jax"}  # the student's insides, or the Python interface alone
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            assert node.attr in modules[node.value.id], f"{node.value.id}.{node.attr}"


def defined(path):
    """Lists the top-level names of a module without importing it, which would take seconds."""
    names = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names
