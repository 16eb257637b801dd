"""Journal of answers in JSON lines, which is converted to the requested format and moved into place at the end.

During a run these files are beside OUTPUT:

    OUTPUT.partial       one line per answered row, in order
    OUTPUT.partial.json  identity of input, model and settings
    OUTPUT.partial.ids   ids seen so far (id_index.py), rebuilt at every start
    OUTPUT.partial.lock  the writing process

A process that ends early leaves them behind, and the same command resumes from them.
"""

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sbs_jax.storage import atomic, json_files, lock

_ROWS = 8_192  # per Parquet row group

Row = dict[str, Any]


class Journal:
    """The answers so far: `rows` complete ones; `add` appends, `finish` makes the output.

    ValueError if the existing journal has another identity; `lock.HeldError` if another process writes it.
    """

    def __init__(self, output: Path, *, about: Mapping[str, Any]) -> None:
        self.output, self.path = output, Path(f"{output}.partial")
        self.ids = Path(f"{self.path}.ids")
        self._about = Path(f"{self.path}.json")
        self._lock = lock.Lock(Path(f"{self.path}.lock"))
        try:
            self._lock.take()
        except lock.HeldError as error:
            raise lock.HeldError(f"Another process answers into {output}: {lock.read(self._lock.path)}.") from error
        try:
            self._begin(json.loads(json.dumps(about)))
        except BaseException:
            self._lock.release()
            raise
        self._file = self.path.open("r+b")
        self.rows = self._count()
        self._file.seek(0)

    def _begin(self, about: Mapping[str, Any]) -> None:
        if self.path.exists() and self._about.exists():
            before = json_files.parse_json(self._about.read_text("utf-8"), str(self._about))
            differences = _differences(before, about)
            if differences:
                raise ValueError(
                    f"{self.path} holds answers of an interrupted run with another {'; another '.join(differences)}. "
                    f"Repeat that command to resume it, or remove {self.path} to start again."
                )
            return
        self.path.unlink(missing_ok=True)
        self._about.write_text(json.dumps(about, indent=1) + "\n", "utf-8")
        self.path.touch()

    def _count(self) -> int:
        """Counts complete lines."""
        return sum(1 for line in self._file if line.endswith(b"\n"))

    def read(self) -> Row:
        """Reads the next existing row."""
        return json.loads(self._file.readline())

    def cut(self) -> None:
        """Drops the rows not read yet; they will be answered again."""
        self._file.truncate(self._file.tell())

    def add(self, rows: Sequence[Row]) -> None:
        """Appends rows and flushes them to the operating system, so they survive the end of this process."""
        self._lock.check()
        self._file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        self._file.flush()

    def finish(self, *, columns: Sequence[str]) -> None:
        """Writes the output in its format and moves it into place; `columns` applies to CSV and Parquet."""
        self._lock.check()
        made = self.path
        write = _WRITERS.get(self.output.suffix.lower())
        if write is not None:
            made = Path(f"{self.path}.made")
            self._file.seek(0)
            write(made, map(json.loads, self._file), columns)
        with made.open("rb") as file:
            os.fsync(file.fileno())
        made.replace(self.output)
        atomic.sync_directory(self.output.parent)
        self._file.close()
        for path in (self.path, self._about, self._lock.path):
            path.unlink(missing_ok=True)
        self._lock.release()

    def close(self) -> None:
        """Closes the journal and keeps its files for a later process."""
        self._file.close()
        self._lock.release()


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        names = [*before, *(each for each in now if each not in before)]
        return [
            found for each in names for found in _differences(before.get(each), now.get(each), f"{name} {each}".strip())
        ]
    return [] if before == now else [f"{name} ({json_files.brief(before)}, now {json_files.brief(now)})"]


def _write_csv(path: Path, rows: Iterator[Row], columns: Sequence[str]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in rows:
            values = [row.get(name) for name in columns]
            writer.writerow(json.dumps(x, ensure_ascii=False) if isinstance(x, dict) else x for x in values)


def _write_parquet(path: Path, rows: Iterator[Row], columns: Sequence[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"score": pa.float64(), "line": pa.int64(), "scores": pa.map_(pa.string(), pa.float64())}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in columns])
    with pq.ParquetWriter(path, schema) as writer:
        while group := [row for _, row in zip(range(_ROWS), rows, strict=False)]:
            for row in group:
                if row.get("scores") is not None:
                    row["scores"] = list(row["scores"].items())
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


_WRITERS: dict[str, Callable[[Path, Iterator[Row], Sequence[str]], None]] = {
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}
