"""The store: replies on disk, found again, opened by one run at a time."""

import asyncio
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sbs_jax.teacher.clients import Reply
from sbs_jax.teacher.store import Failure, Store


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


def test_a_second_process_is_refused(path):
    program = (
        "import sys\n"
        "from sbs_jax.teacher.store import Store\n"
        "try:\n"
        "    Store(sys.argv[1]).__enter__()\n"
        "except FileExistsError as error:\n"
        "    print(error)\n"
    )
    with Store(path):
        done = subprocess.run(
            [sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=60, check=True
        )
        assert "in use by another process" in done.stdout
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == ""


def test_a_file_of_another_kind_is_refused(path):
    path.write_text("not a database, but long enough to look like one " * 40)
    with pytest.raises(ValueError, match="not a store of replies"), Store(path):
        pass
    assert path.read_text().startswith("not a database")


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
