"""Read measured rationales of a run: `rationales.json` in the run directory, and the texts in a file beside it.

docs/report.md shows both formats; rationales.py writes them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbs_jax.storage import json_files

NAME, LINES = "rationales.json", "rationales.jsonl"
VERSION = 1
# Group, name, most. Any value may be null or missing, if it was not or cannot be measured.
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


@dataclass(frozen=True, kw_only=True)
class Said:
    """One rationale of a student, on one test row."""

    rationale: str
    implied_label: str | None
    consistent: bool | None
    teacher_rationale: str | None


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The rationales of one run on its test rows; values as `rationales.json` has them."""

    step: int
    rows: int
    values: Mapping[str, float | None]  # "by_parser", "by_label_task", "rouge_l", "chrf", "student_words", ..
    examples: Mapping[str, Said]  # by id of the test row


def read(path: Path) -> Quality | None:
    """Reads the rationales of a run directory; None without a rationales.json. ValueError names what is damaged."""
    file = path / NAME
    if not file.is_file():
        return None
    found = json_files.read_json(file)
    problem = _problem(found)
    if problem:
        raise ValueError(f"{file}: {problem}. Measure the rationales of this run again, or delete the file.")
    examples = found.get("examples_file")
    return Quality(
        step=found["step"],
        rows=found["rows"],
        values={name: found[group].get(name) for group, name, _ in _VALUES},
        examples=_examples(path / examples) if examples else {},
    )


def _problem(found: Any) -> str | None:
    brief = json_files.brief
    if not isinstance(found, dict) or found.get("version") != VERSION:
        got = found.get("version") if isinstance(found, dict) else found
        return f"got version {brief(got)}; expected an object of version {VERSION}"
    for name in ("step", "rows"):
        if type(found.get(name)) is not int or found[name] < 0:
            return f"{name} is {brief(found.get(name))}; expected a whole number"
    if found.get("split") != "test":
        return f"split is {brief(found.get('split'))}; expected 'test'"
    for group, name, most in _VALUES:
        if not isinstance(found.get(group), dict):
            return f"{group} is {brief(found.get(group))}; expected an object"
        value = found[group].get(name)
        if value is not None and not (type(value) in (int, float) and 0 <= float(value) <= most):
            expected = "a number from 0 to 1" if most == 1 else "a number of at least 0"
            return f"{group}.{name} is {brief(value)}; expected {expected}, or null"
    name = found.get("examples_file")
    if name is not None and (not isinstance(name, str) or Path(name).name != name or not name):
        return f"examples_file is {brief(name)}; expected the name of a file beside it"
    return None


def _examples(file: Path) -> dict[str, Said]:
    if not file.is_file():
        raise ValueError(f"{file} is missing, but {NAME} beside it names it. Measure the rationales again.")
    examples: dict[str, Said] = {}
    for line, row in json_files.read_json_lines(file):
        optional = {name: row.get(name) for name in ("implied_label", "teacher_rationale")}
        if not (
            all(isinstance(row.get(name), str) for name in ("id", "rationale"))
            and all(isinstance(text, str | None) for text in optional.values())
            and isinstance(row.get("consistent"), bool | None)
        ):
            raise ValueError(
                f'{file}:{line}: got {json_files.brief(row)}; expected {{"id": text, "rationale": text, '
                '"implied_label": text or null, "consistent": true, false or null, '
                '"teacher_rationale": text or null, ..}.'
            )
        examples[row["id"]] = Said(rationale=row["rationale"], consistent=row.get("consistent"), **optional)
    return examples
