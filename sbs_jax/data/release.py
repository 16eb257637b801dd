"""Imports the official release of teacher outputs as records.

The release, which is read as it is:

    <release_dir>/svamp/svamp_train.json       inputs: JSON lines
    <release_dir>/svamp/svamp_valid.json       (some datasets have no valid)
    <release_dir>/svamp/svamp_test.json
    <release_dir>/svamp/llm/train_CoT_0.json   replies: a JSON list of texts; shards 0, 1, 2, ..
    <release_dir>/svamp/llm/train_CoT_1.json   follow one another in numeric order

Reply i of the concatenated shards belongs to input i. This module is the only place where rows are
joined by position; every row gets an id here and is joined by it ever after. Inputs can also come
from TensorFlow Datasets, in whatever order; replies then find their inputs by id.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sbs_jax
from sbs_jax import checks
from sbs_jax.data import records
from sbs_jax.data.dataset import Dataset, Row
from sbs_jax.data.parsing import Parsed
from sbs_jax.data.records import Manifest, Record, SplitSummary
from sbs_jax.storage import checksums, json_files

# The release's name of a split, and ours (TensorFlow Datasets' too).
SPLITS: Mapping[str, str] = {"train": "train", "valid": "validation", "test": "test"}
INPUTS = ("release", "tfds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Answer:
    """A teacher's reply and the input it replies to."""

    input: str
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Split:
    """Rows with distinct ids, their replies by id, and the files or datasets they come from."""

    rows: Sequence[Row]
    answers: Mapping[str, _Answer]
    sources: Mapping[str, str]  # name -> sha256
    where: Callable[[int], str]  # row number -> its place, for messages


def import_release(
    dataset: Dataset,
    *,
    release_dir: str | Path | None,
    records_dir: str | Path,
    parser: str,
    inputs: str = "release",
    overwrite: bool = False,
    tfds_data_dir: str | None = None,
) -> Manifest:
    """Reads inputs and teacher replies, parses the replies, writes `<records_dir>/<dataset>/`.

    The directory appears whole or not at all, and the same sources give the same bytes. Where it
    exists with the same contents it is left as it is. A split whose replies are there and whose
    inputs are not (or the other way round, with `inputs="tfds"`) does not stop the others; the
    manifest's `skipped` says so.

    Args:
      dataset: how its files, labels and replies are read.
      release_dir: the folder that holds `<dataset>/` of the release. With `inputs="tfds"`,
        replies come from there by id; it may then also be a records directory, or None.
      records_dir: where `<dataset>/{train,validation,test}.jsonl` and `manifest.json` go.
      parser: "official" (bug for bug) or "strict".
      inputs: "release", or "tfds" for the TensorFlow Datasets named by the dataset (which
        downloads them, unless they are in `tfds_data_dir` already).
      overwrite: replace a directory that was made with another parser or from other sources.
      tfds_data_dir: where TensorFlow Datasets keeps its files; None for its own default.

    Raises:
      FileNotFoundError: no such folder, inputs or teacher shards.
      ValueError: malformed files, wrong lengths, gaps in the shards' numbers, labels outside the
        set, duplicate or unknown ids, and unknown names; each with file and line where there is one.
      FileExistsError: the directory holds something else, and `overwrite` is False.
    """
    checks.choice(f"The parser for {dataset.name}", parser, dataset.parsers.keys())
    checks.choice("The source of the inputs", inputs, INPUTS)
    if inputs == "release":
        if release_dir is None:
            raise ValueError("release_dir is None; inputs='release' needs the release's folder.")
        splits, skipped = _read_release(dataset, Path(release_dir), need_answers=True)
    else:
        splits, skipped = _read_tfds(dataset, release_dir, tfds_data_dir)
    for split, reason in skipped.items():
        logging.warning("%s: the %s split is left out: %s", dataset.name, split, reason)
    # Parse everything before the first file is written: most errors show up here.
    parse = dataset.parsers[parser]
    found = {split: _records(dataset, parse, source) for split, source in splits.items()}
    return write_directory(
        dataset,
        found,
        sources={split: source.sources for split, source in splits.items()},
        records_dir=records_dir,
        parser=parser,
        inputs=inputs,
        skipped=skipped,
        overwrite=overwrite,
    )


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
) -> Manifest:
    """Writes `<records_dir>/<dataset>/` whole, with its manifest; where it exists, as `import_release` says."""
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
    target = Path(records_dir) / dataset.name
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{dataset.name}.") as scratch:
        made = Path(scratch) / dataset.name
        for split, rows in found.items():
            sha256 = records.write_records(made / f"{split}.jsonl", rows)
            manifest["splits"][split] = _summary(dataset, rows, sources=sources[split], sha256=sha256)
        records.write_manifest(made, manifest)
        records.put_in_place(made, target, overwrite=overwrite)
    return manifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unanswered:
    """Rows of a split with distinct ids, and the files (or datasets) that they come from, with their hashes."""

    rows: Sequence[Row]
    sources: Mapping[str, str]


def read_unanswered(
    dataset: Dataset, *, inputs_dir: str | Path | None, inputs: str, tfds_data_dir: str | None = None
) -> dict[str, Unanswered]:
    """The rows of each split that a teacher can be asked about.

    `inputs` says what they are: "release" (in its layout; replies are not looked at), "records"
    (`<inputs_dir>/<dataset>/<split>.jsonl` with `{"id", "input", "label"}` and, where they differ, `"choices"`: the
    form of a data set of one's own), or "tfds". FileNotFoundError where there are none; ValueError with file and line
    for malformed rows and labels outside the set.
    """
    checks.choice("The source of the inputs", inputs, (*INPUTS, "records"))
    if inputs == "tfds":
        splits, _ = _read_tfds(dataset, None, tfds_data_dir)
    elif inputs_dir is None:
        raise ValueError(f"There is no folder of inputs; inputs {inputs!r} needs one.")
    elif inputs == "release":
        splits = _inputs_of_release(dataset, Path(inputs_dir))
    else:
        splits = _rows_of_records(dataset, Path(inputs_dir))
    for source in splits.values():
        for number, row in enumerate(source.rows):
            problem = _label_problem(dataset, row)
            if problem:
                raise ValueError(f"{source.where(number)}: {problem}")
    return {split: Unanswered(rows=source.rows, sources=source.sources) for split, source in splits.items()}


def _inputs_of_release(dataset: Dataset, release_dir: Path) -> dict[str, _Split]:
    if dataset.read_release is None:
        raise ValueError(f"The dataset {dataset.name} is not part of the release; use inputs 'records'.")
    found = {}
    for split, rows in dataset.read_release(release_dir).items():
        short = {ours: theirs for theirs, ours in SPLITS.items()}[split]
        path = _inputs_file(release_dir, dataset.name, short)

        def where(number: int, path: Path = path) -> str:
            return f"{path}:{number + 1}"

        found[split] = _Split(
            rows=with_ids(rows, name=dataset.name, where=where),
            answers={},
            sources=_hashes([path], release_dir / dataset.name),
            where=where,
        )
    return found


def _rows_of_records(dataset: Dataset, inputs_dir: Path) -> dict[str, _Split]:
    folder = inputs_dir / dataset.name
    found = {}
    for split in records.SPLITS:
        path = folder / f"{split}.jsonl"
        if path.is_file():
            rows = [
                Row(id=record.id, input=record.input, label=record.label, choices=record.choices)
                for record in records.read_records(path)
            ]
            found[split] = _Split(
                rows=rows,
                answers={},
                sources=_hashes([path], folder),
                where=lambda number, path=path: f"{path}:{number + 1}",
            )
    if not found:
        expected = ", ".join(f"{split}.jsonl" for split in records.SPLITS)
        raise FileNotFoundError(f"There are no inputs of {dataset.name} in {folder}: expected some of {expected}.")
    return found


def _records(dataset: Dataset, parse: Callable[[str, Row], Parsed], source: _Split) -> list[Record]:
    found = []
    for number, row in enumerate(source.rows):
        assert row.id is not None  # with_ids gave every row one
        problem = _label_problem(dataset, row)
        if problem:
            raise ValueError(f"{source.where(number)}: {problem}")
        record = Record(id=row.id, input=row.input, label=row.label, choices=row.choices)
        answer = source.answers.get(row.id)
        if answer is not None:
            parsed = parse(answer.text, row)
            record = dataclasses.replace(
                record,
                teacher_text=answer.text,
                rationale=parsed.rationale,
                teacher_label=parsed.label,
                outcome=parsed.outcome,
            )
        found.append(record)
    return found


def _label_problem(dataset: Dataset, row: Row) -> str | None:
    """Why the human's label is not one of the possible labels; None where it is, or is not known."""
    possible = row.choices or dataset.labels
    if row.label is None:
        return None
    if possible:
        if row.label in possible:
            return None
        return f"the label {json_files.brief(row.label)} is outside the label set {json_files.brief(list(possible))}."
    if dataset.is_label is not None and not dataset.is_label(row.label):
        return f"the label {json_files.brief(row.label)} is none: {dataset.is_label.__name__}() rejects it."
    return None


def _summary(dataset: Dataset, rows: Sequence[Record], *, sources: Mapping[str, str], sha256: str) -> SplitSummary:
    labelled = sum(row.label is not None for row in rows)
    asked = any(row.teacher_text is not None for row in rows)
    right = sum(
        row.label is not None and row.teacher_label is not None and dataset.same_label(row.label, row.teacher_label)
        for row in rows
    )
    return SplitSummary(
        rows=len(rows),
        sha256=sha256,
        sources=dict(sorted(sources.items())),
        outcomes=dict(sorted(Counter(row.outcome for row in rows).items())),
        rationales=sum(row.rationale is not None for row in rows),
        teacher_labels=sum(row.teacher_label is not None for row in rows),
        labelled=labelled,
        teacher_right=right,
        teacher_accuracy=100.0 * right / labelled if labelled and asked else None,
    )


# ---------------------------------------------------------------------------- the release's files


def read_inputs(release_dir: str | Path, name: str, to_row: Callable[[Mapping[str, Any]], Row]) -> dict[str, list[Row]]:
    """Rows in file order per split ("train", "validation", "test") of the inputs that are there.

    `to_row` makes a row of one JSON object; `records.text_field` and others read its fields. Its
    ValueError gets file and line. FileNotFoundError where no split has inputs.
    """
    found = {}
    for short, split in SPLITS.items():
        path = _inputs_file(Path(release_dir), name, short)
        if not path.is_file():
            continue
        rows = []
        for line, value in json_files.read_json_lines(path):
            try:
                rows.append(to_row(value))
            except ValueError as error:
                raise ValueError(f"{path}:{line}: {error}") from None
        found[split] = rows
    if not found:
        raise FileNotFoundError(_no_inputs(Path(release_dir), name))
    return found


def read_replies(release_dir: str | Path, name: str, split: str) -> dict[Path, list[str]]:
    """The teacher's replies of a split ("train", "validation", "test"), shard by shard, in order.

    {} where it has no shards. ValueError where a number is missing or occurs twice, or a shard is
    no list of texts.
    """
    short = {ours: theirs for theirs, ours in SPLITS.items()}[split]
    folder = Path(release_dir) / name / "llm"
    numbered: dict[int, Path] = {}
    for path in sorted(folder.glob(f"{short}_CoT_*.json")):
        match = re.fullmatch(rf"{short}_CoT_([0-9]+)\.json", path.name)
        if match is None:
            raise ValueError(f"{path}: expected a number in its name, as in {short}_CoT_0.json.")
        number = int(match[1])
        if number in numbered:
            raise ValueError(f"{numbered[number]} and {path} are both shard {number}; keep one.")
        numbered[number] = path
    if numbered:
        # The first few alone: a name can hold any number, and a list of what lies below it would fill the memory.
        gaps = list(itertools.islice((n for n in range(max(numbered)) if n not in numbered), 4))
        if gaps:
            names = ", ".join(f"{short}_CoT_{number}.json" for number in gaps[:3])
            raise FileNotFoundError(
                f"{folder}: {names} {'is' if len(gaps) == 1 else 'are'} missing, and "
                f"{short}_CoT_{max(numbered)}.json is there. Replies belong to inputs by "
                "position, so all shards from 0 on are needed; get the missing ones."
            )
    return {numbered[number]: _shard(numbered[number]) for number in sorted(numbered)}


def _shard(path: Path) -> list[str]:
    texts = json_files.read_json(path)
    if not isinstance(texts, list):
        raise ValueError(f"{path}: expected a JSON list of texts, got {type(texts).__name__}.")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{path}: item {index} (from 0) is {json_files.brief(text)}; expected text.")
    return texts


def with_ids(rows: Iterable[Row], *, name: str, where: Callable[[int], str]) -> list[Row]:
    """The rows, each with a distinct id: the source's own, or one made of the input.

    A made id is `<name>-<first 12 hexadecimal digits of the input's SHA-1>`; the second row with
    the same input gets `-2` at its end, the third `-3`. It does not depend on other inputs or on
    the order of rows with other inputs. ValueError where a source's own id occurs twice.
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
                f"{where(number)}: the id {json_files.brief(row_id)} is already that of {where(place[row_id])}; "
                "rows are joined by id, so ids must be distinct."
            )
        place[row_id] = number
        found.append(dataclasses.replace(row, id=row_id))
    return found


def _read_release(
    dataset: Dataset, release_dir: Path, *, need_answers: bool
) -> tuple[dict[str, _Split], dict[str, str]]:
    """The splits whose inputs are there, with replies; and why the others are left out."""
    if dataset.read_release is None:
        raise ValueError(f"The dataset {dataset.name} is not part of the release.")
    found: dict[str, _Split] = {}
    skipped: dict[str, str] = {}
    rows_of = dataset.read_release(release_dir)
    for short, split in SPLITS.items():
        shards = read_replies(release_dir, dataset.name, split)
        inputs_file = _inputs_file(release_dir, dataset.name, short)
        if split not in rows_of:
            if shards:
                skipped[split] = (
                    f"{len(shards)} teacher shard(s) with {sum(map(len, shards.values()))} "
                    f"replies, but no inputs ({inputs_file.name})"
                )
            continue
        if not shards and need_answers:
            raise FileNotFoundError(
                f"{release_dir / dataset.name / 'llm'} has no teacher shards of {short} "
                f"({short}_CoT_0.json, ..), and there are inputs in {inputs_file.name}. Get the "
                "shards, or move the inputs elsewhere to leave this split out."
            )

        def where(number: int, path: Path = inputs_file) -> str:
            return f"{path}:{number + 1}"

        rows = with_ids(rows_of[split], name=dataset.name, where=where)
        texts = [text for shard in shards.values() for text in shard]
        if shards and len(texts) != len(rows):
            lengths = " + ".join(f"{len(shard)} ({path.name})" for path, shard in shards.items())
            raise ValueError(
                f"{inputs_file} has {len(rows)} rows and the teacher shards of {short} have "
                f"{len(texts)} replies: {lengths}. Reply i belongs to row i, so the counts must "
                "be equal; a shard is missing, cut short, or of another dataset."
            )
        found[split] = _Split(
            rows=rows,
            answers={
                row.id: _Answer(input=row.input, text=text)
                for row, text in zip(rows, texts, strict=bool(shards))
                if row.id is not None
            },
            sources=_hashes([inputs_file, *shards], release_dir / dataset.name),
            where=where,
        )
    return found, skipped


def _inputs_file(release_dir: Path, name: str, short: str) -> Path:
    return release_dir / name / f"{name}_{short}.json"


def _hashes(paths: Iterable[Path], folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): checksums.file_sha256(path) for path in paths}


def _no_inputs(release_dir: Path, name: str) -> str:
    message = (
        f"There are no inputs of {name} in {release_dir}: expected "
        f"{Path(name) / f'{name}_train.json'}, .._valid.json or .._test.json below it."
    )
    if list(release_dir.glob(f"{name}_*.json")):
        return f"{message} The folder above it, {release_dir.parent}, seems to be the one to name."
    if not release_dir.is_dir():
        return f"{message} There is no such folder."
    return f"{message} It has {sorted(path.name for path in release_dir.iterdir())[:10]}."


# ------------------------------------------------------------------------------------------- TFDS


def _read_tfds(
    dataset: Dataset, release_dir: str | Path | None, data_dir: str | None
) -> tuple[dict[str, _Split], dict[str, str]]:
    """The splits of TensorFlow Datasets, each with the replies that its ids find."""
    if dataset.tfds is None or dataset.tfds_row is None:
        raise ValueError(f"The dataset {dataset.name} is not in TensorFlow Datasets; use inputs='release'.")
    answered: dict[str, _Split] = {}
    notes: dict[str, str] = {}
    if release_dir is not None:
        answered, notes = _answers(dataset, Path(release_dir))
    found = {}
    for split, (source, raw) in _tfds_rows(dataset.tfds, data_dir).items():

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
        found[split] = _Split(
            rows=rows,
            answers=answers.answers if answers is not None else {},
            sources={source: _rows_sha256(rows)} | dict(answers.sources if answers else {}),
            where=where,
        )
        if split in notes:
            logging.warning("%s: the rows of %s have no teacher replies: %s", dataset.name, split, notes[split])
    missing = sorted(answered.keys() - found.keys())
    if missing:
        raise ValueError(
            f"{dataset.tfds} has the splits {sorted(found)}; {release_dir} has replies to "
            f"{missing}, too. Use inputs='release'."
        )
    return found, {split: why for split, why in notes.items() if split not in found}


def _tfds_rows(name: str, data_dir: str | None) -> dict[str, tuple[str, Iterable[Mapping[str, Any]]]]:
    """Per split: a name for it with its version, and its examples with bytes decoded to text."""
    # Imported here: it takes seconds, and only this function needs it.
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=data_dir)
    builder.download_and_prepare()
    found = {}
    for split in SPLITS.values():
        if split in builder.info.splits:
            # One file after the other: the same order, and so the same bytes, every time.
            read_config = tfds.ReadConfig(interleave_cycle_length=1)
            # The decorator of as_dataset hides its parameters from type checkers.
            read: Any = builder.as_dataset
            examples = read(split=split, shuffle_files=False, read_config=read_config)
            rows = (_plain(example) for example in tfds.as_numpy(examples))
            found[split] = f"tfds:{builder.info.full_name}/{split}", rows
    return found


def _plain(example: Mapping[str, Any]) -> dict[str, Any]:
    """NumPy values and bytes to Python's numbers and texts."""
    plain = {}
    for name, value in example.items():
        if isinstance(value, bytes):
            plain[name] = value.decode("utf-8")
        else:
            plain[name] = value.item() if getattr(value, "shape", None) == () else value
    return plain


def _answers(dataset: Dataset, directory: Path) -> tuple[dict[str, _Split], dict[str, str]]:
    """Replies by id per split, of a records directory or of the release."""
    folder = directory / dataset.name
    if not (folder / records.MANIFEST).is_file():
        return _read_release(dataset, directory, need_answers=False)
    found = {}
    for split in records.read_manifest(folder)["splits"]:
        path = folder / f"{split}.jsonl"
        rows = records.read_records(path)
        found[split] = _Split(
            rows=[Row(id=r.id, input=r.input, label=r.label, choices=r.choices) for r in rows],
            answers={r.id: _Answer(input=r.input, text=r.teacher_text) for r in rows if r.teacher_text is not None},
            sources=_hashes([path], folder),
            where=lambda number, path=path: f"{path}:{number + 1}",
        )
    return found, {}


def _check_answers(rows: Sequence[Row], answered: _Split, source: str) -> None:
    """ValueError where a reply has no row, or the row of its id has another input."""
    input_of = {row.id: row.input for row in rows}
    unknown = [row_id for row_id in answered.answers if row_id not in input_of]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(answered.answers)} teacher replies have ids that {source} "
            f"does not have: {unknown[:3]}. The two sources differ; use inputs='release'."
        )
    for row_id, answer in answered.answers.items():
        if answer.input != input_of[row_id]:
            raise ValueError(
                f"The reply with the id {row_id!r} answers {answer.input[:80]!r}, and {source} "
                f"has {input_of[row_id][:80]!r} under that id. The two sources differ; use "
                "inputs='release'."
            )


def _rows_sha256(rows: Iterable[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update((json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n").encode())
    return digest.hexdigest()
