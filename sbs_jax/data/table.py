"""Tables of a user's own: CSV, TSV, JSON lines, Parquet, a folder of such files per split, or Hugging Face `datasets`.

All values become text; an empty cell, null and a column that a row lacks are None. Standard library only for text
files; pyarrow for Parquet, and the package `datasets` for its folders and for names on the hub.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sbs_jax.data.records import SPLITS
from sbs_jax.storage import places, user_files
from sbs_jax.storage.json_files import brief, decoded, part, read_json_lines

ENDINGS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
LARGEST = 2**31  # bytes of a text table, read whole
# Other names of the three splits.
_SPLIT_NAMES = {"dev": "validation", "valid": "validation", "val": "validation", "eval": "validation"}
_DATASETS_FILES = ("dataset_info.json", "dataset_dict.json", "state.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of one source, by column; `places[i]` names row i in errors, such as "tickets.csv:7"."""

    columns: tuple[str, ...]
    rows: tuple[Mapping[str, str | None], ...]
    places: tuple[str, ...]


def read(source: str) -> dict[str | None, Table]:
    """Reads a file, a folder or a name on the hub: {split: table}, or {None: table} if it has no splits.

    FileNotFoundError or ValueError says what is wrong with it, with file and line.
    """
    path = places.of(source)
    if path.is_dir():
        if any((path / name).is_file() for name in _DATASETS_FILES):
            return _of_datasets(source, lambda library: library.load_from_disk(source))
        return _read_folder(path)
    if path.is_file():
        return {None: read_file(path)}
    if source.count("/") <= 1 and not path.suffix and not source.startswith((".", "~", "/")):
        return _of_datasets(source, lambda library: library.load_dataset(source))
    raise FileNotFoundError(
        f"There is no file or folder {source}; expected a table ({', '.join(ENDINGS)}), a folder with train, "
        "validation or test as one, a folder of Hugging Face datasets, or a name on its hub such as owner/name."
    )


def read_file(path: Path) -> Table:
    """Reads one table by its file's ending, also packed with gzip."""
    packed = path.suffix.lower() == ".gz"
    ending = (path.with_suffix("") if packed else path).suffix.lower()
    if ending not in ENDINGS or (packed and ending == ".parquet"):
        raise ValueError(
            f"{path} ends in {part(path.suffix)!r}; expected {', '.join(ENDINGS)}, or .gz after a text form."
        )
    if ending == ".parquet":
        return _read_parquet(path)
    pairs = _csv_rows(path, "\t" if ending == ".tsv" else ",") if ending in (".csv", ".tsv") else read_json_lines(path)
    rows, places = [], []
    for line, row in pairs:
        rows.append(row)
        places.append(f"{path}:{line}")
    return table_of(rows, places, where=str(path))


def table_of(rows: Sequence[Mapping[str, Any]], places: Sequence[str], *, where: str) -> Table:
    """Makes a table of rows with values of any type. ValueError if there are none."""
    if not rows:
        raise ValueError(f"{where} has no rows; expected one question a row.")
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    texts = tuple({name: _text(row.get(name)) for name in columns} for row in rows)
    return Table(columns=columns, rows=texts, places=tuple(places))


def _text(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        if math.isnan(value):  # a gap in a column of pandas
            return None
        if value.is_integer():
            return str(int(value))  # a column of integers with gaps
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, bool | list | dict) else str(value)


def _csv_rows(path: Path, delimiter: str) -> Iterator[tuple[int, dict[str, str]]]:
    text = decoded(user_files.whole(path, most=LARGEST), str(path))
    csv.field_size_limit(user_files.LONGEST_LINE)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    header: list[str] | None = None
    before = 0
    try:
        for fields in reader:
            line, before = before + 1, reader.line_num
            if not any(fields):
                continue
            if header is None:
                header = _header(path, [name.strip() for name in fields])
            elif len(fields) != len(header):
                raise ValueError(
                    f"{path}:{line}: got {len(fields)} fields; expected {len(header)}, as in the header. Quote fields "
                    f"that contain {delimiter!r}."
                )
            else:
                yield line, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}:{before + 1}: not valid CSV: {error}.") from None


def _header(path: Path, names: list[str]) -> list[str]:
    wrong = next((name for name in names if not name or names.count(name) > 1), None)
    if wrong is not None:
        raise ValueError(
            f"{path}:1: the header has the column {part(wrong)!r} {names.count(wrong)} times; expected a name of its "
            "own for every column."
        )
    return names


def _read_parquet(path: Path) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    user_files.check(path)
    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {part(str(error))}") from None
    return table_of(rows, [f"{path}: row {number}" for number in range(1, len(rows) + 1)], where=str(path))


def _read_folder(folder: Path) -> dict[str | None, Table]:
    """Reads train, validation and test of a folder, each in a file of that name."""
    found: dict[str | None, Table] = {}
    for path in sorted(folder.iterdir()):
        stem = path.name.partition(".")[0].lower()
        split = _SPLIT_NAMES.get(stem, stem)
        if split in SPLITS and path.name[len(stem) :].lower().removesuffix(".gz") in ENDINGS:
            if split in found:
                raise ValueError(f"{folder} has two files of {split}; keep one.")
            found[split] = read_file(path)
    if not found:
        held = [path.name for path in sorted(folder.iterdir())[:10]]
        raise FileNotFoundError(
            f"{folder} has no train, validation or test ({', '.join(ENDINGS)}); it has {brief(held)}. Give the file "
            "itself."
        )
    return found


def _of_datasets(source: str, load: Any) -> dict[str | None, Table]:
    """Reads a dataset of Hugging Face's package: all of its splits that are ours."""
    try:
        library: Any = importlib.import_module("datasets")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{source} is no file; as a dataset of Hugging Face it needs the package datasets: pip install datasets. "
            f"Or give a file: {', '.join(ENDINGS)}."
        ) from None
    try:
        loaded = load(library)
    except Exception as error:  # of the network, the hub and the package
        raise ValueError(f"{source} cannot be loaded by the package datasets: {part(str(error))}") from None
    if not isinstance(loaded, dict):
        return {None: _of_loaded(loaded, where=source)}
    found: dict[str | None, Table] = {}
    for name, rows in loaded.items():
        split = _SPLIT_NAMES.get(name, name)
        if split in SPLITS:
            found[split] = _of_loaded(rows, where=f"{source}, {name}")
    if not found:
        raise ValueError(f"{source} has the splits {brief(sorted(loaded))}; expected train, validation or test.")
    return found


def _of_loaded(rows: Any, *, where: str) -> Table:
    found = named_labels(rows)
    return table_of(found, [f"{where}: row {number}" for number in range(1, len(found) + 1)], where=where)


def named_labels(rows: Any) -> list[dict[str, Any]]:
    """Lists the rows of a dataset of `datasets` with the names of class labels, which it stores as numbers."""
    named = {name: feature.int2str for name, feature in rows.features.items() if hasattr(feature, "int2str")}

    def value(name: str, number: Any) -> Any:
        known = name in named and isinstance(number, int) and number >= 0
        return named[name](number) if known else (None if name in named else number)

    return [{name: value(name, found) for name, found in row.items()} for row in rows]
