"""Measured rationales of a run: `rationales.json` in the run directory, and the texts in a file beside it.

docs/report.md shows both formats; rationales.py writes them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

from sbs_jax.checks import whole_number
from sbs_jax.storage import json_files

NAME, LINES = "rationales.json", "rationales.jsonl"
VERSION = 1
# Group, name, upper limit. A value may be null or missing if it was not or cannot be measured.
_VALUES = (
    ("consistency", "by_parser", 1),
    ("consistency", "by_parser_rows", 1e9),
    ("consistency", "by_label_task", 1),
    ("consistency", "by_label_task_other_rationale", 1),
    ("overlap_with_teacher", "rouge_l", 1),
    ("overlap_with_teacher", "chrf", 1e9),
    ("length", "student_words", 1e9),
    ("length", "teacher_words", 1e9),
)
NAMES = tuple(name for _, name, _ in _VALUES)


class _File(TypedDict):
    version: Literal[1]
    step: int
    rows: int
    split: Literal["test"]
    consistency: dict[str, float | None]
    overlap_with_teacher: dict[str, float | None]
    length: dict[str, float | None]
    examples_file: NotRequired[str | None]


@dataclass(frozen=True, kw_only=True)
class Said:
    """One rationale of a student, on one test row."""

    rationale: str
    implied_label: str | None = None
    consistent: bool | None = None
    teacher_rationale: str | None = None


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The rationales of one run on its test rows; values as `rationales.json` has them."""

    step: int
    rows: int
    values: Mapping[str, int | float | None]  # "by_parser", "by_label_task", "rouge_l", "chrf", "student_words", ..
    examples: Mapping[str, Said]  # by id of the test row


def read(path: Path) -> Quality | None:
    """Reads the rationales of a run directory; None without a rationales.json. ValueError names the damaged value."""
    file = path / NAME
    if not file.is_file():
        return None
    value = json_files.read_json(file)
    try:
        found = json_files.typed(value, _File, extra=True)
        values = {name: _checked(found, group, name, most=most) for group, name, most in _VALUES}
        whole_number("rows", found["rows"], least=0)
        name = found.get("examples_file")
        if name is not None and (Path(name).name != name or not name):
            raise ValueError(f"examples_file is {json_files.brief(name)}; expected the name of a file beside it.")
        if name and not (path / name).is_file():
            raise ValueError(f"{path / name} is missing, but {NAME} names it.")
    except ValueError as error:
        raise ValueError(f"{file}: {error} Measure the rationales of this run again.") from None
    examples = _examples(path / name) if name else {}
    return Quality(step=found["step"], rows=found["rows"], values=values, examples=examples)


def _checked(found: _File, group: str, name: str, *, most: int | float) -> int | float | None:
    value = found[group].get(name)
    if value is not None and not 0 <= value <= most:
        expected = "a number from 0 to 1" if most == 1 else "a number of at least 0"
        raise ValueError(f"{group}.{name} is {json_files.brief(value)}; expected {expected}, or null.")
    return value


def _examples(file: Path) -> dict[str, Said]:
    examples: dict[str, Said] = {}
    for line, row in json_files.read_json_lines(file):
        try:
            examples[json_files.text_field(row, "id")] = json_files.typed(row, Said, extra=True)
        except ValueError as error:
            raise ValueError(f"{file}:{line}: {error} Measure the rationales of this run again.") from None
    return examples
