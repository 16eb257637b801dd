"""Journal of answers in JSON lines, which is converted to the requested format and moved into place at the end.

During a run these files are beside OUTPUT, or in the user's cache if it is in a bucket, which cannot append:

    OUTPUT.partial       one line per answered row, in order
    OUTPUT.partial.json  identity of input, model and settings
    OUTPUT.partial.ids   ids seen so far (id_index.py), rebuilt at every start
    OUTPUT.partial.lock  the writing process

A process that ends early leaves them behind, and the same command resumes from them. Of several processes each has
these files beside its own shard, `OUTPUT-00000-of-00002` (shards.py).
"""

import dataclasses
import functools
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from sbs_jax import hosts
from sbs_jax.prediction.shards import PARTIAL, Shard
from sbs_jax.storage import atomic, json_files, lock, places, tables, user_files

_ROWS = 8_192  # per Parquet row group
_OLD_HASH = "sha256 of both ends"  # of an input, in journals of earlier versions

Row = dict[str, Any]


# Columns of every output, and those of some.
_ALWAYS, _SOMETIMES = ("id", "prediction", "score"), ("rationale", "scores", "line", "error")


def check(output: str | Path, *, input_path: str | Path, shard: Shard) -> None:
    """Refuses an output that is the input, or a file that `sbs predict` did not write, before anything is touched.

    Also refused are the shards and journals of another number of processes beside it.
    """
    whole = places.of(output)
    ending = whole.suffix.lower()
    if ending == ".gz":
        raise ValueError(f"{output}: an output is not packed; give it the ending .csv, .tsv, .parquet or .jsonl.")
    for path in (places.real(whole), _home(places.real(whole))):
        shard.check_count(path)
    output, partial = _places_of(whole, shard)
    about = places.of(f"{partial}.json")
    for path in (output, *(places.of(f"{partial}{ending}") for ending in ("", ".json", ".ids", ".lock"))):
        if path.exists() and path.samefile(input_path):
            raise ValueError(f"{path} is the input, and would be written for the output {output}; choose another name.")
    if output.exists() and not _is_output(output, ending):
        raise FileExistsError(f"{output} exists and is no output of sbs predict; choose another name, or remove it.")
    if partial.exists() != about.exists() and not (about.exists() and _is_about(about)):
        there = about if about.exists() else partial
        raise FileExistsError(
            f"{there} exists, and is not what an interrupted sbs predict leaves beside {output}; choose another name, "
            "or remove it."
        )


def _places_of(output: Path, shard: Shard) -> tuple[Path, Path]:
    """Returns the file of a shard, and its journal. A link stays, and its file has one journal under all its names."""
    whole = places.real(output)
    journal = shard.file(_home(whole))
    return shard.file(whole), journal.with_name(f"{journal.name}{PARTIAL}")


def _home(output: Path) -> Path:
    """Returns the path that the journals of an output are named after."""
    if not places.in_bucket(output):
        return output
    digest = hashlib.sha256(str(output).encode()).hexdigest()[:16]
    return places.user_cache() / "journals" / f"{digest}-{output.name}"


def _is_output(path: Path, ending: str) -> bool:
    """Tells whether a file begins as an output of that ending does; an empty one has nothing to lose."""
    if not path.is_file():
        return False
    with user_files.opened(path) as file:
        line = file.readline(user_files.LONGEST_LINE)
    if not line:
        return True
    try:
        if ending == ".parquet":
            import pyarrow.parquet as pq

            names = pq.read_schema(path).names
        elif ending in _DELIMITERS:
            names = line.decode().rstrip("\r\n").split(_DELIMITERS[ending])
        else:
            row = json.loads(line)
            names = list(row) if "error" not in row else [*_ALWAYS, *(set(row) - {"id"})]
    except (ValueError, TypeError, OSError, RecursionError):  # pyarrow's errors are of these
        return False
    return set(_ALWAYS) <= set(names) <= {*_ALWAYS, *_SOMETIMES}


def _is_about(path: Path) -> bool:
    try:
        found = json_files.read_json(path)
    except (ValueError, OSError):
        return False
    return isinstance(found, dict) and {"input", "settings", "students"} <= found.keys()


class Journal:
    """The answers so far: `rows` complete ones; `add` appends, `finish` makes the output.

    ValueError if the existing journal has another identity; `lock.HeldError` if another process writes it.
    """

    def __init__(self, output: Path, *, about: Mapping[str, Any], shard: Shard) -> None:
        self._shard, self._write = shard, _WRITERS.get(output.suffix.lower())
        self.output, self.path = _places_of(output, shard)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.ids = places.of(f"{self.path}.ids")
        self._about = places.of(f"{self.path}.json")
        self._lock = lock.Lock(places.of(f"{self.path}.lock"), of=shard.file(output), instead="another --output")
        self._lock.take()
        try:
            if shard.count > 1:
                about = {**about, "shard": dataclasses.asdict(shard)}
            self._begin(json.loads(json.dumps(about)))
        except BaseException:
            self._lock.release()
            raise
        self._file = self.path.open("r+b")
        self.rows = self._count()
        self._file.seek(0)

    def _begin(self, about: Mapping[str, Any]) -> None:
        if self.path.exists() and self._about.exists():
            before = json_files.read_json(self._about)
            if isinstance(before, dict) and _OLD_HASH in str(before.get("input")):
                raise ValueError(
                    f"{self.path} is of an earlier version, which did not record the whole input: its answers may "
                    f"belong to other questions. Remove {self.path} to start again."
                )
            differences = json_files.differences(before, about)
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
        """Writes the output in its format and moves it into place; `columns` applies to CSV and Parquet.

        No shard gets its name before all processes call this, and none loses its journal before all have their names:
        whenever a process is killed, no answer is computed again.
        """
        hosts.barrier()
        self._lock.check()
        if self._write is None and self._shard.count == 1:
            atomic.move(self.path, self.output)
        else:
            self._file.seek(0)
            with atomic.replacing(self.output, ours=False) as file:
                if self._write is None:
                    shutil.copyfileobj(self._file, file)
                else:
                    self._write(file, map(json.loads, self._file), columns)
        hosts.barrier()
        self._file.close()
        for path in (self.path, self._about, self._lock.path):
            path.unlink(missing_ok=True)
        self._lock.release()

    def close(self) -> None:
        """Closes the journal and keeps its files for a later process."""
        self._file.close()
        self._lock.release()


def _write_text(file: BinaryIO, rows: Iterable[Row], columns: Sequence[str], *, delimiter: str) -> None:
    def cells() -> Iterator[list[Any]]:
        yield list(columns)
        for row in rows:
            values = [row.get(name) for name in columns]
            yield [json.dumps(x, ensure_ascii=False) if isinstance(x, dict) else x for x in values]

    text = io.TextIOWrapper(file, "utf-8", newline="")
    tables.write(text, cells(), delimiter=delimiter)
    text.detach()  # flushes, and leaves the file open


def _write_parquet(file: BinaryIO, rows: Iterator[Row], columns: Sequence[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"score": pa.float64(), "line": pa.int64(), "scores": pa.map_(pa.string(), pa.float64())}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in columns])
    with pq.ParquetWriter(file, schema) as writer:
        while group := [row for _, row in zip(range(_ROWS), rows, strict=False)]:
            for row in group:
                if row.get("scores") is not None:
                    row["scores"] = list(row["scores"].items())
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_WRITERS: dict[str, Callable[[BinaryIO, Iterator[Row], Sequence[str]], None]] = {
    ".parquet": _write_parquet,
    **{ending: functools.partial(_write_text, delimiter=mark) for ending, mark in _DELIMITERS.items()},
}
