"""Readers of questions, one by one: JSON lines or one JSON array, CSV, TSV or Parquet, by the file's ending.

A malformed row becomes an `Entry` with its error, and reading continues. Only faults of the whole file are raised
(missing columns, another form, a JSON array that breaks off). Memory holds one row (at most `LONGEST_LINE` bytes) or
one batch of rows (Parquet, plus pyarrow's row group).
"""

import csv
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from sbs_jax.storage import json_files, parquet_footer, places, user_files

# Bytes of a JSON or CSV line, or characters of a Parquet row.
LONGEST_LINE = 2**20
COLUMNS = ("id", "input", "adapter", "choices")
REQUIRED = COLUMNS[:2]
_ROWS, _DELTA = 256, 2**24  # Parquet rows read at a time, and bytes of them in a delta encoding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """One question: the input without its prefix, and optionally the adapters that answer it.

    `choices` are the possible answers for decoding "choices" (default: the dataset's labels). `rationale` False skips
    this question's rationale if the settings ask for rationales.
    """

    id: str
    input: str
    adapter: str | None = None
    choices: tuple[str, ...] | None = None
    rationale: bool = True


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
    """Returns a reader by the file's ending: .csv, .tsv, .parquet, else JSON; all but Parquet may end in .gz."""
    path = places.of(path)
    packed = path.suffix.lower() == ".gz"
    ending = (path.with_suffix("") if packed else path).suffix.lower()
    if ending == ".parquet":
        return _Parquet(path)
    return _Csv(path, "\t" if ending == ".tsv" else ",") if ending in (".csv", ".tsv") else _Json(path)


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


class _Text:
    """A file of text; `done` of `total` bytes have been read."""

    unit = "B"

    def __init__(self, path: Path, *, as_json: bool) -> None:
        self.path = path
        self._file = user_files.TextFile(path, longest=LONGEST_LINE, as_json=as_json)
        self.total = self._file.total

    @property
    def done(self) -> int:
        return self._file.done


_TOO_LONG = f"the line is longer than {LONGEST_LINE} bytes and was skipped; shorten it."


class _Json(_Text):
    def __init__(self, path: Path) -> None:
        super().__init__(path, as_json=True)

    def __iter__(self) -> Iterator[Entry]:
        for number, line in self._file.json_texts():
            if line is None:
                yield Entry(line=number, error=_TOO_LONG)
                continue
            try:
                text = json_files.decoded(line, "the line")
                if text.strip():
                    yield entry(json_files.parse_json(text, "the line"), line=number)
            except ValueError as error:
                yield Entry(line=number, error=str(error))


class _Csv(_Text):
    """Reader of CSV with a header; quoted fields may hold line ends. `choices` is a JSON list of texts."""

    def __init__(self, path: Path, delimiter: str) -> None:
        super().__init__(path, as_json=False)
        self._delimiter = delimiter

    def __iter__(self) -> Iterator[Entry]:
        csv.field_size_limit(LONGEST_LINE)
        texts = _RowTexts(self._file)
        rows = csv.reader(texts, strict=True, delimiter=self._delimiter)
        header: list[str] | None = None
        while True:
            texts.begin()
            try:
                fields = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                # csv.reader restarts with the next line.
                found = Entry(line=texts.first, error=f"not valid CSV: {error}.")
            else:
                if not fields and texts.wrong is None:
                    continue
                if header is None:
                    header = self._header(fields, texts.wrong)
                    continue
                if texts.wrong is not None:
                    found = Entry(line=texts.first, error=texts.wrong)
                else:
                    found = self._entry(fields, header, line=texts.first)
            if header is None:
                raise ValueError(f"{self.path}:{found.line}: the header cannot be read: {found.error}")
            yield found

    def _header(self, fields: Sequence[str], wrong: str | None) -> list[str]:
        if wrong is not None:
            raise ValueError(f"{self.path}:1: the header cannot be read: {wrong}")
        return _checked_columns([name.strip() for name in fields], self.path)

    def _entry(self, fields: Sequence[str], header: Sequence[str], *, line: int) -> Entry:
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


class _RowTexts:
    """The lines of a file for csv.reader: `first` is the row's first line, `wrong` its error."""

    def __init__(self, file: user_files.TextFile) -> None:
        self._lines = file.lines()
        self._number = self._held = self.first = 0
        self.wrong: str | None = None

    def begin(self) -> None:
        self.first, self.wrong, self._held = self._number + 1, None, 0

    def __iter__(self) -> "_RowTexts":
        return self

    def __next__(self) -> str:
        self._number, line = next(self._lines)
        if line is None:
            self.wrong = _TOO_LONG
            return "\n"
        self._held += len(line)
        if self._held > LONGEST_LINE and self._number > self.first:
            raise csv.Error(f"the row is longer than {LONGEST_LINE} bytes")
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            self.wrong = f"byte {error.start} (0x{line[error.start]:02x}) of line {self._number} is not UTF-8."
            return line.decode("utf-8", "replace")


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
        size = user_files.check(path).st_size
        if size == 0:
            self.total, self._file = 0, None
            return
        chunks = [chunk for chunk in parquet_footer.read(path) if chunk.path.partition(".")[0] in COLUMNS]
        # A value takes at least a byte.
        unfolded = sum(max(chunk.unfolded, chunk.values) for chunk in chunks)
        user_files.check_unfolded(path, packed=size, unfolded=unfolded)
        # pyarrow has no dictionaries for delta encodings. There a text can be as long as its chunk, so few rows are
        # read at a time.
        delta = {chunk.path: chunk.unfolded for chunk in chunks if chunk.is_delta}
        self._rows = min(_ROWS, max(1, _DELTA // max(1, *delta.values(), 1)))
        texts = {chunk.path for chunk in chunks if chunk.is_text}
        repeating = sorted(texts - delta.keys() - {"choices"})  # choices of the wrong type
        try:
            # Texts that repeat stay in a dictionary: unfolded, a few kilobytes of them could take gigabytes.
            self._file = pq.ParquetFile(path, read_dictionary=repeating)
            self.total = self._file.metadata.num_rows
            schema = self._file.schema_arrow
            names = schema.names
        except (pa.ArrowException, OSError, UnicodeDecodeError, KeyError) as error:
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
        batches = self._file.iter_batches(batch_size=self._rows, columns=self._columns)
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
        import pyarrow as pa

        try:
            row = {name: cell.as_py() for name, cell in cells.items()}
        except UnicodeDecodeError as error:
            return Entry(line=self.done, error=f"byte {error.start} of a text is not UTF-8.")
        except pa.ArrowException as error:  # an index outside the dictionary of texts
            return Entry(line=self.done, error=f"the row cannot be read: {json_files.part(str(error))}")
        texts = [each for value in row.values() for each in (value if isinstance(value, list) else [value]) if each]
        if sum(map(len, texts)) > LONGEST_LINE:
            return Entry(line=self.done, error=f"the row has more than {LONGEST_LINE} characters; shorten it.")
        return entry(row, line=self.done)
