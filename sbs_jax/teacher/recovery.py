"""Recovery of a damaged store: its rows are read page by page, without SQLite, which stops at the first damage.

The sqlite3 program's `.recover` does the same, but not everywhere: that of Debian 12 fails ("SQL logic error").
Forms are those of https://www.sqlite.org/fileformat2.html. Pages come from the file and from its write-ahead log
(`-wal`), whose checksums run on from frame to frame; SQLite uses the frames before damage and says nothing of the rest.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import sqlite3
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sbs_jax.storage import atomic

_MAGIC = {0x377F0682: "<", 0x377F0683: ">"}  # byte order of the log's checksummed words
_LOG_HEAD, _FRAME_HEAD = 32, 24
_PAGE = 4096  # SQLite's default, where the file's own head is damaged
# Bytes before the row in a cell of the two kinds of pages of a table WITHOUT ROWID: leaves, and those above them.
_CHILD = {b"\x0a": 0, b"\x02": 4}
_KEY = 32  # bytes of a request's key
_MOST_COLUMNS = 7
# Tables by the types of their columns: key, text, integer, real, NULL. A whole number is stored as an integer.
_TABLES = {"kttt[in][in][ri]": "replies", "ktt[ri]": "failures", "t[tn]t[ri]": "jobs", "tk": "job_keys"}


def save(path: Path, into: Path, *, schema: str) -> int:
    """Writes every row of a store that can be read into a new one, unless it exists; returns its number of replies."""
    if not into.exists():
        temporary = into.with_name(f"{into.name}.tmp")
        temporary.unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(temporary, isolation_level=None)) as made:
            made.execute("PRAGMA journal_mode=OFF")
            made.executescript(f"BEGIN; {schema}")
            for table, row in _rows(path):  # the newest first
                made.execute(f"INSERT OR IGNORE INTO {table} VALUES ({','.join('?' * len(row))})", row)
            made.execute("COMMIT")
        temporary.replace(into)
        atomic.sync_directory(into.parent)
    with contextlib.closing(sqlite3.connect(into)) as made:
        return made.execute("SELECT count(*) FROM replies").fetchone()[0]


def log_is_damaged(log: Path) -> bool:
    """Returns whether commits stand behind damage in a write-ahead log. A last commit that a kill cut short is none."""
    head, *frames = _frames(log)
    order, salts = _MAGIC.get(int.from_bytes(head[:4], "big"), "<"), head[16:24]
    sums = _checksum(head[:24], order, (0, 0))
    whole = struct.pack(">2I", *sums) == head[24:]
    if not whole and frames:
        salts = frames[0][8:16]
    for frame in frames:
        if whole:
            sums = _checksum(frame[:8] + frame[_FRAME_HEAD:], order, sums)
            whole = frame[8:16] == salts and struct.pack(">2I", *sums) == frame[16:24]
        elif frame[8:16] == salts and frame[4:8] != bytes(4):  # the size after a commit; behind those in use are others
            return True
    return False


def _frames(log: Path) -> list[bytes]:
    """Returns the log's head and its frames."""
    data = log.read_bytes() if log.exists() else b""
    page = _page_size(int.from_bytes(data[8:12], "big"))
    size = _FRAME_HEAD + page
    starts = range(_LOG_HEAD, len(data) - size + 1, size)
    return [data[:_LOG_HEAD], *(data[start : start + size] for start in starts)]


def _page_size(claimed: int) -> int:
    size = 65_536 if claimed == 1 else claimed
    return size if 512 <= size <= 65_536 and size & (size - 1) == 0 else _PAGE


def _checksum(data: bytes, order: str, sums: tuple[int, int]) -> tuple[int, int]:
    first, second = sums
    for even, odd in struct.iter_unpack(f"{order}2I", data[: len(data) // 8 * 8]):
        first = (first + even + second) & 0xFFFFFFFF
        second = (second + odd + first) & 0xFFFFFFFF
    return first, second


def _rows(path: Path) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yields (table, row) of every page of the log, the last first, then of the file."""
    frames = _frames(Path(f"{path}-wal"))[1:]
    newest = {int.from_bytes(frame[:4], "big"): frame[_FRAME_HEAD:] for frame in frames}
    with path.open("rb") as file:
        size = _page_size(int.from_bytes(file.read(18)[16:], "big"))
        count = -(-path.stat().st_size // size)

        def stored(number: int) -> bytes:
            file.seek((number - 1) * size)
            return file.read(size)

        images = (frame[_FRAME_HEAD:] for frame in reversed(frames))
        for data in itertools.chain(images, map(stored, range(1, count + 1))):
            yield from _of_page(data, lambda number: newest.get(number) or stored(number), size=size)


def _of_page(data: bytes, page: Callable[[int], bytes], *, size: int) -> Iterator[tuple[str, tuple[Any, ...]]]:
    kind = data[:1]
    if kind not in _CHILD:
        return
    first = 8 + _CHILD[kind]
    claimed = first + 2 * int.from_bytes(data[3:5], "big")
    for pointer in range(first, min(claimed, len(data)), 2):
        start = int.from_bytes(data[pointer : pointer + 2], "big") + _CHILD[kind]
        with contextlib.suppress(IndexError, struct.error, UnicodeDecodeError):  # a damaged cell
            found = _row(data, start, page, size=size)
            if found is not None:
                yield found


def _row(data: bytes, start: int, page: Callable[[int], bytes], *, size: int) -> tuple[str, tuple[Any, ...]] | None:
    """Reads the row at a place of a page; None if it is of no table of a store."""
    length, at = _varint(data, start)
    end, place = _varint(data, at)
    end += at
    kinds = []
    while place < end:
        kind, place = _varint(data, place)
        kinds.append(kind)
        if len(kinds) > _MOST_COLUMNS:  # or every damaged cell would be read to the end of its page
            return None
    shape = "".join(map(_letter, kinds))
    table = next((table for pattern, table in _TABLES.items() if re.fullmatch(pattern, shape)), None)
    if table is None or length != end - at + sum(map(_width, kinds)):
        return None
    row = _payload(data, at, length, page, size=size)[end - at :]
    values = []
    for kind, letter in zip(kinds, shape, strict=True):
        part, row = row[: _width(kind)], row[_width(kind) :]
        values.append(_value(kind, part, letter))
    return table, tuple(values)


def _payload(data: bytes, at: int, length: int, page: Callable[[int], bytes], *, size: int) -> bytes:
    """Returns a row's bytes: those in its cell, then those of its overflow pages."""
    most, least = (size - 12) * 64 // 255 - 23, (size - 12) * 32 // 255 - 23
    local = least + (length - least) % (size - 4)
    local = length if length <= most else local if local <= most else least
    parts, left = [data[at : at + local]], length - local
    number, seen = int.from_bytes(data[at + local : at + local + 4], "big"), {0}
    while left:
        image = page(number) if number not in seen else b""
        seen.add(number)
        number, part = int.from_bytes(image[:4], "big"), image[4 : 4 + left]
        if not part:
            raise IndexError("The chain of overflow pages ends too early, or in itself.")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Returns a number of SQLite's variable length, and the place behind it."""
    number = 0
    for place in range(at, at + 8):
        number = number << 7 | data[place] & 0x7F
        if data[place] < 0x80:
            return number, place + 1
    return number << 8 | data[at + 8], at + 9


def _letter(kind: int) -> str:
    if kind == 12 + 2 * _KEY:
        return "k"
    if kind >= 13:
        return "t" if kind % 2 else "?"
    return "n" if kind == 0 else "r" if kind == 7 else "i" if kind not in (10, 11, 12) else "?"


def _width(kind: int) -> int:
    return (kind - 12) // 2 if kind >= 12 else (0, 1, 2, 3, 4, 6, 8, 8, 0, 0, 0, 0)[kind]


def _value(kind: int, part: bytes, letter: str) -> Any:
    if letter == "k":
        return part
    if letter == "t":
        return part.decode()
    if letter == "r":
        return struct.unpack(">d", part)[0]
    if letter == "n":
        return None
    return kind - 8 if kind in (8, 9) else int.from_bytes(part, "big", signed=True)
