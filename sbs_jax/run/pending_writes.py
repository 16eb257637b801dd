"""Files of a run whose contents wait in memory while the disk takes nothing.

A write that fails (disk full, read-only, no permission, I/O error) leaves the file as it was before, as far as the disk
lets it. The next one writes everything that waits, in order: nothing is lost, doubled or cut short.
"""

import contextlib
import logging
import os
from pathlib import Path

from sbs_jax.storage import atomic

log = logging.getLogger(__name__)


class PendingWrites:
    """Contents on their way to files that grow by whole pieces, and to files that are replaced as a whole."""

    def __init__(self) -> None:
        self._pieces: dict[Path, list[bytes]] = {}
        self._ends: dict[Path, int] = {}  # bytes of each file that are whole, from its start
        self._clean: set[Path] = set()  # files without remains of a failed write behind their end
        self._replaced: dict[Path, bytes] = {}

    def follow(self, path: Path, *, end: int) -> None:
        """Begins to append to a file whose first `end` bytes are whole; the first write cuts off what follows them."""
        self._pieces[path], self._ends[path] = [], end

    def append(self, path: Path, piece: bytes) -> None:
        """Adds a piece to a followed file, at the next `write`."""
        self._pieces[path].append(piece)

    def replace(self, path: Path, contents: bytes) -> None:
        """Gives a file new contents, at the next `write`."""
        self._replaced.pop(path, None)
        self._replaced[path] = contents

    def waiting(self, path: Path) -> list[bytes]:
        """Returns the pieces of a followed file that are not on disk yet."""
        return list(self._pieces[path])

    def files(self) -> list[Path]:
        """Lists files that are not as they should be."""
        return [*(path for path, pieces in self._pieces.items() if pieces), *self._replaced]

    def write(self) -> dict[Path, OSError]:
        """Tries every file, in the order they were followed; returns the reason for each that still waits."""
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
        """Writes behind the file's end; on disk when this returns, and on an error the file ends where it did."""
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
