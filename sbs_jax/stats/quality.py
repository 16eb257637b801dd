"""What is known of a run's rationales: `rationales.json` in the run directory, and the texts beside it.

    {"version": 1, "dataset": "svamp", "step": 500, "split": "test", "rows": 200,
     "consistency": {"by_parser": 0.91, "by_parser_rows": 180, "by_label_task": 0.88,
                     "by_label_task_other_rationale": 0.7},
     "overlap_with_teacher": {"rouge_l": 0.41, "chrf": null},
     "length": {"student_words": 31.5, "teacher_words": 28.2}, "examples_file": "rationales.jsonl"}

A line of the examples file:

    {"id": "svamp-7cdbeb93c61c", "rationale": "There are 10 ..", "implied_label": "(10 * 45)",
     "prediction": "( 10.0 * 45.0 )", "consistent": true, "teacher_rationale": "They put ..", "rouge_l": 0.6}
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbs_jax.storage import json_files

NAME = "rationales.json"
_VERSION = 1
# Group, name, whether it is a share of 0 to 1. Any may be null or missing, where it was not or cannot be measured.
_VALUES = (
    ("consistency", "by_parser", True),
    ("consistency", "by_parser_rows", False),
    ("consistency", "by_label_task", True),
    ("consistency", "by_label_task_other_rationale", True),
    ("overlap_with_teacher", "rouge_l", True),
    ("overlap_with_teacher", "chrf", False),
    ("length", "student_words", False),
    ("length", "teacher_words", False),
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
    """The rationales of a run directory; None where there is no rationales.json. ValueError names what is damaged."""
    file = path / NAME
    if not file.is_file():
        return None
    found = json_files.read_json(file)
    problem = _problem(found)
    if problem:
        raise ValueError(f"{file}: {problem}. Measure the rationales of this run again, or delete the file.")
    values = {name: found[group].get(name) for group, name, _ in _VALUES}
    examples = found.get("examples_file")
    return Quality(
        step=found["step"],
        rows=found["rows"],
        values=values,
        examples=_examples(path / examples) if examples else {},
    )


def _problem(found: Any) -> str | None:
    if not isinstance(found, dict) or found.get("version") != _VERSION:
        got = found.get("version") if isinstance(found, dict) else found
        return f"got version {json_files.brief(got)}; expected an object of version {_VERSION}"
    for name in ("step", "rows"):
        if type(found.get(name)) is not int or found[name] < 0:
            return f"{name} is {json_files.brief(found.get(name))}; expected a whole number"
    if found.get("split") != "test":
        return f"split is {json_files.brief(found.get('split'))}; expected 'test'"
    for group, name, is_share in _VALUES:
        holder = found.get(group)
        if not isinstance(holder, dict):
            return f"{group} is {json_files.brief(holder)}; expected an object"
        value = holder.get(name)
        if value is not None and not (type(value) in (int, float) and 0 <= float(value) <= (1 if is_share else 1e9)):
            expected = "a number from 0 to 1" if is_share else "a number of at least 0"
            return f"{group}.{name} is {json_files.brief(value)}; expected {expected}, or null"
    name = found.get("examples_file")
    if name is not None and (not isinstance(name, str) or Path(name).name != name or not name):
        return f"examples_file is {json_files.brief(name)}; expected the name of a file beside it"
    return None


def _examples(file: Path) -> dict[str, Said]:
    if not file.is_file():
        raise ValueError(f"{file} is missing, but {NAME} beside it names it. Measure the rationales again.")
    examples: dict[str, Said] = {}
    for line, row in json_files.read_json_lines(file):
        texts = [row.get("id"), row.get("rationale")]
        optional = [row.get("implied_label"), row.get("teacher_rationale")]
        if not (
            all(isinstance(text, str) for text in texts)
            and all(text is None or isinstance(text, str) for text in optional)
            and isinstance(row.get("consistent"), bool | None)
        ):
            raise ValueError(
                f'{file}:{line}: got {json_files.brief(row)}; expected {{"id": text, "rationale": text, '
                '"implied_label": text or null, "consistent": true, false or null, '
                '"teacher_rationale": text or null, ..}.'
            )
        examples[row["id"]] = Said(
            rationale=row["rationale"],
            implied_label=row.get("implied_label"),
            consistent=row.get("consistent"),
            teacher_rationale=row.get("teacher_rationale"),
        )
    return examples
