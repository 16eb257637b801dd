"""Makes the folder of a dataset (dataset_folder.py) of a user's table: columns, labels, splits, lengths, prompt.

Every decision is a line of `Plan.lines`, so that nothing is guessed silently.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sbs_jax.checks import choice, nearest
from sbs_jax.data import dataset_folder, records, release, table
from sbs_jax.data.dataset import Dataset, Row
from sbs_jax.data.records import SPLITS, Record
from sbs_jax.storage import atomic
from sbs_jax.storage.checksums import file_sha256
from sbs_jax.storage.json_files import brief, part

# Columns that are taken without being named, in this order.
INPUT_NAMES = ("input", "text", "question", "sentence", "prompt", "message", "query", "body", "content", "document")
LABEL_NAMES = ("label", "labels", "answer", "target", "output", "class", "category", "intent", "response")
RATIONALE_NAMES = ("rationale", "explanation", "reasoning")
ID_NAMES = ("id", "uid", "guid")
# Columns of an instruction set: an input, which a row may lack, follows its instruction.
INSTRUCTION, BESIDE = "instruction", ("input", "context")
SHARE = 0.1  # of the rows, for validation and for test, where the source has no such split
MOST_LABELS, ROWS_PER_LABEL, LONGEST_LABEL = 100, 4, 80  # of a closed set: at most, at least, characters
MARKER = "So the answer is"
_EXAMPLES, _LONGEST_EXAMPLE = 12, 300  # of the prompt, and characters of each
_STOP = "\nInput:"
_TEACHERS = 96  # tokens of a teacher's rationale, before one has been asked
_GRADED: Mapping[str | None, str] = dict.fromkeys((None, "normalized_accuracy"), "without case and punctuation")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Contents of a folder to write, and the decisions that led there."""

    dataset: Dataset
    splits: Mapping[str, Sequence[Row]]
    rationales: Mapping[str, str]  # by row id, where the table has them
    sources: Mapping[str, Mapping[str, str]]  # of each split: file -> SHA-256
    prompt: Mapping[str, Any]
    longest: Mapping[str, int]  # bytes of the longest input, label and rationale; 0 if the table has none
    lines: Sequence[str]


def plan(
    source: str,
    *,
    tables: Mapping[str | None, table.Table] | None = None,
    name: str | None = None,
    unlabelled: bool = False,
    input_column: str | None = None,
    label_column: str | None = None,
    rationale_column: str | None = None,
    labels: str = "auto",
    metric: str | None = None,
) -> Plan:
    """Decides everything about a table's dataset. ValueError or FileNotFoundError says what to name or correct.

    `source` is a path or hub name (`table.read`); with `tables` it only names these. `unlabelled` leaves all labels to
    the teacher. `labels` is "closed" (the column's values are all that there are), "free", or "auto". `metric` is a
    name of `dataset_folder.METRICS`; any but accuracy means free answers, unless `labels` says otherwise.
    """
    if metric is not None:
        choice("--metric", metric, dataset_folder.METRICS)
        labels = "free" if labels == "auto" and metric != "accuracy" else labels
    files = {} if tables is not None else {path.name: file_sha256(path) for path in _files(source)}
    tables = table.read(source) if tables is None else tables
    columns = tuple(dict.fromkeys(each for found in tables.values() for each in found.columns))
    lines: list[str] = []
    if input_column is None and INSTRUCTION in columns:
        beside = next((each for each in BESIDE if each in columns), None)
        tables = {split: _with_instructions(found, beside) for split, found in tables.items()}
        input_column = INSTRUCTION
        lines.append(f"instructions, each followed by its {beside!r} on a new line" if beside else "instructions alone")
        columns = tuple(each for each in columns if each != beside)
    input_column = _column(columns, input_column, INPUT_NAMES, what="input", source=source, required=True)
    assert input_column is not None
    rationale_column = _column(
        columns, rationale_column, RATIONALE_NAMES, what="rationale", source=source, required=False
    )
    others = [each for each in columns if each not in (input_column, rationale_column, *ID_NAMES)]
    if not unlabelled:
        label_column = _column(columns, label_column, LABEL_NAMES, what="label", source=source, required=bool(others))
    if label_column == input_column:
        raise ValueError(f"Input and label are both the column {input_column!r}; name two with --input and --label.")
    if rationale_column is not None and rationale_column in (input_column, label_column):
        raise ValueError(f"The column {rationale_column!r} has the rationales; name others with --input and --label.")
    taken = (input_column, label_column, rationale_column)
    id_column = next((each for each in ID_NAMES if each in columns and each not in taken), None)
    lines.append(f"input: column {input_column!r}" + (f"; id: column {id_column!r}" if id_column else ""))
    lines.append(
        "label: none, the teacher's labels are used" if label_column is None else f"label: column {label_column!r}"
    )
    name = name or _name_of(source)
    if rationale_column is not None:
        lines.append(f"rationales: column {rationale_column!r}, so no teacher is needed")
    rows, left_out = _rows(tables, input_column, label_column, rationale_column, id_column)
    lines += left_out
    known = _closed_set(rows, labels=labels, given=label_column is not None)
    lines.append(
        f"answers: one of {len(known)} labels, {brief(sorted(known))}"
        if known
        else f"answers: free text, graded {_GRADED.get(metric, f'by {metric}')}"
    )
    splits, rationales = _split(rows, name=name, lines=lines)
    texts = {
        "inputs": [row.input for of in splits.values() for row in of],
        "labels": [row.label for of in splits.values() for row in of if row.label],
        "rationales": list(rationales.values()),
    }
    bytes_of = longest(texts)
    targets = bytes_of["labels"] + bytes_of["rationales"]  # one method writes both, one after the other
    lengths = {
        "inputs": in_tokens(bytes_of["inputs"]),
        "targets": in_tokens(targets) if rationales else max(_TEACHERS, in_tokens(targets)),
    }
    lines.append(
        f"lengths: inputs up to {bytes_of['inputs']} bytes, about {lengths['inputs']} tokens; "
        f"targets {lengths['targets']}"
    )
    definition = dataset_folder.Definition(
        version=dataset_folder.VERSION,
        name=name,
        labels=tuple(sorted(known)) if known else None,
        marker=MARKER,
        metric=metric or ("accuracy" if known else "normalized_accuracy"),
        lengths=lengths,
        stops=(_STOP.strip(),),
    )
    dataset = dataset_folder.of(dataset_folder.described(definition), where=source)
    for split, of_split in splits.items():
        dataset.check_labels(of_split, where=lambda number, split=split: f"{source}, {split} row {number + 1}")
    return Plan(
        dataset=dataset,
        splits=splits,
        rationales=rationales,
        sources=dict.fromkeys(splits, files),
        prompt=_prompt(splits["train"], known, lines),
        longest=bytes_of,
        lines=lines,
    )


def longest(texts: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Returns the bytes of the longest text of each kind; 0 if there is none."""
    return {kind: max((len(text.encode()) for text in of), default=0) for kind, of in texts.items()}


def _with_instructions(found: table.Table, beside: str | None) -> table.Table:
    """Puts each row's instruction and its input together, in the column of instructions; without the other column."""
    rows = []
    for row in found.rows:
        texts = [text for text in (row[INSTRUCTION], row.get(beside) if beside else None) if text is not None]
        others = {name: value for name, value in row.items() if name != beside}
        rows.append({**others, INSTRUCTION: "\n".join(texts) or None})
    columns = tuple(name for name in found.columns if name != beside)
    return dataclasses.replace(found, columns=columns, rows=tuple(rows))


def in_tokens(size: int) -> int:
    """Estimates the tokens of a text of so many bytes with prefix and EOS, as a multiple of 8: 3 bytes a token."""
    return 8 * -(-(size // 3 + 12) // 8)


def _column(
    columns: Sequence[str], given: str | None, usual: Sequence[str], *, what: str, source: str, required: bool
) -> str | None:
    if given is not None:
        if given not in columns:
            raise ValueError(
                f"{source} has no column {part(given)!r}; it has {brief(list(columns))}.{nearest(given, columns)}"
            )
        return given
    lowered = {name.lower(): name for name in reversed(columns)}
    found = [lowered[name] for name in usual if name in lowered]
    if found or not required:
        return found[0] if found else None
    raise ValueError(
        f"None of the columns {brief(list(columns))} of {source} has a usual name for the {what} ({', '.join(usual)}); "
        f"name it with --{what} COLUMN ({what}_column in Python)"
        + (", or say with --unlabelled that the teacher labels the rows." if what == "label" else ".")
    )


def _name_of(source: str) -> str:
    stem = Path(source).name.split(".")[0].lower()
    name = re.sub(r"[^a-z0-9]+", "_", stem).strip("_")
    return name if name[:1].isalpha() else f"data_{name}".rstrip("_")


@dataclasses.dataclass(frozen=True)
class _Placed:
    row: Row
    split: str | None
    rationale: str | None


def _rows(
    tables: Mapping[str | None, table.Table],
    input_column: str,
    label_column: str | None,
    rationale_column: str | None,
    id_column: str | None,
) -> tuple[list[_Placed], list[str]]:
    """Makes rows of all tables; leaves out those without an input, and repeated inputs, and counts them."""
    found: list[_Placed] = []
    seen: dict[str, str | None] = {}
    counts: Counter[str] = Counter()
    for split, one in tables.items():
        for values in one.rows:
            text, label = values[input_column], values.get(label_column) if label_column else None
            if text is None:
                counts["without an input"] += 1
                continue
            if text in seen:
                counts["with the input of an earlier row" + (" and another label" if seen[text] != label else "")] += 1
                continue
            seen[text] = label
            row_id = values.get(id_column) if id_column else None
            rationale = values.get(rationale_column) if rationale_column else None
            row = Row(id=row_id, input=text, label=None if label is None else label.strip())
            found.append(_Placed(row, split, rationale))
    ids = [placed.row.id for placed in found]
    if None in ids or len(set(ids)) < len(ids):  # ids of inputs instead
        found = [dataclasses.replace(placed, row=dataclasses.replace(placed.row, id=None)) for placed in found]
        if id_column:
            counts[f"get new ids: column {id_column!r} is not distinct"] = len(found)
    return found, [
        f"{count:,} rows {what}" + ("" if "new ids" in what else ": left out") for what, count in sorted(counts.items())
    ]


def _closed_set(rows: Sequence[_Placed], *, labels: str, given: bool) -> set[str]:
    """Returns the closed set of labels; empty if answers are free text."""
    counts = Counter(placed.row.label for placed in rows if placed.row.label is not None)
    known = {label for label in counts if label is not None}
    if not given or not known:
        return set()
    if labels == "closed" or (
        labels == "auto"
        and 2 <= len(known) <= min(MOST_LABELS, sum(counts.values()) // ROWS_PER_LABEL)
        and max(map(len, known)) <= LONGEST_LABEL
    ):
        if len(known) < 2:
            raise ValueError(f"All rows have the same label, {brief(sorted(known)[0])}; expected at least two.")
        return known
    return set()


def _split(rows: Sequence[_Placed], *, name: str, lines: list[str]) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """Gives ids to the rows and splits them: as the source does, missing splits by the ids' hashes, label by label.

    Also returns the rationales by id.
    """
    with_ids = release.with_ids(
        [placed.row for placed in rows], name=name, where=lambda number: f"row {number + 1} of the table"
    )
    found: dict[str, list[Row]] = defaultdict(list)
    for placed, row in zip(rows, with_ids, strict=True):
        found[placed.split or "train"].append(row)
    if not found["train"]:
        raise ValueError(f"There is no train split, only {', '.join(sorted(found))}; expected rows to learn from.")
    taken = [split for split in ("test", "validation") if split not in found]
    counts = Counter(row.label for row in found["train"])
    by_label: dict[str | None, list[Row]] = defaultdict(list)
    for row in found["train"]:  # rare labels, and free answers, are split together
        by_label[row.label if counts[row.label] > 2 * len(taken) else None].append(row)
    if taken:
        found["train"] = []
        for of_label in by_label.values():
            ordered = sorted(of_label, key=lambda row: hashlib.sha256(str(row.id).encode()).digest())
            each = max(1, round(SHARE * len(ordered))) if len(ordered) > 2 * len(taken) else 0
            for number, split in enumerate(taken):
                found[split] += ordered[number * each : (number + 1) * each]
            found["train"] += ordered[len(taken) * each :]
    order = {row.id: number for number, row in enumerate(with_ids)}
    splits = {split: sorted(found[split], key=lambda row: order[row.id]) for split in SPLITS if found[split]}
    sizes = ", ".join(f"{len(of):,} {split}" for split, of in splits.items())
    how = f"; {' and '.join(taken)} by the hash of ids, label by label" if taken else ", as the source has them"
    lines.append(f"splits: {sizes}{how}")
    missing = [split for split in SPLITS if split not in splits]
    if missing:
        raise ValueError(
            f"{len(with_ids)} rows are too few: {', '.join(missing)} would be empty. Give at least 10 rows, with "
            "several of each label."
        )
    pairs = zip(rows, with_ids, strict=True)
    return splits, {str(row.id): placed.rationale for placed, row in pairs if placed.rationale is not None}


def _prompt(rows: Sequence[Row], labels: set[str], lines: list[str]) -> dict[str, Any]:
    """Writes a prompt that works as it is: the labels, and examples of train with their labels."""
    examples: list[Row] = []
    of_label: Counter[str | None] = Counter()
    most = max(1, _EXAMPLES // max(1, len(labels)))
    for row in rows:
        wanted = row.label is not None and (not labels or of_label[row.label] < most)
        if wanted and len(row.input) <= _LONGEST_EXAMPLE and len(examples) < _EXAMPLES:
            of_label[row.label] += 1
            examples.append(row)
    shown = "".join(f"\n\nInput: {row.input}\nAnswer: {row.label}" for row in examples)
    lines.append(f"prompt: {len(examples)} examples of train, none of validation or test")
    form = f'Then write, once, "{MARKER}" followed by '
    form += (
        f"one of these labels, exactly as written here: {', '.join(sorted(labels))}." if labels else "the answer alone."
    )
    return {
        "version": 1,
        "instruction": f"Answer the question about each input. First explain in one or two plain sentences why. {form} "
        "End with a full stop and write nothing after it."
        + (f" Some inputs and their answers:{shown}" if shown else ""),
        "question": "Input: {input}\nAnswer:",
        "answer": f"{{rationale}} {MARKER} {{label}}.",
        "hint": "(The correct answer is known to be {label}. Explain why, from the input alone and without mentioning "
        "that you were told, and then write the answer, in the same form as before.)",
        "stops": [_STOP],
        "exemplars": [],
    }


def _files(source: str) -> list[Path]:
    path = Path(source)
    if path.is_file():
        return [path]
    return sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else []


def write(plan: Plan, folder: Path, *, gin: Mapping[str, str], keep: bool = False) -> None:
    """Writes the folder, complete or not at all; `gin` are the gin files by name.

    FileExistsError if it exists; with `keep`, only if it is of other rows or decisions.
    """
    if keep and folder.exists():
        _refuse_others(plan, folder)
        return
    with atomic.new_folder(folder) as scratch:
        assert plan.dataset.definition is not None
        _write_json(scratch / dataset_folder.FILE, plan.dataset.definition)
        _write_json(scratch / dataset_folder.PROMPT, plan.prompt)
        _write_records(plan, scratch / dataset_folder.INPUTS, {})
        if plan.rationales:
            _write_records(plan, scratch / dataset_folder.RECORDS, plan.rationales)
        for name, text in gin.items():
            (scratch / name).write_text(text, "utf-8")


def _refuse_others(plan: Plan, folder: Path) -> None:
    same = dataset_folder.read(folder).definition == plan.dataset.definition
    for split, rows in plan.splits.items() if same else ():
        found = records.read_records(records.file_of(folder / dataset_folder.INPUTS / plan.dataset.name, split))
        same = same and found == _records(rows, {})
    own = folder / dataset_folder.RECORDS / plan.dataset.name
    for split, rows in plan.splits.items() if same and plan.rationales else ():
        same = same and records.read_records(records.file_of(own, split)) == _records(rows, plan.rationales)
    if not same:
        raise FileExistsError(f"{folder} is of other rows or columns; choose another place, or remove it.")


def _records(rows: Sequence[Row], rationales: Mapping[str, str]) -> list[Record]:
    """Makes records; a rationale of the table argues for the row's own label."""
    found = []
    for row in rows:
        record = Record(id=str(row.id), input=row.input, label=row.label)
        if record.id in rationales:
            given = {"rationale": rationales[record.id], "teacher_label": row.label, "outcome": records.OK}
            record = dataclasses.replace(record, **given)
        found.append(record)
    return found


def _write_records(plan: Plan, records_dir: Path, rationales: Mapping[str, str]) -> None:
    release.write_directory(
        plan.dataset,
        {split: _records(rows, rationales) for split, rows in plan.splits.items()},
        sources=plan.sources,
        records_dir=records_dir,
        parser="strict",
        inputs="records",
        skipped={},
        overwrite=False,
    )


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
