"""Store of the teacher's replies on disk: each is paid for once, then found by its request.

One SQLite file. The key of a reply is the hash of everything that shaped it (`clients.Request.key`: rendered prompt,
model, parameters, sample number) and nothing else: rows may be added, re-ordered or renamed, and code may change. `put`
returns after the commit, when the reply is on disk.

Only one process can open a store at a time; it holds `<store>.lock` meanwhile.
"""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import sqlite3
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from sbs_jax.teacher.clients import Reply

FORMAT = 1  # increased when the meaning of a column changes, so that old files are refused, not misread
_MOST_KEYS = 10_000  # per statement; SQLite takes at most 32,766 values

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


@dataclasses.dataclass(frozen=True)
class Failure:
    """The final failure of a request: a reason such as "content_filter", and the provider's message."""

    reason: str
    detail: str


class Store:
    """Store of replies, a context manager that opens or creates the file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()

    def __enter__(self) -> Store:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path.with_name(self.path.name + ".lock")).open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise FileExistsError(
                f"{self.path} is in use by another process; wait for it, or choose another --store."
            ) from None
        # A thread writes, so that the disk delays no request; a second connection reads committed data.
        self._connection = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
        self._reader = sqlite3.connect(self.path, isolation_level=None)
        try:
            self._prepare()
        except (sqlite3.DatabaseError, ValueError) as error:
            self.__exit__()
            if isinstance(error, ValueError):
                raise
            raise ValueError(f"{self.path} is not a store of replies ({error}); choose another --store.") from error
        self._waiting: list[tuple[bytes, Reply | Failure, asyncio.Future[None]]] = []
        self._writing: asyncio.Task[None] | None = None
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()
        self._connection.close()
        self._lock.close()

    def _prepare(self) -> None:
        run = self._connection.execute
        run("PRAGMA journal_mode=WAL")
        run("PRAGMA synchronous=FULL")
        # 1 MB of cache each: the file may be gigabytes, and the operating system caches it anyway.
        for connection in (self._connection, self._reader):
            connection.execute("PRAGMA cache_size=-1000")
        made = run("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if not made:
            run("BEGIN")
            for statement in _SCHEMA.split(";"):
                run(statement)
            run("INSERT INTO meta VALUES ('format', ?)", (str(FORMAT),))
            run("COMMIT")
        found = run("SELECT value FROM meta WHERE name = 'format'").fetchone()
        if found is None or found[0] != str(FORMAT):
            raise ValueError(
                f"{self.path} has format {found and found[0]}; this version reads {FORMAT}. Use the version that wrote "
                "it, or choose another --store."
            )

    # ------------------------------------------------------------------------------- reading

    def find(self, keys: Collection[str]) -> dict[str, Reply | Failure]:
        """Looks up keys; a reply takes precedence over a failure."""
        found: dict[str, Reply | Failure] = {}
        for some, marks in _chunks(keys):
            failures = self._reader.execute(f"SELECT key, reason, detail FROM failures WHERE key IN ({marks})", some)
            found |= {key.hex(): Failure(reason, detail) for key, reason, detail in failures}
            replies = self._reader.execute(
                f"SELECT key, text, finish, input_tokens, output_tokens, model FROM replies WHERE key IN ({marks})",
                some,
            )
            for key, text, finish, input_tokens, output_tokens, model in replies:
                found[key.hex()] = Reply(
                    text=text, finish=finish, input_tokens=input_tokens, output_tokens=output_tokens, model=model
                )
        return found

    def settled(self, keys: Sequence[str], *, but: str) -> set[str]:
        """Returns the keys with a failure, or with a reply whose finish is not `but`, without reading the texts."""
        found: set[str] = set()
        for some, marks in _chunks(keys):
            rows = self._reader.execute(
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
        replies, inputs, outputs = self._reader.execute(
            "SELECT count(*), coalesce(sum(input_tokens), 0), coalesce(sum(output_tokens), 0) FROM replies"
        ).fetchone()
        (failures,) = self._reader.execute("SELECT count(*) FROM failures").fetchone()
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
                except (sqlite3.Error, OSError) as problem:
                    error = OSError(f"{self.path}: {problem}; {len(some)} replies could not be stored.")
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
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            # The first reply stays: it was paid for and may have been used.
            self._connection.executemany("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?, ?, ?, ?)", replies)
            self._connection.executemany("INSERT OR REPLACE INTO failures VALUES (?, ?, ?, ?)", failures)
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def forget_failures(self) -> int:
        """Removes all failures, so that they are asked again; returns their number."""
        return self._connection.execute("DELETE FROM failures").rowcount

    # ------------------------------------------------------------------------------- batch jobs

    def add_job(self, name: str, keys: Sequence[str]) -> None:
        """Records a job before it is submitted, so that a killed run finds it by its name."""
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.execute("INSERT INTO jobs VALUES (?, NULL, 'new', ?)", (name, time.time()))
        rows = [(name, bytes.fromhex(key)) for key in keys]
        self._connection.executemany("INSERT INTO job_keys VALUES (?, ?)", rows)
        self._connection.execute("COMMIT")

    def set_job(self, name: str, *, job: str | None, state: str) -> None:
        """Sets the provider's name of a job and its state: new, running, collected, failed or cancelled."""
        self._connection.execute("UPDATE jobs SET job = ?, state = ? WHERE name = ?", (job, state, name))

    def jobs(self, *states: str) -> Iterator[tuple[str, str | None, list[str]]]:
        """Yields (name, provider's name, keys) of the jobs in these states, oldest first."""
        marks = ",".join("?" * len(states))
        listed = self._reader.execute(
            f"SELECT name, job FROM jobs WHERE state IN ({marks}) ORDER BY stored, name", states
        ).fetchall()
        for name, job in listed:
            keys = self._reader.execute("SELECT key FROM job_keys WHERE name = ? ORDER BY key", (name,))
            yield name, job, [key.hex() for (key,) in keys]


def _chunks(keys: Collection[str]) -> Iterator[tuple[list[bytes], str]]:
    """Yields (keys as blobs, "?,?,..") for one statement each."""
    blobs = [bytes.fromhex(key) for key in keys]
    for start in range(0, len(blobs), _MOST_KEYS):
        some = blobs[start : start + _MOST_KEYS]
        yield some, ",".join("?" * len(some))
