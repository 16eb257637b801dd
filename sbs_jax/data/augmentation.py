"""Records of further training rows: `sbs records --augmentation`, read by a run with `DataOptions.augmentation`.

The source is JSON lines with the fields of a record, of which all but `input` may be missing:

    {"input": "Ann has 3 pens and buys 4.\\nHow many has she?", "label": "( 3.0 + 4.0 )"}
    {"input": "Bob has 5 pens and loses 2.", "rationale": "He keeps 5 - 2 = 3."}

or a file of another form that the dataset knows (`Dataset.read_further`).
"""

import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NotRequired, TypedDict

from sbs_jax.data import records
from sbs_jax.data.dataset import Dataset, Row
from sbs_jax.data.records import Rationale, Record
from sbs_jax.storage import json_files, places

_JSON = (".jsonl", ".json")
_LETTERS = re.compile(r"[\W_]+")


class _Fields(TypedDict):
    input: str
    id: NotRequired[str]
    label: NotRequired[str | None]
    rationale: NotRequired[str | None]
    choices: NotRequired[list[str]]
    other_rationales: NotRequired[tuple[Rationale, ...]]
    weight: NotRequired[int | float | None]


def write(dataset: Dataset, source: str | Path, *, records_dir: str | Path, output: str | Path) -> Counter[str]:
    """Writes the usable rows of a source as records; returns their number ("written") and that of others, by reason.

    Rows with the input of a row of the dataset are left out, since folds test each of those; so are repeated inputs.
    Inputs are compared by letters and digits.
    """
    source = places.of(source)
    folder = places.of(records_dir) / dataset.name
    files = [file for split in records.SPLITS if (file := records.file_of(folder, split)).exists()]
    if not files:
        raise FileNotFoundError(
            f"{folder} has no records, with which the rows are compared. Write them with `sbs records --release` first."
        )
    seen = {_letters(row.input): f"also in {dataset.name}" for file in files for row in records.read_records(file)}
    counts: Counter[str] = Counter(written=0)
    found = []
    for row in _read(dataset, source):
        reason = row if isinstance(row, str) else seen.get(_letters(row.input))
        if isinstance(row, str) or reason is not None:
            counts[str(reason)] += 1
        else:
            seen[_letters(row.input)] = "the input of an earlier row"
            counts["written"] += 1
            found.append(row)
    if not found:
        raise ValueError(f"{source} has no usable rows: {dict(counts)}.")
    records.write_records(output, found)
    return counts


def _letters(text: str) -> str:
    return _LETTERS.sub(" ", text.lower()).strip()


def _read(dataset: Dataset, source: Path) -> Iterator[Record | str]:
    """Yields the records of a source, or the reason why a row is none."""
    name = source.name.removesuffix(".gz")
    if places.of(name).suffix in _JSON:
        yield from _of_json(dataset, source)
        return
    if dataset.read_further is None:
        raise ValueError(f"{source} is no {' or '.join(_JSON)} file; {dataset.name} reads no other form.")
    for row in dataset.read_further(source):
        yield row if isinstance(row, str) else _record(dataset, row)


def _of_json(dataset: Dataset, source: Path) -> Iterator[Record | str]:
    for line, value in json_files.read_json_lines(source):
        where = f"{source}:{line}"
        fields = json_files.typed(value, _Fields, where=where, extra=True)
        label, rationale = fields.get("label"), fields.get("rationale")
        if not (label or rationale):
            yield "neither label nor rationale"
            continue
        row = Row(
            id=fields.get("id"), input=fields["input"], label=label or None, choices=tuple(fields.get("choices", ()))
        )
        dataset.check_labels([row], where=lambda _, where=where: where)
        record = _record(dataset, row, rationale=rationale or None)
        yield dataclasses.replace(
            record, other_rationales=fields.get("other_rationales", ()), weight=fields.get("weight")
        )


def _record(dataset: Dataset, row: Row, *, rationale: str | None = None) -> Record:
    """Makes a record; an id is made from the input, in a form that no row of the dataset has."""
    made = f"{dataset.name}-further-{hashlib.sha1(row.input.encode()).hexdigest()[:12]}"
    given = {"id": row.id or made, "input": row.input, "label": row.label, "choices": row.choices}
    return Record(**given, rationale=rationale, outcome=records.OK if rationale else records.NO_TEACHER)


def shown(counts: Iterable[tuple[str, int]]) -> str:
    """Formats counts as "2,771 written; 367 left out: the input of an earlier row"."""
    return "; ".join(
        f"{count:,} {name}" if name == "written" else f"{count:,} left out: {name}" for name, count in counts
    )
