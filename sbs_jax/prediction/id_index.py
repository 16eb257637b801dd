"""Index of the ids of a file, on disk: finds repeated ids in constant memory."""

import hashlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType


class IdIndex:
    """Map from digests of ids to the line of their first row, in an SQLite file that is deleted at the end.

    16 bytes of BLAKE2b stand for an id, so collisions do not occur in practice.
    """

    def __init__(self, path: Path | None) -> None:
        """Opens the file, replacing one that an earlier process left behind; None takes a temporary file."""
        if path is not None:
            path.unlink(missing_ok=True)
        self._path, self._connection = path, sqlite3.connect(path or "", isolation_level=None)
        # Nothing here outlives the process, so durability is off.
        for pragma in ("journal_mode = OFF", "synchronous = OFF", "locking_mode = EXCLUSIVE", "cache_size = -32000"):
            self._connection.execute(f"PRAGMA {pragma}")
        self._connection.execute("CREATE TABLE ids (digest BLOB PRIMARY KEY, line INTEGER) WITHOUT ROWID")

    def first_lines(self, rows: Sequence[tuple[str, int]]) -> list[int]:
        """Adds (id, line) rows; returns per row the line of the first row with its id. OSError if the disk fails."""
        try:
            return self._first_lines(rows)
        except sqlite3.Error as error:
            place = self._path or "a temporary file"
            raise OSError(
                f"The index of ids in {place} fails: {error}. Repeat the command when it can be written."
            ) from error

    def _first_lines(self, rows: Sequence[tuple[str, int]]) -> list[int]:
        digests = [
            hashlib.blake2b(row_id.encode(errors="surrogatepass"), digest_size=16).digest() for row_id, _ in rows
        ]
        self._connection.execute("BEGIN")
        self._connection.executemany(
            "INSERT OR IGNORE INTO ids VALUES (?, ?)",
            [(digest, line) for digest, (_, line) in zip(digests, rows, strict=True)],
        )
        self._connection.execute("COMMIT")
        find = "SELECT line FROM ids WHERE digest = ?"
        return [self._connection.execute(find, (digest,)).fetchone()[0] for digest in digests]

    def __enter__(self) -> "IdIndex":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
