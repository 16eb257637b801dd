"""The teacher's replies on disk: paid for once, found again by what was asked.

One SQLite file. A reply is keyed by the hash of everything that shaped it (`clients.Request.key`: rendered prompt,
model, parameters, number of the sample) and by nothing else: rows may be added, re-ordered or renamed, code may change,
and what was asked before is found. A reply counts when it is on disk: `put` returns after the commit.

One process at a time: the file beside it, `<store>.lock`, is held while a store is open.
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

# Raised when the meaning of a column changes, so that an old file is refused and not misread.
FORMAT = 1
# SQLite takes at most 32,766 values in one statement.
_MOST_KEYS = 10_000

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
    """Why a request has no reply and will not get one: a word such as "content_filter", and what the teacher said."""

    reason: str
    detail: str


class Store:
    """Opens (or makes) a store; use it with `with`."""

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
                f"{self.path} is in use by another process, which asks the teacher already; wait for it, or choose "
                "another --store."
            ) from None
        # Written from a thread, so that waiting for the disk does not hold up the requests in flight; read by another
        # connection, which sees what is committed and nothing else.
        self._connection = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
        self._reader = sqlite3.connect(self.path, isolation_level=None)
        try:
            self._prepare()
        except sqlite3.DatabaseError as error:
            self.__exit__()
            raise ValueError(f"{self.path} is no store of replies ({error}); choose another --store.") from error
        except ValueError:
            self.__exit__()
            raise
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
        # A small cache of pages, 1 MB for each: the file may be gigabytes, the process shall not, and the operating
        # system has a cache of its own.
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
                f"{self.path} is a store of format {found and found[0]}; this version reads {FORMAT}. Use the version "
                "that wrote it, or choose another --store."
            )

    # ------------------------------------------------------------------------------- reading

    def find(self, keys: Collection[str]) -> dict[str, Reply | Failure]:
        """What is stored under these keys; a reply where there is one, however a later ask failed."""
        found: dict[str, Reply | Failure] = {}
        wanted = [bytes.fromhex(key) for key in keys]
        for start in range(0, len(wanted), _MOST_KEYS):
            some = wanted[start : start + _MOST_KEYS]
            marks = ",".join("?" * len(some))
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
        """Those keys that have a failure, or a reply that did not end as `but` ("length"); texts are not read."""
        found: set[str] = set()
        wanted = [bytes.fromhex(key) for key in keys]
        for start in range(0, len(wanted), _MOST_KEYS):
            some = wanted[start : start + _MOST_KEYS]
            marks = ",".join("?" * len(some))
            rows = self._reader.execute(
                f"SELECT key FROM replies WHERE key IN ({marks}) AND finish != ? "
                f"UNION ALL SELECT key FROM failures WHERE key IN ({marks})",
                [*some, but, *some],
            )
            found.update(key.hex() for (key,) in rows)
        return found

    def get(self, key: str) -> Reply | Failure | None:
        """What is stored under one key."""
        return self.find((key,)).get(key)

    def counts(self) -> dict[str, int]:
        """Replies and failures in the file, and the tokens of the replies."""
        replies, inputs, outputs = self._reader.execute(
            "SELECT count(*), coalesce(sum(input_tokens), 0), coalesce(sum(output_tokens), 0) FROM replies"
        ).fetchone()
        (failures,) = self._reader.execute("SELECT count(*) FROM failures").fetchone()
        return {"replies": replies, "failures": failures, "input_tokens": inputs, "output_tokens": outputs}

    # ------------------------------------------------------------------------------- writing

    async def put(self, key: str, value: Reply | Failure) -> None:
        """Returns when the reply (or the reason why there is none) is on disk; many are written with one commit.

        OSError where the disk is full or may not be written; what was stored before stays.
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
                    if done.done():  # whoever waited has been cancelled
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
            # The first reply stays: it is the one that was paid for and may have been used.
            self._connection.executemany("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?, ?, ?, ?)", replies)
            self._connection.executemany("INSERT OR REPLACE INTO failures VALUES (?, ?, ?, ?)", failures)
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def forget_failures(self) -> int:
        """Removes every recorded failure, so that it is asked again; returns their number."""
        return self._connection.execute("DELETE FROM failures").rowcount

    # ------------------------------------------------------------------------------- batch jobs

    def add_job(self, name: str, keys: Sequence[str]) -> None:
        """Notes a batch of requests before it is submitted, so that a killed run finds it again by its name."""
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.execute("INSERT INTO jobs VALUES (?, NULL, 'new', ?)", (name, time.time()))
        rows = [(name, bytes.fromhex(key)) for key in keys]
        self._connection.executemany("INSERT INTO job_keys VALUES (?, ?)", rows)
        self._connection.execute("COMMIT")

    def set_job(self, name: str, *, job: str | None, state: str) -> None:
        """The provider's name of a job, and its state: new, running, collected, failed or cancelled."""
        self._connection.execute("UPDATE jobs SET job = ?, state = ? WHERE name = ?", (job, state, name))

    def jobs(self, *states: str) -> Iterator[tuple[str, str | None, list[str]]]:
        """(name, provider's name, keys) of the jobs in these states, oldest first."""
        marks = ",".join("?" * len(states))
        listed = self._reader.execute(
            f"SELECT name, job FROM jobs WHERE state IN ({marks}) ORDER BY stored, name", states
        ).fetchall()
        for name, job in listed:
            keys = self._reader.execute("SELECT key FROM job_keys WHERE name = ? ORDER BY key", (name,))
            yield name, job, [key.hex() for (key,) in keys]
