"""Files of a run whose contents wait in memory while the disk takes nothing.

A write that fails (disk full, read-only, no permission, I/O error) leaves the file as it was before, as far as the disk
lets it, and the next one writes everything that waits, in order: nothing is lost, doubled or cut short.
"""

import contextlib
import logging
import os
from pathlib import Path

from sbs_jax.storage.atomic import replace, write_all

log = logging.getLogger(__name__)


class Appended:
    """A file that grows by whole pieces.

    `end` is the number of its bytes that are whole, from the start; what is behind them is cut off at the first write.
    """

    def __init__(self, path: Path, *, end: int) -> None:
        self.path = path
        self._end = end
        self._torn = True  # there may be remains of a failed write behind `end`
        self._waiting: list[bytes] = []

    @property
    def waiting(self) -> list[bytes]:
        """Pieces that are not on disk yet."""
        return list(self._waiting)

    def add(self, piece: bytes) -> None:
        """To be written by the next `write`."""
        self._waiting.append(piece)

    def write(self) -> None:
        """Everything that waits, on disk when this returns; OSError where it cannot be, and it goes on waiting."""
        if not self._waiting:
            return
        data = b"".join(self._waiting)
        self.path.parent.mkdir(exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._find_end(descriptor)
            self._torn = True
            write_all(descriptor, data, offset=self._end)
            os.fsync(descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, self._end)
            raise
        finally:
            os.close(descriptor)
        self._end += len(data)
        self._torn = False
        self._waiting.clear()

    def _find_end(self, descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        if self._torn and size > self._end:
            os.ftruncate(descriptor, self._end)
        elif size != self._end:
            log.warning(
                "%s was changed by somebody else: this run left it at %d bytes, and it has %d. It is continued as it "
                "is.",
                self.path,
                self._end,
                size,
            )
            self._end = size


class Outbox:
    """All files of a run that wait for the disk."""

    def __init__(self) -> None:
        self._appended: list[Appended] = []
        self._replaced: dict[Path, bytes] = {}

    def follow(self, file: Appended) -> None:
        """Writes this file too, those that came earlier first."""
        self._appended.append(file)

    def replace(self, path: Path, contents: bytes) -> None:
        """To be written to `path` in one piece; later contents for the same path take the place of earlier ones."""
        self._replaced.pop(path, None)
        self._replaced[path] = contents

    def write(self) -> dict[Path, OSError]:
        """Tries every file; the reason for each that still waits."""
        failed: dict[Path, OSError] = {}
        for file in self._appended:
            try:
                file.write()
            except OSError as error:
                failed[file.path] = error
        for path, contents in list(self._replaced.items()):
            try:
                path.parent.mkdir(exist_ok=True)
                replace(path, contents)
                del self._replaced[path]
            except OSError as error:
                failed[path] = error
        return failed

    def waiting(self) -> list[Path]:
        """The files that are not as they should be."""
        return [*(file.path for file in self._appended if file.waiting), *self._replaced]
