"""Gin files read without importing what they configure: mistakes are found within a second, and macros listed.

`gin_files.configure` imports every module that a configuration names, which takes seconds of TensorFlow and JAX, and
decides. A scan knows only names, literals and the sources of the configuration classes, and reports only what
`configure` would certainly refuse.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sbs_jax.checks import nearest
from sbs_jax.storage import json_files, user_files
from sbs_jax.training import declared, gin_files
from sbs_jax.training.gin_files import Reference, UsageError

ROOT = Path(__file__).parents[2]  # of the packages sbs_jax and gin_configs
_REQUIRED = "gin.REQUIRED"
_MACRO = re.compile(r"^([A-Z][A-Z_]*) = (.*?)(?:  # (.*))?$")
_TYPES: Mapping[str, Any] = {"int": int, "float": float, "str": str, "bool": bool, "None": None}


class Field(NamedTuple):
    """A field of a configuration class as its source has it; `default` is None for a field without one."""

    annotation: str
    default: str | None
    comment: str


@dataclasses.dataclass(frozen=True)
class Scan:
    """The bindings of some gin files and flags, later ones over earlier ones.

    Attributes:
      macros: value by name: a literal, or a `Reference`.
      parameters: value by selector and parameter, such as "train.TrainConfig.seed".
      references: everything that some value refers to.
      imports: packages that the files import, whose modules may register datasets.
      files: the gin files, included ones too.
    """

    macros: Mapping[str, Any]
    parameters: Mapping[str, Any]
    references: frozenset[str]
    imports: frozenset[str]
    files: tuple[Path, ...]

    def value(self, macro: str) -> Any:
        """Returns the literal that a macro has; None if it has none, or a parameter of its name has another value."""
        own = (Reference("%", macro), self.macros.get(macro))
        if any(name.endswith(f".{macro.lower()}") and value not in own for name, value in self.parameters.items()):
            return None
        found = self.macros.get(macro)
        for _ in self.macros:
            if not (isinstance(found, Reference) and found.sign == "%"):
                break
            found = self.macros.get(found.name)
        return None if isinstance(found, Reference) else found


def find(file: str, search_paths: Sequence[str] = ()) -> Path:
    """Returns the path of a gin file, as gin finds it. UsageError with the nearest names if there is none."""
    for folder in ("", *search_paths, ROOT):
        if (path := Path(folder, file)).is_file():
            return path
    known = [path.relative_to(ROOT).as_posix() for path in (ROOT / "gin_configs").rglob("*.gin")]
    raise UsageError(
        f"There is no gin file {file}; the ready ones are in gin_configs/experiments/.{nearest(file, known)}"
    )


def scan(files: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str] = ()) -> Scan:
    """Reads gin files with what they include, then bindings.

    UsageError for a missing file, and for what gin cannot read.
    """
    macros: dict[str, Any] = {}
    parameters: dict[str, Any] = {}
    references: set[str] = set()
    imports: set[str] = set()
    read: list[Path] = []

    def take(source: Any) -> None:
        for kind, name, value in gin_files.statements(source):
            if kind == "include":
                take_file(name)
                continue
            if kind == "import":
                imports.add(name.partition(".")[0])
                continue
            references.update(each.name for each in _references(value))
            (macros if kind == "macro" else parameters)[name] = value

    def take_file(file: str) -> None:
        path = find(file, search_paths)
        if path in read:
            return
        read.append(path)
        take(gin_files.opened(str(path)))

    with gin_files.usage_errors():
        for file in files:
            take_file(file)
        take("\n".join(gin_files.quoted(binding) for binding in bindings) + "\n")
    return Scan(macros, parameters, frozenset(references), frozenset(imports), tuple(read))


def _references(value: Any) -> Iterable[Reference]:
    if isinstance(value, Reference):
        yield value
    elif isinstance(value, dict):
        for each in (*value, *value.values()):
            yield from _references(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _references(each)


def check(name: str, found: Scan, *, unread: Sequence[str] = ()) -> None:
    """Refuses macros that nothing uses, values of another type than their field's, and those left at REQUIRED.

    `name` is the configuration class, as `gin_files.configure` takes it; `unread` as there.
    """
    fields = class_macros(name)
    required = Reference("%", _REQUIRED)
    left = [macro for macro, value in found.macros.items() if value == required and macro not in unread]
    used = {*found.references, *fields}
    unused = sorted(set(found.macros) - used)
    if left and not any(nearest(macro, left) for macro in unused):  # else a typo is why one is left
        gin_files.refuse_missing(name, left)
    if unused:
        raise UsageError(gin_files.unused_text(unused, known={*used, *found.macros} - set(unused)))
    for macro, (where, field) in fields.items():
        kinds = [part.strip() for part in field.annotation.split("|")]
        value = found.macros.get(macro)
        if value is None or isinstance(value, Reference) or not all(kind in _TYPES for kind in kinds):
            continue
        kind = _TYPES[kinds[0]]
        for part in kinds[1:]:
            kind = kind | _TYPES[part]
        if (expected := declared.expected(value, kind)) is not None:
            raise UsageError(f"{macro} is {json_files.brief(value)}; expected {expected} (as {where}).")


def class_macros(name: str) -> dict[str, tuple[str, Field]]:
    """Returns the macros of a configuration class and of the classes in its fields: (its parameter, the field).

    {"KEEP_BEST": ("TrainConfig.keep_best", Field("int", "1", "by validation score")), ..}; {} for another class. The
    same as `gin_files.class_bindings`, from sources.
    """
    if name not in gin_files.CLASSES:
        return {}
    module, _, class_name = name.partition(".")
    found: dict[str, tuple[str, Field]] = {}
    for field, source in class_fields(gin_files.MODULES[module], class_name).items():
        value = gin_files.CLASSES[name].get(field, f"%{field.upper()}")
        if value.startswith("@"):
            found |= class_macros(value[1:-2])
        else:
            found[value[1:]] = (f"{class_name}.{field}", source)
    return found


def class_fields(module: str, name: str) -> dict[str, Field]:
    """Reads the fields of a dataclass from its source, those of its bases first, with the comment behind each.

    A class that the module imports is read where it is defined. The docstring's "Attributes:" count as comments.
    """
    text = user_files.whole(ROOT / Path(*module.split(".")).with_suffix(".py")).decode()
    tree, lines = ast.parse(text), text.splitlines()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return class_fields(node.module, alias.name)
    constants: dict[str, str] = {}
    for node in tree.body:  # TRAIN, TEST = "train", "test"
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple | ast.Constant):
            (target,) = node.targets
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            values = node.value.elts if isinstance(node.value, ast.Tuple) and names != [target] else [node.value]
            constants |= {ast.unparse(one): ast.unparse(value) for one, value in zip(names, values, strict=False)}
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}

    def fields(node: ast.ClassDef) -> dict[str, Field]:
        found: dict[str, Field] = {}
        for base in reversed(node.bases):
            if isinstance(base, ast.Name) and base.id in classes:
                found |= fields(classes[base.id])
        told = dict(re.findall(r"^  (\w+): (.*(?:\n    .*)*)", ast.get_docstring(node) or "", re.MULTILINE))
        for each in node.body:
            if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
                default = None if each.value is None else constants.get(text := ast.unparse(each.value), text)
                comment = lines[(each.end_lineno or each.lineno) - 1].partition("  # ")[2]
                words = comment or " ".join(told.get(each.target.id, "").split())
                found[each.target.id] = Field(ast.unparse(each.annotation), default, words)
        return found

    return fields(classes[name])


def groups(text: str) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Lists the macros of a gin file in groups: the comment line above each, and (name, value, comment) of its macros.

    A value that is required is "".

    >>> groups("# Given by the user.\\nMODEL_DIR = %gin.REQUIRED  # a folder\\nSEED = 0\\n")
    [('Given by the user.', [('MODEL_DIR', '', 'a folder'), ('SEED', '0', '')])]
    """
    found: list[tuple[str, list[tuple[str, str, str]]]] = []
    rows: list[tuple[str, str, str]] = []
    heading = ""
    for line in [*text.splitlines(), ""]:
        if macro := _MACRO.match(line):
            name, value, comment = macro.groups()
            rows.append((name, "" if value == f"%{_REQUIRED}" else value, comment or ""))
            continue
        if rows:
            found.append((heading, rows))
            rows, heading = [], ""
        heading = line[2:] if line.startswith("# ") else ""
    return found


def listing(file: str, name: str) -> str:
    """Lists the macros of a gin file and the others of a configuration class, each with value and comment on a line."""
    fields = class_macros(name)
    brief = {macro: re.split(r"[.;,:(]", field.comment)[0].strip() for macro, (_, field) in fields.items()}
    parts = [
        (heading, [(macro, value, comment or brief.get(macro, "")) for macro, value, comment in rows])
        for heading, rows in groups(user_files.whole(find(file)).decode())
    ]
    known = {macro for _, rows in parts for macro, _, _ in rows}
    of_class: dict[str, list[tuple[str, str, str]]] = {}
    for macro, (where, field) in fields.items():
        if macro not in known:
            comment = re.split(r"(?<=[.;]) ", field.comment)[0].rstrip(".;")
            of_class.setdefault(where.partition(".")[0], []).append((macro, field.default or "", comment))
    parts += [(f"Fields of {owner}.", rows) for owner, rows in of_class.items()]
    lines = ["macros, for --gin.NAME=VALUE:"]
    for heading, rows in parts:
        lines.append(f"  {heading}")
        for macro, value, comment in rows:
            text = f"    {macro} = {value or '..'}"
            lines.append(f"{text:42}  {comment}".rstrip() if len(text) <= 42 else f"{text}  {comment}".rstrip())
    return "\n".join(lines) + "\n"
