"""Records on disk: one row per example with its input, the human label and the teacher's answer.

A records directory holds, per dataset, the files that training reads and a manifest that describes them:

    <records_dir>/svamp/train.jsonl
    <records_dir>/svamp/test.jsonl
    <records_dir>/svamp/manifest.json

A line of a `.jsonl` file is one `Record` (wrapped here):

    {"id": "svamp-0f3e9c1d2a44", "input": "Ann has 3 pens and buys 4.\\nHow many has she?",
     "label": "( 3.0 + 4.0 )", "choices": [], "teacher_text": "She has 3 + 4. The answer is (3 + 4).",
     "rationale": "She has 3 + 4.", "teacher_label": "(3 + 4)", "outcome": "ok"}

Rows are joined by `id`, never by position. Standard library only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from sbs_jax import checks
from sbs_jax.storage import places, user_files
from sbs_jax.storage.atomic import replace, replacing
from sbs_jax.storage.checksums import file_sha256
from sbs_jax.storage.json_files import brief, encoded, read_json, read_json_lines, shown, typed

OK = "ok"
NO_TEACHER = "no_teacher"
MANIFEST = "manifest.json"
DEFINITION = "dataset.json"  # of the folder of a dataset (dataset_folder.py), which holds a records directory
BASELINES = "baselines.json"  # of `sbs baseline`
SPLITS = ("train", "validation", "test")
# Increased when the meaning of a field changes, so that old files are refused instead of misread.
FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rationale:
    """A rationale of one reply, with the label of that reply."""

    rationale: str
    teacher_label: str | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One example.

    Attributes:
      id: distinct within its file.
      input: the student's input, without a task prefix.
      label: the human label; None for an unlabelled example.
      choices: possible labels of this example; () if the dataset's own set applies.
      teacher_text: the teacher's raw reply; None if the teacher was not asked.
      rationale: parsed from the reply; None if it has no usable one.
      teacher_label: parsed from the reply; None if it has no usable one.
      outcome: "ok", "no_teacher", or the problem of the reply (`sbs_jax.data.parsing.OUTCOMES`; "none_chosen" after
        `sbs select`). To check whether a rationale or label is usable, read those fields instead.
      prompt: hash of the prompt template (`teacher.prompts`); None for replies that `sbs teach` did not ask for.
      hinted: the reply answers a second request that revealed the label.
      votes: (replies with this label, replies requested) if more than one was requested, else None.
      other_rationales: rationales of the other usable replies, in the order of the samples, each text once.
      weight: how often each target token of the row counts in training, beside 1 of rows without a weight; 1e-6 to 1e6.

    The last five are written only if they are set.
    """

    id: str
    input: str
    label: str | None
    choices: tuple[str, ...] = ()
    teacher_text: str | None = None
    rationale: str | None = None
    teacher_label: str | None = None
    outcome: str = NO_TEACHER
    prompt: str | None = None
    hinted: bool = False
    votes: tuple[int, int] | None = None
    other_rationales: tuple[Rationale, ...] = ()
    weight: int | float | None = None

    @property
    def rationales(self) -> tuple[Rationale, ...]:
        """All rationales that are not blank, the reply of the vote's first."""
        if self.rationale is None or not self.rationale.strip():
            return self.other_rationales
        return (Rationale(rationale=self.rationale, teacher_label=self.teacher_label), *self.other_rationales)


_FIELDS = tuple(field.name for field in dataclasses.fields(Record))
_ONLY_IF_SET = ("prompt", "hinted", "votes", "other_rationales", "weight")
_REPEATED = ("label", "teacher_label", "outcome")  # fields with few values in many rows


class Counts(TypedDict):
    """Counts of the rows of one `.jsonl` file, by outcome of the teacher's replies."""

    rows: int
    outcomes: dict[str, int]  # outcome -> rows; the counts sum to `rows`
    rationales: int  # rows with a usable rationale
    teacher_labels: int  # rows with a usable teacher label
    labelled: int  # rows with a human label
    teacher_right: int  # of these, rows whose teacher label the dataset's grading accepts
    teacher_accuracy: float | None  # 100 * teacher_right / labelled; None without human labels or teacher labels


class SplitSummary(Counts):
    """Manifest entry of one `.jsonl` file."""

    sha256: str  # of <split>.jsonl
    sources: dict[str, str]  # source file -> its sha256


class _Always(TypedDict):
    format: int
    dataset: str
    parser: str  # "official" or "strict"
    inputs: str  # "release", "tfds" or "records"
    sbs_jax: str  # version that wrote it
    splits: dict[str, SplitSummary]
    skipped: dict[str, str]  # split -> why it has no file


class Manifest(_Always, total=False):
    """manifest.json of a records directory; has no times or paths, so it is reproducible."""

    teacher: dict[str, Any]  # model, parameters and prompt, if `sbs teach` asked
    selection: dict[str, Any]  # rules, student and counts, if `sbs select` chose among the rationales


# ------------------------------------------------------------------------------------ reading


def file_of(directory: Path, split: str) -> Path:
    """Returns the path of a split's records, `<split>.jsonl` or `<split>.jsonl.gz`, whether it exists or not."""
    return user_files.find(directory / f"{split}.jsonl")


def read_records(path: str | Path, *, replies: bool = True, sha256: str | None = None) -> list[Record]:
    """Reads all records of a file, in its order; also of one JSON array, or packed with gzip.

    Leaves out `teacher_text`, unless `replies`. ValueError names file and line: bytes that are not UTF-8, a blank or
    malformed line, missing or unknown fields, a field of the wrong type, a repeated id. Of a file with the `sha256`
    that its manifest has, fields and ids were checked when it was written and are not checked again.
    """
    found: list[Record] = []
    line_of: dict[str, int] = {}
    checked = sha256 is not None and sha256 in _written(places.of(path).parent)
    record_of = _written_record if checked else _record
    for line, value in read_json_lines(path):
        if not replies and type(value.get("teacher_text")) is str:
            value["teacher_text"] = None
        try:
            record = record_of(value)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{line}: {error}") from None
        if not checked and line_of.setdefault(record.id, line) != line:
            raise ValueError(
                f"{path}:{line}: the id {brief(record.id)} is already that of line {line_of[record.id]}; give "
                "every row a distinct id."
            )
        found.append(record)
    return found


def _written(directory: Path) -> set[str]:
    """Returns the hashes of the files that a manifest describes; none without a manifest."""
    try:
        return {split["sha256"] for split in read_manifest(directory)["splits"].values()}
    except (FileNotFoundError, ValueError):
        return set()


def _written_record(value: dict[str, Any]) -> Record:
    """Builds a record of the JSON that `write_records` made of one; equal labels of all rows are one text in memory."""
    value["choices"] = tuple(value["choices"])
    if "votes" in value:
        value["votes"] = tuple(value["votes"])
    if "other_rationales" in value:
        value["other_rationales"] = tuple(Rationale(**each) for each in value["other_rationales"])
    for name in _REPEATED:
        if value[name] is not None:
            value[name] = sys.intern(value[name])
    return Record(**value)


def _record(value: Mapping[str, Any]) -> Record:
    """Checks and builds a record, from JSON or from the fields of another; ValueError names the field."""
    if isinstance(value, Mapping) and "input" not in value and not {"teacher_text", "rationale"} & value.keys():
        raise ValueError(
            f"got the fields {brief(list(value))}; expected those of a record: id, input and label. `sbs init FILE "
            "--input COLUMN --label COLUMN` makes a dataset of a file with other columns."
        )
    record = typed(value, Record)
    if not record.id:
        raise ValueError("the field 'id' is empty; rows are joined by id, so every row needs one.")
    if record.votes and min(record.votes) < 1:
        raise ValueError(f"the field 'votes' is {list(record.votes)}; expected two numbers of at least 1.")
    if any(not each.rationale.strip() for each in record.other_rationales):
        raise ValueError("the field 'other_rationales' has a blank rationale; leave it out.")
    if record.weight is not None:
        checks.number("the field 'weight'", record.weight, least=1e-6, most=1e6)
    return record


def fields_of(record: Record) -> dict[str, Any]:
    """Returns the JSON object of a record."""
    return {name: value for name, value in _all_fields(record).items() if value or name not in _ONLY_IF_SET}


def _all_fields(record: Record) -> dict[str, Any]:
    """Returns all fields by name. (dataclasses.asdict copies every text.)"""
    found = {name: getattr(record, name) for name in _FIELDS}
    if record.other_rationales:
        found["other_rationales"] = [
            {"rationale": each.rationale, "teacher_label": each.teacher_label} for each in record.other_rationales
        ]
    return found


# ------------------------------------------------------------------------------------ writing


def write_records(path: str | Path, records: Iterable[Record]) -> str:
    """Writes records atomically, one line each, and returns the file's SHA-256.

    The same records give the same bytes. ValueError for a malformed record or a repeated id, before anything is
    replaced.
    """
    path = places.of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    digest = hashlib.sha256()
    with replacing(path) as file:
        for number, record in enumerate(records, start=1):
            try:
                fields = fields_of(_record(_all_fields(record)))
                data = encoded(fields) + b"\n"
                if record.id in seen:
                    raise ValueError(f"the id {record.id!r} occurred before; ids must be distinct.")
            except ValueError as error:
                raise ValueError(f"Record {number} for {path}: {error}") from None
            seen.add(record.id)
            digest.update(data)
            file.write(data)
    return digest.hexdigest()


def write_manifest(directory: str | Path, manifest: Manifest) -> None:
    """Writes `<directory>/manifest.json` atomically; the same manifest gives the same bytes."""
    path = places.of(directory) / MANIFEST
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, (json.dumps(manifest, ensure_ascii=False, indent=1, sort_keys=True) + "\n").encode())


def read_manifest(directory: str | Path) -> Manifest:
    """Reads `<directory>/manifest.json`. FileNotFoundError, or ValueError if it is malformed."""
    path = places.of(directory) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{directory} has no {MANIFEST}; expected a records directory of `sbs records`.")
    value = read_json(path)
    try:
        got = value.get("format") if isinstance(value, dict) else value
        if got != FORMAT:
            raise ValueError(f"got format {shown(got)}; expected {FORMAT}.")
        manifest = typed(value, Manifest)
        for name in ("splits", "skipped"):
            if not manifest[name].keys() <= set(SPLITS):
                raise ValueError(f"{name!r} has {brief(list(manifest[name]))}; expected some of {list(SPLITS)}.")
    except ValueError as error:
        raise ValueError(f"{path}: {error} Write the records again with this version.") from None
    return manifest


def check_exist(records_dir: str | Path, name: str) -> None:
    """Raises FileNotFoundError, with the commands that write them, if a dataset has no records in a folder."""
    directory = places.of(records_dir) / name
    if any(file_of(directory, split).exists() for split in SPLITS):
        return
    gone = "" if places.of(records_dir).is_dir() else f" (there is no folder {records_dir})"
    missing = f"There are no records of {name}: no train.jsonl, validation.jsonl or test.jsonl in {directory}{gone}."
    folder = places.of(records_dir).parent
    if (folder / DEFINITION).is_file():
        raise FileNotFoundError(
            f"{missing} Ask a teacher for them:\n  sbs teach --dataset {folder} --provider openai --model gpt-4o-mini\n"
            "or train on the labels alone, with --gin_file=gin_configs/methods/standard_finetuning.gin "
            f"--gin.RECORDS_DIR={folder}/inputs."
        )
    raise FileNotFoundError(
        f"{missing} Write them with\n  sbs records --dataset {name} --release DIR --records_dir {records_dir}\nwhere "
        "DIR holds the official release, ask a teacher for them with `sbs teach`, or set DataOptions.records_dir to "
        "where they are."
    )


def put_in_place(made: Path, target: Path, *, overwrite: bool) -> None:
    """Moves a new records directory into place, unless an equal one exists.

    FileExistsError if a different one exists and `overwrite` is False, or it also holds files that are not records.
    """
    if not target.exists():
        _move_folder(made, target)
        return
    differences = _differences(made, target)
    if not differences:
        return
    if not overwrite:
        raise FileExistsError(
            f"{target} holds other records: {'; '.join(differences)}. Choose another "
            "records_dir, or pass overwrite (--overwrite) to replace them."
        )
    ours = {MANIFEST, BASELINES, *(f"{split}.jsonl" for split in SPLITS)}
    foreign = sorted(path.name for path in target.iterdir() if path.name not in ours)
    if foreign:
        raise FileExistsError(
            f"{target} holds files that are not records: {foreign[:5]}. Move them elsewhere: they would be lost."
        )
    if isinstance(target, places.BucketPath):
        target.remove_tree(first=MANIFEST)
        _move_folder(made, target)
        return
    old = made.with_name("old")  # deleted with the temporary directory
    target.rename(old)
    try:
        made.rename(target)
    except OSError:
        old.rename(target)
        raise


def _move_folder(made: Path, target: Path) -> None:
    """Moves records to where nothing is; into a bucket, with the manifest last."""
    if not places.in_bucket(target):
        made.rename(target)
        return
    for file in sorted(made.iterdir(), key=lambda path: path.name == MANIFEST):
        places.upload(file, target / file.name)


def _differences(made: Path, target: Path) -> list[str]:
    """Lists the differences between two records directories; [] if they are equal."""
    if not (target / MANIFEST).is_file():
        return [f"it has no {MANIFEST}"]
    try:
        new, old = read_manifest(made), read_manifest(target)
    except ValueError as error:
        return [str(error)]
    found = [
        f"{field} is {old[field]!r} there, {new[field]!r} here"
        for field in ("dataset", "parser", "inputs")
        if old[field] != new[field]
    ]
    if old.get("selection") != new.get("selection"):
        found.append("the rationales were chosen by other rules, or from others")
    for split in SPLITS:
        before, after = old["splits"].get(split), new["splits"].get(split)
        if (before is None) != (after is None):
            found.append(f"{split} is only {'here' if before is None else 'there'}")
        elif before is not None and after is not None:
            found += _split_differences(split, before, after, same_parser=old["parser"] == new["parser"])
            path = target / f"{split}.jsonl"
            if not path.is_file() or file_sha256(path) != before["sha256"]:
                found.append(f"{path.name} is not the file its manifest describes")
    if not found and (made / MANIFEST).read_bytes() != (target / MANIFEST).read_bytes():
        found.append(f"the {MANIFEST} was written by version {old['sbs_jax']}")
    return found


def _split_differences(split: str, before: SplitSummary, after: SplitSummary, *, same_parser: bool) -> list[str]:
    changed = sorted(
        name
        for name in before["sources"].keys() | after["sources"].keys()
        if before["sources"].get(name) != after["sources"].get(name)
    )
    if changed:
        return [f"the sources of {split} differ ({', '.join(changed[:3])})"]
    if same_parser and before["sha256"] != after["sha256"]:
        return [f"the replies of {split} were parsed by a different version of the same parser"]
    return []
