"""Store of the teacher's replies on disk: each is paid for once, then found by its request.

One SQLite file. The key of a reply is the hash of everything that shaped it (`clients.Request.key`: rendered prompt,
model, parameters, sample number) and nothing else: rows may be added, re-ordered or renamed, and code may change. `put`
returns after the commit, when the reply is on disk.

Only one process can open a store at a time; it holds `<store>.lock` meanwhile, beside the file that links lead to.

A store is checked whole when it is opened, before anything is paid for, and a damaged one is refused with the way to
recover its replies. Damage that shows only later is the same error (`DamagedStoreError`).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import shlex
import sqlite3
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sbs_jax.storage import atomic, lock, places
from sbs_jax.teacher import recovery
from sbs_jax.teacher.clients import Reply

FORMAT = 1  # increased when the meaning of a column changes, so that old files are refused, not misread
_MOST_KEYS = 10_000  # per statement; SQLite takes at most 32,766 values
# SQLite's errors of the disk and the machine. Any other one means that the file is not what it was.
_ENVIRONMENT = {
    *(sqlite3.SQLITE_PERM, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_READONLY),
    *(sqlite3.SQLITE_INTERRUPT, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN),
    *(sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_NOLFS, sqlite3.SQLITE_AUTH),
}

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE replies (
    key BLOB PRIMARY KEY, text TEXT NOT NULL, finish TEXT NOT NULL, model TEXT NOT NULL,
    input_tokens INTEGER, output_tokens INTEGER, stored REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE failures (
    key BLOB PRIMARY KEY, reason TEXT NOT NULL, detail TEXT NOT NULL, stored REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE jobs (
    name TEXT PRIMARY KEY, job TEXT, state TEXT NOT NULL, stored REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE job_keys (name TEXT NOT NULL, key BLOB NOT NULL, PRIMARY KEY (name, key)) WITHOUT ROWID;
"""
_CREATE = f"{_SCHEMA}INSERT INTO meta VALUES ('format', '{FORMAT}');"


@dataclasses.dataclass(frozen=True)
class Failure:
    """The final failure of a request: a reason such as "content_filter", and the provider's message."""

    reason: str
    detail: str


class DamagedStoreError(OSError):
    """The store cannot be read or written as what it is; the text says how to recover its replies."""


class Store:
    """Store of replies, a context manager that opens or creates the file."""

    def __init__(self, path: str | Path) -> None:
        self.path = places.real(path)
        self._log = Path(f"{self.path}-wal")
        self._lock = lock.Lock(Path(f"{self.path}.lock"), of=self.path)

    def __enter__(self) -> Store:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for path in (self.path, self._log):  # before a lock is made beside a device, and a pipe is waited for
            if path.exists() and not path.is_file():
                raise ValueError(f"{path} is not a file; expected a store of replies. Check --store.")
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._lock)
            self._begin()
            if recovery.log_is_damaged(self._log):
                raise self._damaged(f"its log {self._log.name} is")
            with self._explained():
                # A thread writes, so that the disk delays no request; a second connection reads committed data.
                self._connection = stack.enter_context(contextlib.closing(self._connected()))
                self._reader = stack.enter_context(contextlib.closing(self._connected()))
                self._prepare()
            self._open = stack.pop_all()
        self._waiting: list[tuple[bytes, Reply | Failure, asyncio.Future[None]]] = []
        self._writing: asyncio.Task[None] | None = None
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _begin(self) -> None:
        """Creates a missing file, whole at once; refuses one that would be taken for a new or another store."""
        if not self.path.exists():
            if self._log.exists() and self._log.stat().st_size:
                raise DamagedStoreError(
                    f"{self.path} is missing, but {self._log} has its latest replies. Restore the missing file beside "
                    "it; if there is nothing to restore, remove the other one."
                )
            with contextlib.closing(sqlite3.connect(":memory:")) as made:
                made.executescript(_CREATE)
                atomic.replace(self.path, made.serialize())
        if self.path.stat().st_size == 0:
            raise DamagedStoreError(
                f"{self.path} is empty, so what it held is gone. Restore it from a copy; if it never held anything, "
                "remove it."
            )
        if self.path.stat().st_nlink > 1:
            raise ValueError(
                f"{self.path} has a second name (a hard link), but its latest replies may be in a file beside only one "
                "of them. Remove the other name, or make the other one a copy."
            )

    def _connected(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns SQLite's errors into OSError: what the disk refuses, or DamagedStoreError."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)  # text that is not UTF-8 has none
            if code & 0xFF in _ENVIRONMENT and code != sqlite3.SQLITE_IOERR_SHORT_READ:
                raise OSError(f"{self.path} cannot be used: {error}.") from error
            raise self._damaged(str(error)) from error

    def _damaged(self, how: str) -> DamagedStoreError:
        """Saves the replies that can be read in a new store, once, and returns the error that names it."""
        new = Path(f"{self.path}.recovered")
        try:
            count = recovery.save(self.path, new, schema=_CREATE)
        except (OSError, sqlite3.Error) as error:
            return DamagedStoreError(
                f"{self.path} is damaged ({how}), and its replies cannot be saved in {new} ({error}). Repeat the "
                "command when that file can be written."
            )
        if not count:
            new.unlink()
            return DamagedStoreError(
                f"{self.path} is not a store of replies ({how}), or none of them can be read. Check --store, or "
                "restore the file from a copy."
            )
        return DamagedStoreError(
            f"{self.path} is damaged ({how}); the {count:,} replies that can be read are in {new}. Repeat the command "
            f"with --store {shlex.quote(str(new))}: only the others are asked again."
        )

    def _prepare(self) -> None:
        run = self._connection.execute
        run("PRAGMA journal_mode=WAL")
        run("PRAGMA synchronous=FULL")
        # 1 MB of cache each: the file may be gigabytes, and the operating system caches it anyway.
        for connection in (self._connection, self._reader):
            connection.execute("PRAGMA cache_size=-1000")
        (problem,) = run("PRAGMA quick_check(1)").fetchone()
        if problem != "ok":
            raise self._damaged(" ".join(problem.split()))
        found = run("SELECT value FROM meta WHERE name = 'format'").fetchone()
        if found is None or found[0] != str(FORMAT):
            raise ValueError(
                f"{self.path} has format {found and found[0]}; this version reads {FORMAT}. Use the version that "
                "wrote it."
            )

    # ------------------------------------------------------------------------------- reading

    def _read(self, statement: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        with self._explained():
            return self._reader.execute(statement, values).fetchall()

    def find(self, keys: Collection[str]) -> dict[str, Reply | Failure]:
        """Looks up keys; a reply takes precedence over a failure."""
        found: dict[str, Reply | Failure] = {}
        for some, marks in _chunks(keys):
            failures = self._read(f"SELECT key, reason, detail FROM failures WHERE key IN ({marks})", some)
            found |= {key.hex(): Failure(reason, detail) for key, reason, detail in failures}
            replies = self._read(
                f"SELECT key, text, finish, input_tokens, output_tokens, model FROM replies WHERE key IN ({marks})",
                some,
            )
            for key, text, finish, input_tokens, output_tokens, model in replies:
                if not isinstance(text, str):
                    raise self._damaged(f"the reply {key.hex()} is no text")
                found[key.hex()] = Reply(
                    text=text, finish=finish, input_tokens=input_tokens, output_tokens=output_tokens, model=model
                )
        return found

    def settled(self, keys: Sequence[str], *, but: str) -> set[str]:
        """Returns the keys with a failure, or with a reply whose finish is not `but`, without reading the texts."""
        found: set[str] = set()
        for some, marks in _chunks(keys):
            rows = self._read(
                f"SELECT key FROM replies WHERE key IN ({marks}) AND finish != ? "
                f"UNION ALL SELECT key FROM failures WHERE key IN ({marks})",
                [*some, but, *some],
            )
            found.update(key.hex() for (key,) in rows)
        return found

    def get(self, key: str) -> Reply | Failure | None:
        """Looks up one key."""
        return self.find((key,)).get(key)

    def counts(self) -> dict[str, int]:
        """Counts replies, failures, and the tokens of the replies."""
        ((replies, inputs, outputs),) = self._read(
            "SELECT count(*), coalesce(sum(input_tokens), 0), coalesce(sum(output_tokens), 0) FROM replies"
        )
        ((failures,),) = self._read("SELECT count(*) FROM failures")
        return {"replies": replies, "failures": failures, "input_tokens": inputs, "output_tokens": outputs}

    # ------------------------------------------------------------------------------- writing

    async def put(self, key: str, value: Reply | Failure) -> None:
        """Stores a value and returns when it is on disk; one commit writes all waiting values.

        Raises OSError if the disk is full or read-only; earlier replies stay.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((bytes.fromhex(key), value, done))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())
        await done

    async def _write(self) -> None:
        try:
            while self._waiting:
                some, self._waiting = self._waiting, []
                error = None
                try:
                    await asyncio.to_thread(self._commit, [(key, value) for key, value, _ in some])
                except OSError as problem:
                    error = OSError(f"{len(some)} replies could not be stored. {problem}")
                for _, _, done in some:
                    if done.done():  # cancelled
                        continue
                    if error is None:
                        done.set_result(None)
                    else:
                        done.set_exception(error)
        finally:
            self._writing = None

    def put_all(self, values: Mapping[str, Reply | Failure]) -> None:
        """Stores many at once, without an event loop."""
        self._commit([(bytes.fromhex(key), value) for key, value in values.items()])

    def _commit(self, values: Sequence[tuple[bytes, Reply | Failure]]) -> None:
        now = time.time()
        replies = [
            (key, x.text, x.finish, x.model, x.input_tokens, x.output_tokens, now)
            for key, x in values
            if isinstance(x, Reply)
        ]
        failures = [(key, x.reason, x.detail, now) for key, x in values if isinstance(x, Failure)]
        with self._writing_all():
            # The first reply stays: it was paid for and may have been used.
            self._connection.executemany("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?, ?, ?, ?)", replies)
            self._connection.executemany("INSERT OR REPLACE INTO failures VALUES (?, ?, ?, ?)", failures)

    @contextlib.contextmanager
    def _writing_all(self) -> Iterator[None]:
        """Makes one transaction, then raises lock.TakenOverError if another process writes here too.

        In this order, because SQLite keeps two writers apart: what was paid for is stored even so.
        """
        with self._explained():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
        self._lock.check()

    def forget_failures(self) -> int:
        """Removes all failures, so that they are asked again; returns their number."""
        with self._writing_all():
            return self._connection.execute("DELETE FROM failures").rowcount

    # ------------------------------------------------------------------------------- batch jobs

    def add_job(self, name: str, keys: Sequence[str]) -> None:
        """Records a job before it is submitted, so that a killed run finds it by its name."""
        rows = [(name, bytes.fromhex(key)) for key in keys]
        with self._writing_all():
            self._connection.execute("INSERT INTO jobs VALUES (?, NULL, 'new', ?)", (name, time.time()))
            self._connection.executemany("INSERT INTO job_keys VALUES (?, ?)", rows)

    def set_job(self, name: str, *, job: str | None, state: str) -> None:
        """Sets the provider's name of a job and its state: new, running, unread, collected, failed or cancelled."""
        with self._writing_all():
            self._connection.execute("UPDATE jobs SET job = ?, state = ? WHERE name = ?", (job, state, name))

    def jobs(self, *states: str) -> Iterator[tuple[str, str | None, list[str]]]:
        """Yields (name, provider's name, keys) of the jobs in these states, oldest first."""
        marks = ",".join("?" * len(states))
        listed = self._read(f"SELECT name, job FROM jobs WHERE state IN ({marks}) ORDER BY stored, name", states)
        for name, job in listed:
            keys = self._read("SELECT key FROM job_keys WHERE name = ? ORDER BY key", (name,))
            yield name, job, [key.hex() for (key,) in keys]


def _chunks(keys: Collection[str]) -> Iterator[tuple[list[bytes], str]]:
    """Yields (keys as blobs, "?,?,..") for one statement each."""
    blobs = [bytes.fromhex(key) for key in keys]
    for start in range(0, len(blobs), _MOST_KEYS):
        some = blobs[start : start + _MOST_KEYS]
        yield some, ",".join("?" * len(some))
