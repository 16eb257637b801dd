"""Files that users give: opened only if they are regular, and read within limits that hold before memory is taken.

A pipe waits for its writer, a device never ends, a line may have gigabytes, and gzip unfolds kilobytes to gigabytes.
Every reader of such a file opens it here, or calls `check` before a library does. Standard library only, and for
buckets storage/places.py.
"""

import codecs
import contextlib
import gzip
import io
import json
import os
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sbs_jax.storage import places

# Bytes of a file that is held whole; of a line, or an item of a JSON array (a record may hold a reply of 4 MiB twice).
# JSON can take 20 times as much memory.
LARGEST, LONGEST_LINE = 2**23, 10 * 2**20
# Packed data may unfold to so many times its size, beyond an allowance for small files; text does to 3 to 50 times.
_UNFOLDED, _ALLOWED = 200, 2**24
_HEAD = 2**16  # bytes from which the form of a file is told
_BOM = codecs.BOM_UTF8
_GZIP = b"\x1f\x8b"

_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
# Beginnings of forms that are not read as text, and what to do.
_FORMS = {
    b"\xff\xfe": ("UTF-16 text", "save it as UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "save it as UTF-8"),
    b"PK\x03\x04": ("a zip archive or a spreadsheet", "unpack it, or save it as CSV"),
    b"PAR1": ("Parquet", "give it the ending .parquet"),
    _GZIP: ("packed by gzip twice", "unpack it once"),
    b"BZh": ("packed by bzip2", "unpack it, or pack it with gzip"),
    b"\xfd7zXZ": ("packed by xz", "unpack it, or pack it with gzip"),
    b"\x28\xb5\x2f\xfd": ("packed by zstd", "unpack it, or pack it with gzip"),
    b"SQLite format 3": ("an SQLite database", "export its rows as JSON lines or CSV"),
}


def check(path: str | Path, *, most: int | None = None) -> os.stat_result:
    """Requires a regular file, of at most `most` bytes if given. ValueError, or OSError if there is none."""
    status = places.of(path).stat()
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "a device")
        raise ValueError(f"{path} is {kind}; expected a regular file.")
    if most is not None and status.st_size > most:
        raise ValueError(f"{path} has {status.st_size} bytes; expected at most {most} in a file of this kind.")
    return status


def check_unfolded(path: str | Path, *, packed: int, unfolded: int) -> None:
    """Refuses contents that unfold to far more bytes than their packed size explains."""
    if unfolded > _ALLOWED + _UNFOLDED * packed:
        raise ValueError(
            f"{path} unfolds {packed} bytes to more than {_ALLOWED + _UNFOLDED * packed}, which no text does. Unpack "
            "it yourself if you trust it."
        )


def opened(path: str | Path) -> io.BufferedReader:
    """Opens a regular file for reading bytes."""
    check(path)
    if places.in_bucket(path):
        return places.of(path).open("rb")
    file: Any = io.FileIO(path)
    return io.BufferedReader(file, _HEAD)


def whole(path: str | Path, *, most: int = LARGEST) -> bytes:
    """Reads a file of at most `most` bytes, unfolded if it is gzip, without a byte order mark."""
    with _stream(path) as (file, _):
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path} has more than {most} bytes; expected less in a file of this kind.")
    return data.removeprefix(_BOM)


def find(path: Path) -> Path:
    """Returns the path, or `<path>.gz` if only that exists."""
    packed = path.with_name(f"{path.name}.gz")
    return packed if packed.exists() and not path.exists() else path


@contextlib.contextmanager
def _stream(path: str | Path) -> Iterator[tuple[io.BufferedReader, io.BufferedReader]]:
    """Opens a file, unfolded if it is gzip: (its contents, the file itself)."""
    with opened(path) as file:
        if file.peek(2)[:2] != _GZIP:
            yield file, file
            return
        try:
            contents: Any = _Gzip(file, path)
            with io.BufferedReader(contents, _HEAD) as unfolded:
                yield unfolded, file
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a whole gzip file ({error}); get it again.") from None


class _Gzip(io.RawIOBase):
    """The contents of a gzip file; ValueError once they are far larger than the file."""

    def __init__(self, file: io.BufferedReader, path: str | Path) -> None:
        self._path, self._packed, self._unfolded = path, _length(file), 0
        self._file = gzip.GzipFile(fileobj=file)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read1(len(buffer))
        buffer[: len(data)] = data
        self._unfolded += len(data)
        check_unfolded(self._path, packed=self._packed, unfolded=self._unfolded)
        return len(data)


class TextFile:
    """A UTF-8 file of rows, possibly gzip, read one row at a time: `lines`, or `json_texts`.

    `done` of `total` bytes of the file have been read; `is_array` if it is one JSON array of rows. ValueError at once
    for a file of another form; without `as_json` any text will do.
    """

    def __init__(self, path: str | Path, *, longest: int = LONGEST_LINE, as_json: bool = True) -> None:
        self.path, self._longest = places.of(path), longest
        with _stream(path) as (file, beneath):
            head = file.peek(_HEAD)[:_HEAD].removeprefix(_BOM)
            self.total = _length(beneath)
        self._beneath: BinaryIO | None = None
        self.is_array = as_json and head.lstrip()[:1] == b"["
        problem = _problem(head, is_array=self.is_array, as_json=as_json)
        if problem is not None:
            raise ValueError(f"{path} {problem}.")

    @property
    def done(self) -> int:
        if self._beneath is None:
            return 0
        return self.total if self._beneath.closed else self._beneath.tell()

    def lines(self) -> Iterator[tuple[int, bytes | None]]:
        """Yields (number from 1, line); a line that is too long is None. Lines end at line feeds only."""
        most = self._longest
        with _stream(self.path) as (file, self._beneath):
            _skip_mark(file)
            number = 0
            while line := file.readline(most + 1):
                number += 1
                if len(line) <= most or line.endswith(b"\n"):
                    yield number, line
                    continue
                while (part := file.readline(most)) and not part.endswith(b"\n"):
                    pass
                yield number, None

    def json_texts(self) -> Iterator[tuple[int, bytes | None]]:
        """Yields `lines`, or (number from 1, text) of the items if the file is one JSON array of them."""
        return self._items() if self.is_array else self.lines()

    def _items(self) -> Iterator[tuple[int, bytes | None]]:
        with _stream(self.path) as (file, self._beneath):
            _skip_mark(file)
            text = _Window(file, self.path)
            number = 0
            text.expect("[")
            while text.next_character() != "]":
                if number:
                    text.expect(",")
                number += 1
                yield number, text.value(number, longest=self._longest).encode()
            text.expect("]")
            if text.next_character():
                raise ValueError(f"{self.path}: more follows the array; expected one array, or one object per line.")


class _Window:
    """The part of a JSON text that is being read."""

    def __init__(self, file: io.BufferedReader, path: Path) -> None:
        self._file, self._path = file, path
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at, self._read_bytes, self._ended = "", 0, 0, False

    def next_character(self) -> str:
        """Returns the next character that is not a space, "" at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]  # it always matches
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._read()

    def expect(self, character: str) -> None:
        got = self.next_character()
        if got != character:
            raise ValueError(
                f"{self._path}: not valid JSON: got {got or 'the end'!r} in the array; expected {character!r}. The "
                "file may be truncated or edited; get it again."
            )
        self._at += 1

    def value(self, number: int, *, longest: int) -> str:
        """Returns the text of the next value of at most `longest` characters; ValueError names it by its number."""
        self.next_character()
        while True:
            try:
                _, end = _VALUE.raw_decode(self._text, self._at)
                if end - self._at <= longest and (end < len(self._text) or self._ended):  # a number could go on
                    found, self._at = self._text[self._at : end], end
                    return found
                problem = "it has no end"
            except json.JSONDecodeError as error:
                problem = error.msg
            except (RecursionError, ValueError) as error:
                raise ValueError(f"{self._path}:{number}: unreadable JSON: {error}") from None
            if self._ended or len(self._text) - self._at > longest:
                raise ValueError(
                    f"{self._path}: not valid JSON: item {number}: {problem}, or it is longer than {longest} "
                    "characters. The file may be truncated or edited; get it again."
                )
            self._read(most=longest)

    def _read(self, *, most: int = 2**18) -> None:
        held = len(self._text) - self._at
        data = self._file.read(max(2**18, min(held, most - held)))  # a long value is tried few times
        self._ended, self._read_bytes = not data, self._read_bytes + len(data)
        try:
            self._text = self._text[self._at :] + self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            at = self._read_bytes - len(error.object) + error.start
            raise ValueError(
                f"{self._path}: byte {at} (0x{error.object[error.start]:02x}) is not UTF-8; convert the file to UTF-8."
            ) from None
        self._at = 0


_SPACE = re.compile(r"[ \t\r\n]*")
_VALUE = json.JSONDecoder()


def _length(file: io.BufferedReader) -> int:
    """Returns the bytes of a file on disk or in a bucket, and leaves its position."""
    at = file.tell()
    end = file.seek(0, io.SEEK_END)
    file.seek(at)
    return end


def _skip_mark(file: io.BufferedReader) -> None:
    if file.peek(len(_BOM))[: len(_BOM)] == _BOM:
        file.read(len(_BOM))


def _problem(head: bytes, *, is_array: bool, as_json: bool) -> str | None:
    """Names the form of a file that is not rows of text, and what to do."""
    for beginning, (form, remedy) in _FORMS.items():
        if head.startswith(beginning):
            return f"is {form}; {remedy}"
    if b"\0" in head[:4]:
        return "is UTF-16 text or no text; save it as UTF-8"
    if is_array:
        return None
    if b"\r" in head.rstrip(b"\r") and b"\n" not in head:
        return "has carriage returns alone at the ends of its lines; save it with line feeds"
    lines = [line.strip() for line in head.split(b"\n") if line.strip()]
    if not as_json or not lines:
        return None
    if lines[0] == b"{":
        return "has objects of several lines; write each on one line (jq -c), or all as one array"
    if not any(line.startswith(b"{") for line in lines):
        return f"begins with {lines[0][:60].decode(errors='replace')!r}; expected a JSON object, {{..}}, on every line"
    return None
