"""The store: replies on disk, found again, opened by one run at a time."""

import asyncio
import multiprocessing
import os
import random
import signal
import sqlite3
import time
from pathlib import Path

import pytest

from sbs_jax.storage import lock
from sbs_jax.teacher.clients import Reply
from sbs_jax.teacher.store import DamagedStoreError, Failure, Store


def key(number: int) -> str:
    return f"{number:064x}"


def reply(text: str = "a", finish: str = "stop") -> Reply:
    return Reply(text=text, finish=finish, input_tokens=3, output_tokens=1, model="m")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "replies.sqlite"


def test_what_was_put_is_found_and_nothing_else(path):
    with Store(path) as store:
        asyncio.run(store.put(key(1), reply("Grüße </s>\n\u2028")))
        asyncio.run(store.put(key(2), Failure("content_filter", "kept back")))
        store.put_all({key(3): reply("c")})
        expected = {
            key(1): reply("Grüße </s>\n\u2028"),
            key(2): Failure("content_filter", "kept back"),
            key(3): reply("c"),
        }
        assert store.find([key(n) for n in range(9)]) == expected
    with Store(path) as store:
        assert store.find([key(n) for n in range(9)]) == expected
        assert store.get(key(4)) is None
        assert store.counts() == {"replies": 2, "failures": 1, "input_tokens": 6, "output_tokens": 2}


def test_what_needs_no_asking_is_told_without_reading_it(path):
    with Store(path) as store:
        store.put_all({key(1): reply(), key(2): reply(finish="length"), key(3): Failure("too_long", "x")})
        assert store.settled([key(n) for n in range(20_000)], but="length") == {key(1), key(3)}


def test_the_first_reply_stays_and_beats_a_failure(path):
    with Store(path) as store:
        store.put_all({key(1): Failure("refused", "once")})
        store.put_all({key(1): reply("first")})
        store.put_all({key(1): reply("second")})
        assert store.get(key(1)) == reply("first")
        assert store.forget_failures() == 1
        assert store.get(key(1)) == reply("first")


def test_many_replies_at_once_are_one_commit(path):
    """Each `put` returns after the commit: another connection then sees the reply."""
    with Store(path) as store:
        commits = []
        write = store._commit

        def counted(values):
            commits.append(len(values))
            time.sleep(0.02)
            write(values)

        store._commit = counted
        other = sqlite3.connect(path)

        async def put(number):
            await store.put(key(number), reply(str(number)))
            found = other.execute("SELECT text FROM replies WHERE key = ?", (bytes.fromhex(key(number)),)).fetchone()
            assert found == (str(number),)

        async def put_all():
            await asyncio.gather(*map(put, range(500)))

        asyncio.run(put_all())
        other.close()
        assert sum(commits) == 500
        assert len(commits) < 20


def test_more_keys_than_a_statement_takes(path):
    with Store(path) as store:
        store.put_all({key(n): reply(str(n)) for n in range(25_000)})
        assert len(store.find([key(n) for n in range(40_000)])) == 25_000


@pytest.mark.parametrize("name", ["replies.sqlite", "link.sqlite", "folder/replies.sqlite", "chain.sqlite"])
def test_a_store_has_one_lock_under_all_its_names(path, name):
    (path.parent / "link.sqlite").symlink_to(path)
    (path.parent / "chain.sqlite").symlink_to("link.sqlite")
    (path.parent / "folder").symlink_to(path.parent)
    with Store(path) as store:
        store.put_all({key(1): reply()})
        with pytest.raises(lock.HeldError, match=rf"{path} is in use: process {os.getpid()} on"):
            Store(path.parent / name).__enter__()
    with Store(path.parent / name) as store:
        assert store.get(key(1)) == reply()
    assert sorted(file.name for file in path.parent.glob("*.lock")) == ["replies.sqlite.lock"]


def test_a_store_with_a_hard_link_is_refused(path):
    with Store(path) as store:
        store.put_all({key(1): reply()})
    path.with_name("other.sqlite").hardlink_to(path)
    with pytest.raises(ValueError, match="second name"), Store(path.with_name("other.sqlite")):
        pass
    path.with_name("other.sqlite").unlink()
    with Store(path) as store:
        assert store.get(key(1)) == reply()


def test_a_store_whose_lock_was_removed_and_taken_keeps_the_reply_and_ends_the_run(path):
    with Store(path) as first:
        Path(f"{path}.lock").unlink()
        with Store(path) as second:
            with pytest.raises(OSError, match=r"took over .*replies\.sqlite"):
                asyncio.run(first.put(key(1), reply()))
            assert second.get(key(1)) == reply()  # it was paid for


def test_a_file_of_another_kind_is_refused(path):
    path.write_text("not a database, but long enough to look like one " * 40)
    with pytest.raises(DamagedStoreError, match="not a store of replies"), Store(path):
        pass
    assert path.read_text().startswith("not a database")
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="not a file"), Store(path):
        pass


def test_an_empty_file_is_not_a_new_store(path):
    """All rows would be paid for again."""
    path.touch()
    with pytest.raises(DamagedStoreError, match="is empty, so what it held is gone"), Store(path):
        pass
    path.unlink()
    Path(f"{path}-wal").write_bytes(b"replies")
    with pytest.raises(DamagedStoreError, match=r"is missing, but .*-wal has its latest replies"), Store(path):
        pass


def filled(path: Path) -> dict[str, Reply | Failure]:
    """Fills a store of 40 pages, so that 500 replies, one of them of many pages, and 5 failures are in it."""
    spread = [f"{number * 2654435761 % 2**32:08x}{number:056x}" for number in range(506)]
    values: dict[str, Reply | Failure] = {each: reply(f"reply {number} " * 20) for number, each in enumerate(spread)}
    values[spread[500]] = reply("long " * 5000, finish="length")
    values |= dict.fromkeys(spread[501:], Failure("refused", "so"))
    with Store(path) as store:
        store.put_all(values)
        store.add_job("mine", spread[:2])
        store.set_job("mine", job="theirs", state="running")
    return values


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


@pytest.mark.parametrize(
    ("damage", "least"),
    [
        (lambda path: overwrite(path, 20 * 4096, random.Random(0).randbytes(4096)), 480),
        (lambda path: overwrite(path, 20 * 4096 + 5, bytes(4096)), 470),
        (lambda path: overwrite(path, 0, random.Random(0).randbytes(4096)), 501),
        (lambda path: os.truncate(path, path.stat().st_size - 9000), 470),
    ],
    ids=["a middle page", "zeros over two pages", "the first page", "truncated"],
)
def test_a_damaged_store_is_refused_and_its_replies_are_saved(path, damage, least):
    values = filled(path)
    damage(path)
    damaged = path.read_bytes()
    with pytest.raises(DamagedStoreError, match=r"is damaged .*the \d+ replies that can be read are in"), Store(path):
        pass
    assert path.read_bytes() == damaged
    # A second time, after replies were added there, nothing is written over them.
    with Store(f"{path}.recovered") as store:
        found = store.find(list(values))
        assert least <= sum(isinstance(value, Reply) for value in found.values()) <= 501
        assert all(values[each] == value for each, value in found.items())
        assert [(name, job) for name, job, _ in store.jobs("running")] == [("mine", "theirs")]
        store.put_all({key(10**6): reply("paid for later")})
    with pytest.raises(DamagedStoreError), Store(path):
        pass
    with Store(f"{path}.recovered") as store:
        assert store.get(key(10**6)) == reply("paid for later")


def logged(path: Path, numbers: range) -> Path:
    """Leaves a store with a commit for each number in its write-ahead log, as a kill would; returns the log."""
    with Store(path) as store:
        for number in numbers:
            store.put_all({key(number): reply(f"reply {number}")})
        kept = {file: file.read_bytes() for file in (path, Path(f"{path}-wal"))}
    for file, data in kept.items():
        file.write_bytes(data)
    return Path(f"{path}-wal")


def test_damage_of_the_log_loses_no_commit_without_a_word(path):
    """SQLite would use the commits before the damage, and drop the rest."""
    log = logged(path, range(20))
    overwrite(log, log.stat().st_size // 2, b"damage")
    with (
        pytest.raises(DamagedStoreError, match=r"is damaged \(its log replies\.sqlite-wal.* the 20 replies"),
        Store(path),
    ):
        pass
    with Store(f"{path}.recovered") as store:
        assert store.find([key(number) for number in range(20)]) == {
            key(number): reply(f"reply {number}") for number in range(20)
        }


@pytest.mark.parametrize("cut", [0, 1, 2000])
def test_a_log_that_a_kill_cut_short_is_whole(path, cut):
    log = logged(path, range(20))
    os.truncate(log, log.stat().st_size - cut)
    with Store(path) as store:
        assert store.counts()["replies"] == 20 - (cut > 0)
    # The log of an earlier round stands behind the frames in use.
    log = logged(path, range(20, 23))
    overwrite(log, log.stat().st_size, random.Random(0).randbytes(24 + 4096) * 2)
    with Store(path) as store:
        assert store.counts()["replies"] == 23 - (cut > 0)


def test_damage_that_shows_later_is_told_too(path):
    values = filled(path)
    place = path.read_bytes().index(b"reply 77 ")
    overwrite(path, place, b"\xff")
    with Store(path) as store, pytest.raises(DamagedStoreError, match=r"the 500 replies that can be read are in"):
        store.find(list(values))
    Path(f"{path}.recovered").unlink()
    overwrite(path, place, b"r")
    with Store(path) as store:
        overwrite(path, 4096, random.Random(0).randbytes(path.stat().st_size - 4096))
        with pytest.raises(DamagedStoreError, match=r"not a store of replies|is damaged"):
            store.find(list(values))
        store._connection.execute("PRAGMA shrink_memory")  # forgets the pages read so far
        with pytest.raises(OSError, match=r"1 replies could not be stored\. .*replies\.sqlite"):
            asyncio.run(store.put(key(0), reply()))


def test_a_store_of_another_format_is_refused(path):
    with Store(path):
        pass
    with sqlite3.connect(path) as other:
        other.execute("UPDATE meta SET value = '99'")
    other.close()
    with pytest.raises(ValueError, match=r"format 99; this version reads 1"), Store(path):
        pass


def _write_forever(path: str, said) -> None:
    with Store(path) as store:

        async def write():
            for number in range(10**9):
                await store.put(key(number), reply(str(number)))
                said.send(number)

        asyncio.run(write())


@pytest.mark.parametrize("seconds", [0.1, 0.35])
def test_kill_9_loses_nothing_that_was_reported_stored(path, seconds):
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    writer = context.Process(target=_write_forever, args=(str(path), theirs))
    writer.start()
    theirs.close()
    last = ours.recv()
    time.sleep(seconds)
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    try:
        while True:
            last = ours.recv()
    except EOFError:
        pass
    with Store(path) as store:
        assert len(store.find([key(n) for n in range(last + 1)])) == last + 1
        assert store.counts()["replies"] <= last + 2


def test_a_full_disk_is_an_error_and_keeps_what_was_there(path):
    with Store(path) as store:
        store.put_all({key(1): reply("kept")})
        store._connection.execute("PRAGMA max_page_count=12")  # as a disk that is full after so many pages
        with pytest.raises(OSError, match="full"):
            asyncio.run(store.put(key(2), reply("x" * 200_000)))
        assert store.get(key(1)) == reply("kept")
        assert store.get(key(2)) is None
        store._connection.execute("PRAGMA max_page_count=100000")
        asyncio.run(store.put(key(2), reply("y" * 200_000)))
    with Store(path) as store:
        assert store.counts()["replies"] == 2


def test_jobs_are_remembered_with_their_requests(path):
    with Store(path) as store:
        store.add_job("first", [key(2), key(1)])
        store.add_job("second", [key(3)])
        store.set_job("second", job="provider-7", state="running")
    with Store(path) as store:
        assert list(store.jobs("new")) == [("first", None, [key(1), key(2)])]
        assert list(store.jobs("new", "running"))[1] == ("second", "provider-7", [key(3)])
        assert list(store.jobs("collected")) == []
