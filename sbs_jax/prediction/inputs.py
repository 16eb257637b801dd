"""Readers of questions, one by one: JSON lines, CSV or Parquet, by the file's ending.

A malformed row becomes an `Entry` with its error, and reading continues. Only faults of the whole file are raised
(missing columns, not Parquet). Memory holds one row (JSON lines, CSV; at most `LONGEST_LINE` bytes) or one batch of
rows (Parquet, plus pyarrow's row group).
"""

import csv
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

from sbs_jax.prediction.engine import Question
from sbs_jax.storage import json_files

# Bytes of a JSON or CSV line, or characters of a Parquet row.
LONGEST_LINE = 2**20
COLUMNS = ("id", "input", "adapter", "choices")
REQUIRED = COLUMNS[:2]
_ROWS = 256  # Parquet rows read at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A row of a file: a question or an error. `line` counts lines from 1 (Parquet: rows)."""

    line: int
    question: Question | None = None
    id: str | None = None  # also of a row with an error, if it could be read
    error: str | None = None


@runtime_checkable
class Reader(Protocol):
    """Iterator over the entries of a file, usable once; `done` of `total` `unit`s have been read."""

    total: int
    unit: str

    @property
    def done(self) -> int: ...

    def __iter__(self) -> Iterator[Entry]: ...


def read(path: str | Path) -> Reader:
    """Returns a reader by the file's ending: .csv, .parquet, else JSON lines."""
    kinds = {".csv": _Csv, ".parquet": _Parquet}
    return kinds.get(Path(path).suffix.lower(), _JsonLines)(Path(path))


def entry(row: Any, *, line: int) -> Entry:
    """Makes a row's entry from the values that the file's format gives."""
    if not isinstance(row, Mapping):
        return Entry(line=line, error=f'expected {{"id": text, "input": text}}, got {json_files.brief(row)}')
    row_id = row.get("id") if isinstance(row.get("id"), str) else None
    wrong = _wrong(row)
    if wrong is not None:
        return Entry(line=line, id=row_id, error=wrong)
    choices = row.get("choices")
    question = Question(
        id=row["id"],
        input=row["input"],
        adapter=row.get("adapter"),
        choices=None if choices is None else tuple(choices),
    )
    return Entry(line=line, id=row_id, question=question)


def _wrong(row: Mapping[str, Any]) -> str | None:
    for name in REQUIRED:
        if row.get(name) is None:
            return f"{name!r} is missing; a row has the texts 'id' and 'input'."
        if not isinstance(row[name], str):
            return f"{name!r} is {json_files.brief(row[name])}; expected a text."
    if row.get("adapter") is not None and not isinstance(row["adapter"], str):
        return f"no adapter is named {json_files.brief(row['adapter'])}; expected a text."
    choices = row.get("choices")
    if choices is not None and not (
        isinstance(choices, list) and choices and all(isinstance(each, str) and each for each in choices)
    ):
        return f"'choices' is {json_files.brief(choices)}; expected a list of texts."
    return None


# ------------------------------------------------------------------------------------ lines


class _Lines:
    """Iterator of (number, line) over a file of bytes; a line longer than `LONGEST_LINE` is None."""

    unit = "B"

    def __init__(self, path: Path) -> None:
        self.path, self.total, self.done = path, path.stat().st_size, 0

    def lines(self) -> Iterator[tuple[int, bytes | None]]:
        # Split at "\n" only: texts may hold other line-ending characters.
        with self.path.open("rb") as file:
            number = 0
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                self.done += len(line)
                if len(line) <= LONGEST_LINE or line.endswith(b"\n"):
                    yield number, line
                    continue
                self._skip(file)
                yield number, None

    def _skip(self, file: IO[bytes]) -> None:
        """Reads to the end of a line and discards it."""
        while part := file.readline(LONGEST_LINE):
            self.done += len(part)
            if part.endswith(b"\n"):
                return


_TOO_LONG = f"the line is longer than {LONGEST_LINE} bytes and was skipped; shorten it."


class _JsonLines(_Lines):
    def __iter__(self) -> Iterator[Entry]:
        for number, line in self.lines():
            if line is None:
                yield Entry(line=number, error=_TOO_LONG)
                continue
            try:
                text = json_files.decoded(line, "the line")
                if text.strip():
                    yield entry(json_files.parse_json(text, "the line"), line=number)
            except ValueError as error:
                yield Entry(line=number, error=str(error))


class _Csv(_Lines):
    """Reader of CSV with a header; quoted fields may hold line ends. `choices` is a JSON list of texts."""

    def __iter__(self) -> Iterator[Entry]:
        csv.field_size_limit(LONGEST_LINE)
        self._number = self._first = 0
        self._wrong: str | None = None
        rows = csv.reader(self._texts(), strict=True)
        header: list[str] | None = None
        while True:
            self._first, self._wrong = self._number + 1, None
            try:
                fields = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                # csv.reader restarts with the next line.
                found = Entry(line=self._first, error=f"not valid CSV: {error}.")
            else:
                if not fields and self._wrong is None:
                    continue
                if header is None:
                    header = self._header(fields)
                    continue
                found = self._entry(fields, header)
            if header is None:
                raise ValueError(f"{self.path}:{found.line}: the header cannot be read: {found.error}")
            yield found

    def _texts(self) -> Iterator[str]:
        for number, line in self.lines():
            self._number = number
            if line is None:
                self._wrong = _TOO_LONG
                yield "\n"
                continue
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                self._wrong = f"byte {error.start} (0x{line[error.start]:02x}) of line {number} is not UTF-8."
                text = line.decode("utf-8", "replace")
            yield text

    def _header(self, fields: Sequence[str]) -> list[str]:
        if self._wrong is not None:
            raise ValueError(f"{self.path}:1: the header cannot be read: {self._wrong}")
        return _checked_columns([name.strip() for name in fields], self.path)

    def _entry(self, fields: Sequence[str], header: Sequence[str]) -> Entry:
        line = self._first
        if self._wrong is not None:
            return Entry(line=line, error=self._wrong)
        if len(fields) != len(header):
            return Entry(line=line, error=f"got {len(fields)} fields; expected {len(header)}, as in the header.")
        row: dict[str, Any] = {name: text for name, text in zip(header, fields, strict=True) if name in COLUMNS}
        # An empty cell counts as missing, except that an input may be empty.
        row = {name: text for name, text in row.items() if text or name == "input"}
        if "choices" in row:
            try:
                row["choices"] = json_files.parse_json(row["choices"], "choices")
            except ValueError:
                shown = json_files.brief(row["choices"])
                return Entry(line=line, id=row.get("id"), error=f"'choices' is {shown}; expected a JSON list of texts.")
        return entry(row, line=line)


def _checked_columns(names: Sequence[str], path: Path) -> list[str]:
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        listed = ", ".join(map(repr, names)) or "none"
        raise ValueError(
            f"{path}: got the columns {json_files.part(listed)} without {' and '.join(map(repr, missing))}; expected "
            "'id' and 'input', optionally 'adapter' and 'choices'."
        )
    for name in COLUMNS:
        if names.count(name) > 1:
            raise ValueError(f"{path}: got {names.count(name)} columns {name!r}; expected one.")
    return list(names)


# ---------------------------------------------------------------------------------- Parquet


class _Parquet:
    """Reader of string columns `id`, `input`, optionally `adapter`, and a list-of-strings column `choices`."""

    unit = "row"

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path, self.done = path, 0
        if path.stat().st_size == 0:
            self.total, self._file = 0, None
            return
        try:
            self._file = pq.ParquetFile(path)
            self.total = self._file.metadata.num_rows
            schema = self._file.schema_arrow
            names = schema.names
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read as Parquet: {json_files.part(str(error))}") from None
        _checked_columns(names, path)
        self._columns = [name for name in COLUMNS if name in names]
        for name in self._columns:
            self._check_type(name, schema.field(name).type)

    def _check_type(self, name: str, got: Any) -> None:
        import pyarrow as pa

        of, expected = got, "string"
        if name == "choices":
            expected = "list<string>"
            if not (pa.types.is_list(got) or pa.types.is_large_list(got) or pa.types.is_null(got)):
                raise ValueError(f"{self.path}: column {name!r} is {got}; expected {expected}.")
            of = got if pa.types.is_null(got) else got.value_type
        if pa.types.is_dictionary(of):
            of = of.value_type
        kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
        if not any(kind(of) for kind in kinds):
            raise ValueError(f"{self.path}: column {name!r} is {got}; expected {expected}.")

    def __iter__(self) -> Iterator[Entry]:
        import pyarrow as pa

        if self._file is None:
            return
        batches = self._file.iter_batches(batch_size=_ROWS, columns=self._columns)
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError) as error:
                raise ValueError(
                    f"{self.path} cannot be read after row {self.done}: {json_files.part(str(error))}"
                ) from None
            if batch is None:
                return
            for number in range(batch.num_rows):
                self.done += 1
                yield self._entry({name: batch.column(name)[number] for name in self._columns})

    def _entry(self, cells: Mapping[str, Any]) -> Entry:
        try:
            row = {name: cell.as_py() for name, cell in cells.items()}
        except UnicodeDecodeError as error:
            return Entry(line=self.done, error=f"byte {error.start} of a text is not UTF-8.")
        texts = [each for value in row.values() for each in (value if isinstance(value, list) else [value]) if each]
        if sum(map(len, texts)) > LONGEST_LINE:
            return Entry(line=self.done, error=f"the row has more than {LONGEST_LINE} characters; shorten it.")
        return entry(row, line=self.done)
