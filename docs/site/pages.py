"""Generates pages from their sources at each build, so that none goes stale. Needs no MkDocs.

`index.md` is README.md; `reference/commands.md` the help of every command; `reference/gin.md` the macros of gin files
and configuration classes, and the first comment of every gin file; `reference/api/` has a page per module, which
mkdocstrings fills from docstrings.
"""

import ast
import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("sbs_jax", "tasks")
_CONFIGURED_BY = {
    "train.gin": ("train.TrainConfig", "datasets.DataOptions"),
    "evaluate.gin": ("evaluate.EvaluateConfig",),
}


def made() -> dict[str, str]:
    """Generates every page that has no file, as Markdown by path."""
    return {
        "index.md": home(),
        "reference/commands.md": commands(),
        "reference/gin.md": configurations(),
        "reference/api/index.md": module_list(),
        **{f"reference/api/{name}.md": module_page(name) for name in modules()},
    }


def home() -> str:
    """Returns README.md with links relative to docs/."""
    return re.sub(r"\]\(docs/", "](", (ROOT / "README.md").read_text("utf-8"))


def commands() -> str:
    """Formats the output of `sbs COMMAND --help` for every command."""
    from sbs_jax.cli import main

    os.environ["COLUMNS"] = "110"
    parser, parsers = main._parser()
    parts = ["# Commands", "The output of `--help`.", f"```text\n{parser.format_help().rstrip()}\n```"]
    for name, sub in parsers.items():
        parts += [f"## sbs {name}", f"```text\n{sub.format_help().rstrip()}\n```"]
    return "\n\n".join(parts) + "\n"


def configurations() -> str:
    """Lists the macros of gin_configs/runs/*.gin, and every other gin file with its first comment."""
    parts = [
        "# Configurations",
        "Repeat `--gin_file=FILE`; later files override earlier ones, and `--gin.NAME=VALUE` overrides them all. "
        "NAME is a macro below, or any parameter that a gin file binds: `--gin.train.TrainConfig.seed=1`. "
        "Unknown bindings are rejected, with the nearest match; so are values of another type than declared. "
        "`true` and `false` are True and False.",
    ]
    for path in sorted((ROOT / "gin_configs" / "runs").glob("*.gin")):
        tables = _macros(path.read_text("utf-8"))
        parts += [f"## `runs/{path.name}`", *tables]
        for name in _CONFIGURED_BY.get(path.name, ()):
            parts += [f"Fields of `{name}`:", _fields(name, without="\n".join(tables))]
    parts += ["## All gin files"]
    for folder in sorted(path for path in (ROOT / "gin_configs").rglob("*") if path.is_dir()):
        found = sorted(folder.glob("*.gin"))
        if found:
            rows = [f"| `{path.name}` | {_first_comment(path)} |" for path in found]
            name = folder.relative_to(ROOT / "gin_configs").as_posix()
            parts += [f"### `{name}/`", "\n".join(["| file | |", "|---|---|", *rows])]
    return "\n\n".join(parts) + "\n"


def _macros(text: str) -> list[str]:
    """Makes a table per group of macros, under the comment above the group."""
    from sbs_jax.training import gin_scan

    parts: list[str] = []
    for heading, found in gin_scan.groups(text):
        rows = [
            f"| `{name}` | {f'`{value}`' if value else 'required'} | {_cell(words)} |" for name, value, words in found
        ]
        parts += [heading, "\n".join(["| macro | value | |", "|---|---|---|", *rows])]
    return [part for part in parts if part]


def field_macros(name: str) -> dict[str, tuple[str, str]]:
    """Returns (default, comment) of the fields of a configuration class, by macro."""
    from sbs_jax.training import gin_scan

    return {
        macro: (f"`{field.default}`" if field.default is not None else "no default", field.comment)
        for macro, (where, field) in gin_scan.class_macros(name).items()
        if where.partition(".")[0] == name.partition(".")[2]
    }


def _fields(name: str, *, without: str) -> str:
    """Makes a table of the macros of a configuration class that the tables `without` do not have."""
    rows = [
        f"| `{macro}` | {default} | {_cell(comment)} |"
        for macro, (default, comment) in field_macros(name).items()
        if f"| `{macro}` |" not in without
    ]
    return "\n".join(["| macro | value | |", "|---|---|---|", *rows])


def _first_comment(path: Path) -> str:
    lines = []
    for line in path.read_text("utf-8").splitlines():
        if not line.startswith("# "):
            break
        lines.append(line[2:])
    return _cell(" ".join(lines))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def modules() -> list[str]:
    """Lists modules that have a public function or class. Commands have a page of their own."""
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            if not (path.parent / "__init__.py").exists():  # files copied into exports, not modules
                continue
            if ".commands" not in name and _has_public(path):
                found.append(name)
    return found


def _has_public(path: Path) -> bool:
    kinds = (ast.FunctionDef, ast.ClassDef)
    return any(isinstance(node, kinds) and node.name[0] != "_" for node in ast.parse(path.read_text("utf-8")).body)


def module_list() -> str:
    """Lists every module with its docstring's summary."""
    rows = []
    for name in modules():
        place = ROOT / Path(*name.split("."))
        path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        words = (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").partition("\n\n")[0]
        rows.append(f"| [`{name}`]({name}.md) | {_cell(' '.join(words.split()))} |")
    return "\n".join(["# Python modules", "", "| module | |", "|---|---|", *rows]) + "\n"


def module_page(name: str) -> str:
    """Makes the page that mkdocstrings fills with the module's docstrings."""
    return f"# `{name}`\n\n::: {name}\n"
