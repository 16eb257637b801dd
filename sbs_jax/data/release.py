"""Import of the official release of teacher outputs as records.

The release is read as it was published:

    <release_dir>/svamp/svamp_train.json       inputs: JSON lines
    <release_dir>/svamp/svamp_valid.json       (some datasets have no valid)
    <release_dir>/svamp/svamp_test.json
    <release_dir>/svamp/llm/train_CoT_0.json   replies: a JSON list of texts; shards 0, 1, 2, ..
    <release_dir>/svamp/llm/train_CoT_1.json   continue one another in numeric order

Reply i, counted across shards, belongs to input i. Only this module joins rows by position: it gives every row an id,
and everything else joins by id. Inputs can also come from TensorFlow Datasets, in any order; replies then find
their inputs by id.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sbs_jax
from sbs_jax import checks
from sbs_jax.data import records, summary, tfds
from sbs_jax.data.dataset import Dataset, Row
from sbs_jax.data.parsing import Parsed
from sbs_jax.data.records import Manifest, Record, SplitSummary
from sbs_jax.data.summary import Summary
from sbs_jax.storage import checksums, places, user_files
from sbs_jax.storage.json_files import brief, read_json_lines, read_texts

# Our split names (also TensorFlow Datasets') and the release's.
SPLITS: Mapping[str, str] = {"train": "train", "validation": "valid", "test": "test"}
INPUTS = ("release", "tfds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """A teacher's reply and the input it replies to."""

    input: str
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Rows of one split, before conversion to records.

    Attributes:
      rows: with distinct ids.
      answers: replies by row id; may be empty.
      sources: file or dataset -> its SHA-256.
      where: row number (from 0) -> its file and line or example, for messages.
    """

    rows: Sequence[Row]
    answers: Mapping[str, Answer]
    sources: Mapping[str, str]
    where: Callable[[int], str]


def import_release(
    dataset: Dataset,
    *,
    release_dir: str | Path | None,
    records_dir: str | Path,
    parser: str,
    inputs: str = "release",
    overwrite: bool = False,
    tfds_data_dir: str | None = None,
    tell: Summary | None = None,
) -> Manifest:
    """Imports inputs and parsed teacher replies into `<records_dir>/<dataset>/`.

    The directory appears complete or not at all, and the same sources give the same bytes. An existing directory with
    the same contents is kept. A split with replies but no inputs (with `inputs="tfds"` also the reverse) is skipped;
    `skipped` in the manifest gives the reason.

    Args:
      dataset: the dataset to import; defines how its files, labels and replies are read.
      release_dir: folder that holds `<dataset>/` of the release. With `inputs="tfds"`, the source of replies, by id:
        the release, a records directory, or None.
      records_dir: gets `<dataset>/{train,validation,test}.jsonl` and `manifest.json`.
      parser: "official" (bug for bug) or "strict".
      inputs: "release", or "tfds" for TensorFlow Datasets (downloads what `tfds_data_dir` does not have).
      overwrite: replace a directory made with another parser or from other sources.
      tfds_data_dir: folder of TensorFlow Datasets; None for its default.
      tell: gets every split that was written.

    Raises:
      FileNotFoundError: no such folder, inputs or teacher shards.
      ValueError: malformed files, wrong lengths, missing shards, labels outside the set, duplicate or unknown ids,
        unknown names; with file and line if there is one.
      FileExistsError: the directory holds something else, and `overwrite` is False.
    """
    checks.choice(f"The parser for {dataset.name}", parser, dataset.parsers.keys())
    _check_source(inputs, INPUTS, tfds_data_dir)
    if inputs == "tfds":
        splits, skipped = _from_tfds(dataset, release_dir, tfds_data_dir)
    elif release_dir is None:
        raise ValueError("release_dir is None; inputs='release' needs the release's folder.")
    else:
        splits, skipped = _from_release(dataset, places.of(release_dir), replies="required")
    if release_dir is not None:
        check_target(places.of(release_dir) / dataset.name, places.of(records_dir) / dataset.name)
    for split, reason in skipped.items():
        logging.warning("%s: the %s split is left out: %s", dataset.name, split, reason)
    # Parse everything before the first file is written: most errors show up here.
    parse = functools.partial(dataset.parse, parser=parser)
    return write_directory(
        dataset,
        {split: _records(dataset, parse, source) for split, source in splits.items()},
        sources={split: source.sources for split, source in splits.items()},
        records_dir=records_dir,
        parser=parser,
        inputs=inputs,
        skipped=skipped,
        overwrite=overwrite,
        tell=tell,
    )


def check_target(source: Path, target: Path) -> None:
    """Refuses records in the folder that they are made from: replaced, it would lack what records do not hold."""
    if source.exists() and target.exists() and source.samefile(target):
        raise ValueError(f"{target} is the folder of the inputs, which the records would replace; choose another one.")


def write_directory(
    dataset: Dataset,
    found: Mapping[str, Sequence[Record]],
    *,
    sources: Mapping[str, Mapping[str, str]],
    records_dir: str | Path,
    parser: str,
    inputs: str,
    skipped: Mapping[str, str],
    overwrite: bool,
    teacher: Mapping[str, Any] | None = None,
    selection: Mapping[str, Any] | None = None,
    tell: Summary | None = None,
) -> Manifest:
    """Writes `<records_dir>/<dataset>/` with its manifest; treats an existing one as `import_release` does."""
    manifest = Manifest(
        format=records.FORMAT,
        dataset=dataset.name,
        parser=parser,
        inputs=inputs,
        sbs_jax=sbs_jax.__version__,
        splits={},
        skipped=dict(skipped),
    )
    if teacher is not None:
        manifest["teacher"] = dict(teacher)
    if selection is not None:
        manifest["selection"] = dict(selection)
    target = places.of(records_dir) / dataset.name
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = None if places.in_bucket(target) else target.parent
    with tempfile.TemporaryDirectory(dir=beside, prefix=f".{dataset.name}.") as scratch:
        made = places.of(scratch) / dataset.name
        for split, rows in found.items():
            sha256 = records.write_records(made / f"{split}.jsonl", rows)
            manifest["splits"][split] = SplitSummary(
                **summary.count(dataset, rows), sha256=sha256, sources=dict(sorted(sources[split].items()))
            )
        records.write_manifest(made, manifest)
        records.put_in_place(made, target, overwrite=overwrite)
    if tell is not None:
        for split, rows in found.items():
            tell.add(dataset, split, rows, manifest["splits"][split], parser=parser)
    return manifest


def read_unanswered(
    dataset: Dataset, *, inputs_dir: str | Path | None, inputs: str, tfds_data_dir: str | None = None
) -> dict[str, Source]:
    """Reads the input rows of each split for `sbs teach`.

    `inputs` is "release" (replies are ignored), "tfds", or "records": `<inputs_dir>/<dataset>/<split>.jsonl` with
    `{"id", "input", "label"}` and, where they differ, `"choices"`; use this form for your own dataset.
    FileNotFoundError if there are no inputs; ValueError with file and line for malformed rows and impossible labels.
    """
    _check_source(inputs, (*INPUTS, "records"), tfds_data_dir)
    if inputs == "tfds":
        splits, _ = _from_tfds(dataset, None, tfds_data_dir)
    elif inputs_dir is None:
        raise ValueError(f"There is no folder of inputs; inputs {inputs!r} needs one.")
    elif inputs == "release":
        splits, _ = _from_release(dataset, places.of(inputs_dir), replies="ignored")
    else:
        folder = places.of(inputs_dir) / dataset.name
        splits = _from_records(folder, [s for s in records.SPLITS if records.file_of(folder, s).exists()])
        if not splits:
            expected = ", ".join(f"{split}.jsonl" for split in records.SPLITS)
            held = f" It has {sorted(path.name for path in folder.iterdir())[:10]}." if folder.is_dir() else ""
            raise FileNotFoundError(
                f"There are no inputs of {dataset.name} in {folder}: expected some of {expected} (or .jsonl.gz).{held}"
            )
    for source in splits.values():
        dataset.check_labels(source.rows, where=source.where)
    return splits


def _records(dataset: Dataset, parse: Callable[[str, Row], Parsed], source: Source) -> list[Record]:
    dataset.check_labels(source.rows, where=source.where)
    found = []
    for row in source.rows:
        assert row.id is not None  # with_ids gave every row one
        given: dict[str, Any] = {
            "id": row.id,
            "input": row.input,
            "label": row.label,
            "choices": row.choices,
            "weight": row.weight,
        }
        answer = source.answers.get(row.id)
        if answer is not None:
            parsed = parse(answer.text, row)
            given |= {"teacher_text": answer.text, "rationale": parsed.rationale}
            given |= {"teacher_label": parsed.label, "outcome": parsed.outcome}
        found.append(Record(**given))
    return found


# ---------------------------------------------------------------------------- the release's files


def read_inputs(release_dir: str | Path, name: str, to_row: Callable[[Mapping[str, Any]], Row]) -> dict[str, list[Row]]:
    """Reads the rows of every split that has inputs, in file order: {"train": [..], "test": [..]}.

    `to_row` makes a row from one JSON object, with `json_files.text_field` and the like; file and line are added to its
    ValueError. FileNotFoundError if no split has inputs.
    """
    found = {}
    for split in SPLITS:
        path = _inputs_file(places.of(release_dir), name, split)
        if not path.is_file():
            continue
        rows = found[split] = []
        for line, value in read_json_lines(path):
            try:
                rows.append(to_row(value))
            except ValueError as error:
                raise ValueError(f"{path}:{line}: {error}") from None
    if not found:
        raise FileNotFoundError(_no_inputs(places.of(release_dir), name))
    return found


def read_replies(release_dir: str | Path, name: str, split: str) -> dict[Path, list[str]]:
    """Reads the teacher's replies of a split ("train", "validation", "test"), shard by shard, in order.

    Returns {} if there are no shards. ValueError if a number is missing or occurs twice, or a shard is not a list of
    texts.
    """
    short = SPLITS[split]
    folder = places.of(release_dir) / name / "llm"
    numbered: dict[int, Path] = {}
    for path in sorted([*folder.glob(f"{short}_CoT_*.json"), *folder.glob(f"{short}_CoT_*.json.gz")]):
        match = re.fullmatch(rf"{short}_CoT_([0-9]+)\.json(\.gz)?", path.name)
        if match is None:
            raise ValueError(f"{path}: expected a number in its name, as in {short}_CoT_0.json.")
        number = int(match[1])
        if number in numbered:
            raise ValueError(f"{numbered[number]} and {path} are both shard {number}; keep one.")
        numbered[number] = path
    # Report only the first gap: a file name can hold any number, and a list of all gaps could fill the memory.
    gap = next((number for number in itertools.count() if number not in numbered), 0)
    if gap < len(numbered):
        raise FileNotFoundError(
            f"{folder}: {short}_CoT_{gap}.json is missing, and {short}_CoT_{max(numbered)}.json is there. Replies "
            "belong to inputs by position, so get all shards from 0 on."
        )
    return {numbered[number]: read_texts(numbered[number]) for number in sorted(numbered)}


def with_ids(rows: Iterable[Row], *, name: str, where: Callable[[int], str]) -> list[Row]:
    """Gives every row a distinct id: the source's own, or one made from the input.

    A made id is `<name>-<first 12 hexadecimal digits of the input's SHA-1>`; the second row with the same input gets
    `-2` at its end, the third `-3`. Other inputs, and their order, do not change it. ValueError if a source's
    own id occurs twice.
    """
    found = []
    place: dict[str, int] = {}
    repeats: Counter[str] = Counter()
    for number, row in enumerate(rows):
        row_id = row.id
        if row_id is None:
            digest = hashlib.sha1(row.input.encode(), usedforsecurity=False).hexdigest()
            row_id = f"{name}-{digest[:12]}"
            repeats[row_id] += 1
            if repeats[row_id] > 1:
                row_id = f"{row_id}-{repeats[row_id]}"
        if not row_id:
            raise ValueError(f"{where(number)}: the id is empty.")
        if row_id in place:
            raise ValueError(
                f"{where(number)}: the id {brief(row_id)} is already that of {where(place[row_id])}; give every row "
                "a distinct id."
            )
        place[row_id] = number
        found.append(dataclasses.replace(row, id=row_id))
    return found


def _inputs_file(release_dir: Path, name: str, split: str) -> Path:
    return user_files.find(release_dir / name / f"{name}_{SPLITS[split]}.json")


def _no_inputs(release_dir: Path, name: str) -> str:
    message = (
        f"There are no inputs of {name} in {release_dir}: expected "
        f"{places.of(name) / f'{name}_train.json'}, .._valid.json or .._test.json below it."
    )
    if list(release_dir.glob(f"{name}_*.json")):
        return f"{message} Give the folder above it, {release_dir.parent}."
    if not release_dir.is_dir():
        return f"{message} There is no such folder."
    return f"{message} It has {sorted(path.name for path in release_dir.iterdir())[:10]}."


# ---------------------------------------------------------------------------------------- sources


def _from_release(dataset: Dataset, release_dir: Path, *, replies: str) -> tuple[dict[str, Source], dict[str, str]]:
    """Reads the splits that have inputs; returns them, and the reason for each skipped one.

    `replies`: "required" for every split with inputs, "optional", or "ignored".
    """
    if dataset.read_release is None:
        raise ValueError(f"The dataset {dataset.name} is not part of the release; use inputs 'records'.")
    found: dict[str, Source] = {}
    skipped: dict[str, str] = {}
    folder = release_dir / dataset.name
    rows_of = dataset.read_release(release_dir)
    for split, short in SPLITS.items():
        shards = {} if replies == "ignored" else read_replies(release_dir, dataset.name, split)
        texts = [text for shard in shards.values() for text in shard]
        inputs_file = _inputs_file(release_dir, dataset.name, split)
        if split not in rows_of:
            if shards:
                skipped[split] = (
                    f"{len(shards)} teacher shard(s) with {len(texts)} replies, but no inputs ({inputs_file.name})"
                )
            continue
        if not shards and replies == "required":
            raise FileNotFoundError(
                f"{folder / 'llm'} has no teacher shards of {short} ({short}_CoT_0.json, ..), and there are inputs in "
                f"{inputs_file.name}. Get the shards, or move the inputs elsewhere to leave this split out."
            )
        where = _lines(inputs_file)
        rows = with_ids(rows_of[split], name=dataset.name, where=where)
        if shards and len(texts) != len(rows):
            lengths = " + ".join(f"{len(shard)} ({path.name})" for path, shard in shards.items())
            raise ValueError(
                f"{inputs_file} has {len(rows)} rows and the teacher shards of {short} have {len(texts)} replies: "
                f"{lengths}. Reply i belongs to row i, so get the shard that is missing, truncated or of another "
                "dataset."
            )
        found[split] = Source(
            rows=rows,
            answers={
                row.id: Answer(input=row.input, text=text)
                for row, text in zip(rows, texts, strict=bool(shards))
                if row.id is not None
            },
            sources=_hashes([inputs_file, *shards], folder),
            where=where,
        )
    return found, skipped


def _from_records(folder: Path, splits: Iterable[str]) -> dict[str, Source]:
    found = {}
    for split in splits:
        path = records.file_of(folder, split)
        rows = records.read_records(path)
        found[split] = Source(
            rows=[Row(id=r.id, input=r.input, label=r.label, choices=r.choices, weight=r.weight) for r in rows],
            answers={r.id: Answer(input=r.input, text=r.teacher_text) for r in rows if r.teacher_text is not None},
            sources=_hashes([path], folder),
            where=_lines(path),
        )
    return found


def _check_source(inputs: str, known: Sequence[str], tfds_data_dir: str | None) -> None:
    checks.choice("The source of the inputs", inputs, known)
    if tfds_data_dir is not None and inputs != "tfds":
        raise ValueError(f"tfds_data_dir is {tfds_data_dir} and inputs {inputs!r}; it belongs to inputs 'tfds'.")


def _from_tfds(
    dataset: Dataset, answers_dir: str | Path | None, data_dir: str | None
) -> tuple[dict[str, Source], dict[str, str]]:
    """Reads the splits of TensorFlow Datasets, with replies from `answers_dir`, and the reasons for skipped ones."""
    if dataset.tfds is None or dataset.tfds_row is None:
        raise ValueError(f"The dataset {dataset.name} is not in TensorFlow Datasets; use inputs='release'.")
    answered: dict[str, Source] = {}
    notes: dict[str, str] = {}
    if answers_dir is not None:
        folder = places.of(answers_dir) / dataset.name
        if (folder / records.MANIFEST).is_file():
            answered = _from_records(folder, records.read_manifest(folder)["splits"])
        else:
            answered, notes = _from_release(dataset, places.of(answers_dir), replies="optional")
    found = {}
    for split, (source, raw) in tfds.examples(dataset.tfds, SPLITS, data_dir=data_dir).items():

        def where(number: int, source: str = source) -> str:
            return f"{source}, example {number} (from 0)"

        rows = []
        for number, fields in enumerate(raw):
            try:
                rows.append(dataset.tfds_row(fields))
            except ValueError as error:
                raise ValueError(f"{where(number)}: {error}") from None
        rows = with_ids(rows, name=dataset.name, where=where)
        answers = answered.get(split)
        if answers is not None:
            _check_answers(rows, answers, source)
        found[split] = Source(
            rows=rows,
            answers=answers.answers if answers is not None else {},
            sources={source: tfds.rows_sha256(rows)} | dict(answers.sources if answers else {}),
            where=where,
        )
        if split in notes:
            logging.warning("%s: the rows of %s have no teacher replies: %s", dataset.name, split, notes[split])
    missing = sorted(answered.keys() - found.keys())
    if missing:
        raise ValueError(
            f"{dataset.tfds} has the splits {sorted(found)}; {answers_dir} has replies to {missing}, too. "
            "Use inputs='release'."
        )
    return found, {split: why for split, why in notes.items() if split not in found}


def _check_answers(rows: Sequence[Row], answered: Source, source: str) -> None:
    """Raises ValueError if a reply has no row, or the row with its id has another input."""
    input_of = {row.id: row.input for row in rows}
    unknown = [row_id for row_id in answered.answers if row_id not in input_of]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(answered.answers)} teacher replies have ids that {source} does not have: "
            f"{unknown[:3]}. Use inputs='release'."
        )
    for row_id, answer in answered.answers.items():
        if answer.input != input_of[row_id]:
            raise ValueError(
                f"The reply with the id {row_id!r} answers {answer.input[:80]!r}, and {source} has "
                f"{input_of[row_id][:80]!r} under that id. Use inputs='release'."
            )


def _lines(path: Path) -> Callable[[int], str]:
    return lambda number: f"{path}:{number + 1}"


def _hashes(paths: Iterable[Path], folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): checksums.file_sha256(path) for path in paths}
