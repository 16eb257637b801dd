"""Pending writes of a run: contents that wait in memory while the disk cannot be written.

A failed write (disk full, read-only, no permission, I/O error) leaves the file unchanged, as far as the disk allows.
The next one writes all pending contents in order: nothing is lost, duplicated or truncated. An object in a bucket
cannot grow, so its contents are kept in memory and written again as a whole.
"""

import contextlib
import logging
import os
from pathlib import Path

from sbs_jax.storage import atomic, places

log = logging.getLogger(__name__)


class PendingWrites:
    """Pending contents of append-only files and of files that are replaced as a whole."""

    def __init__(self) -> None:
        self._pieces: dict[Path, list[bytes]] = {}
        self._ends: dict[Path, int] = {}  # length of each file's complete contents, in bytes
        self._clean: set[Path] = set()  # files with no remains of a failed write after that length
        self._replaced: dict[Path, bytes] = {}
        self._objects: dict[Path, bytes] = {}  # contents of followed objects in a bucket

    def follow(self, path: Path, *, end: int) -> None:
        """Starts appending to a file at byte `end`; the first write cuts off anything after it."""
        self._pieces[path], self._ends[path] = [], end
        if places.in_bucket(path):
            self._objects[path] = path.read_bytes()[:end] if end else b""

    def append(self, path: Path, piece: bytes) -> None:
        """Queues a piece for the end of a followed file."""
        self._pieces[path].append(piece)

    def replace(self, path: Path, contents: bytes) -> None:
        """Queues new contents of a file."""
        self._replaced.pop(path, None)
        self._replaced[path] = contents

    def waiting(self, path: Path) -> list[bytes]:
        """Returns the pieces of a followed file that are not on disk yet."""
        return list(self._pieces[path])

    def files(self) -> list[Path]:
        """Lists files with pending contents."""
        return [*(path for path, pieces in self._pieces.items() if pieces), *self._replaced]

    def write(self) -> dict[Path, OSError]:
        """Tries to write every file, in the order they were followed; returns the errors of those still pending."""
        failed: dict[Path, OSError] = {}
        for path in self.files():
            try:
                path.parent.mkdir(exist_ok=True)
                if path in self._replaced:
                    atomic.replace(path, self._replaced[path])
                    del self._replaced[path]
                else:
                    self._append(path, b"".join(self._pieces[path]))
                    self._pieces[path].clear()
            except OSError as error:
                failed[path] = error
        return failed

    def _append(self, path: Path, data: bytes) -> None:
        """Appends to the file; on disk when this returns. After an error the file has its old length."""
        if path in self._objects:
            path.write_bytes(self._objects[path] + data)
            self._objects[path] += data
            return
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._find_end(path, descriptor)
            self._clean.discard(path)
            atomic.write_all(descriptor, data, offset=self._ends[path])
            os.fsync(descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, self._ends[path])
            raise
        finally:
            os.close(descriptor)
        self._ends[path] += len(data)
        self._clean.add(path)

    def _find_end(self, path: Path, descriptor: int) -> None:
        size, end = os.fstat(descriptor).st_size, self._ends[path]
        if path not in self._clean and size > end:
            os.ftruncate(descriptor, end)
        elif size != end:
            log.warning(
                "%s was changed by another program: this run left it at %d bytes, and it has %d. The run continues it.",
                *(path, end, size),
            )
            self._ends[path] = size
