"""Lock of a file or a folder for one process at a time.

The lock file is held with flock, which the kernel releases however the process ends (kill -9 included), and names its
holder in JSON. On some network file systems flock does not exclude other hosts, or does not exist. There the
latest process owns the file, and the earlier one finds another token in it before its next write (`check`).
"""

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import time
from pathlib import Path

log = logging.getLogger(__name__)

_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_TRIES = 10  # then takes the file as it is: some file systems report a new inode number on every stat
_WRITTEN_WITHIN = 0.2  # seconds in which a new holder writes its name into the file


class HeldError(OSError):
    """Another process holds the lock."""


class TakenOverError(OSError):
    """Another process has taken over a lock that was ours."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that holds, or held, a lock; `since` is its host's wall-clock time, for display.

    `boot` names the start of its host's system: a process id means something on that host until its next start.
    """

    token: str
    host: str
    pid: int
    since: str
    boot: str = ""

    @classmethod
    def of_this_process(cls) -> "Holder":
        """Returns a holder with a new token."""
        return cls(
            token=secrets.token_hex(16),
            host=socket.gethostname(),
            pid=os.getpid(),
            since=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            boot=_boot(),
        )

    @classmethod
    def parse(cls, data: bytes) -> "Holder | None":
        """Reads a lock's contents; None if they are empty or unreadable."""
        try:
            found = json.loads(data)
            names = {name: str(found[name]) for name in ("token", "host", "since")}
            return cls(**names, pid=int(found["pid"]), boot=str(found.get("boot", "")))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def has_ended(self) -> bool:
        """Returns True if it ran on this host, since its last start, and runs no more."""
        if not self.boot or (self.host, self.boot) != (socket.gethostname(), _boot()):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass
        return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since})"


def held(holder: Holder | None, *, of: Path, instead: str) -> HeldError:
    """Returns the error of a process that finds the lock with another; `instead` ends the advice."""
    return HeldError(
        f"{of} is in use: {holder or 'an unnamed process'} writes to it. Wait until it ends or end it{instead}."
    )


def taken_over(by: str, *, of: Path, holder: Holder, instead: str) -> TakenOverError:
    """Returns the error of a process whose lock another one has taken; `instead` ends the advice."""
    return TakenOverError(
        f"{by} took over {of}, so this one, {holder}, stops writing. Two processes cannot write there at once: let one "
        f"end first{instead}."
    )


class Lock:
    """Lock file at `path`, which guards `of`: `take`, then `check` before every write, then `release`; or `with`.

    `of` has to be `places.real`, so that one thing has one lock under all its names. `instead` ends the errors' advice,
    such as "another MODEL_DIR".
    """

    def __init__(self, path: Path, *, of: Path, instead: str | None = None) -> None:
        self.path, self._of = path, of
        self._instead = f", or choose {instead}" if instead else ""
        self.holder = Holder.of_this_process()
        self._descriptor: int | None = None

    def __enter__(self) -> "Lock":
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def take(self) -> None:
        """Takes the lock. HeldError names the process that holds it; OSError if the file cannot be written."""
        for tries_left in reversed(range(_TRIES)):
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                self._flock(descriptor)
                if tries_left and not self._is_at_path(descriptor):  # it was removed between the two calls
                    os.close(descriptor)
                    continue
                before = os.pread(descriptor, 4096, 0)
                self._sign(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            self._descriptor = descriptor
            if before:
                self._log_previous(Holder.parse(before))
            return

    def check(self) -> None:
        """Raises TakenOverError if the file is no longer ours; any other OSError means that it cannot be read now."""
        try:
            holder = read(self.path)
        except FileNotFoundError:
            self._take_again()
            return
        if holder is None or holder.token != self.holder.token:
            by = str(holder or "An unnamed process")
            raise taken_over(by, of=self._of, holder=self.holder, instead=self._instead)

    def release(self) -> None:
        """Releases the lock. The file stays, empty: a missing file means that somebody removed it."""
        if self._descriptor is None:
            return
        try:
            holder = read(self.path)
            if holder is not None and holder.token == self.holder.token:
                os.ftruncate(self._descriptor, 0)
        except OSError:
            pass  # the file still names this process; the next one sees that it has ended
        os.close(self._descriptor)
        self._descriptor = None

    def _flock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_WRITTEN_WITHIN)
            holder = Holder.parse(os.pread(descriptor, 4096, 0))
            raise held(holder, of=self._of, instead=self._instead) from None
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            log.warning(
                "The file system of %s has no locks (%s). A second process would not be refused: it would take over, "
                "and this one would stop.",
                self._of,
                error.strerror,
            )

    def _sign(self, descriptor: int) -> None:
        text = (json.dumps(dataclasses.asdict(self.holder)) + "\n").encode()
        try:
            if os.pwrite(descriptor, text, 0) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.ftruncate(descriptor, len(text))
            os.fsync(descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                self.path.unlink()  # without our token it would look like another process's
            raise

    def _is_at_path(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self.path.stat())
        except FileNotFoundError:
            return False

    def _take_again(self) -> None:
        """Takes the lock again after somebody removed its file; TakenOverError if another process took it first."""
        before, self._descriptor = self._descriptor, None
        try:
            self.take()
        except HeldError as error:
            raise TakenOverError(f"The lock of this process was removed, and now {error}") from None
        finally:
            if self._descriptor is None:
                self._descriptor = before
            elif before is not None:
                os.close(before)

    def _log_previous(self, holder: Holder | None) -> None:
        if holder is None:
            log.info("%s was left behind by an unnamed process; this process takes it.", self.path)
        elif holder.host == self.holder.host:
            log.info("%s was left behind by %s, which has ended.", self.path, holder)
        else:
            log.warning(
                "%s was not released by %s. If that process still runs, it stops before its next write.",
                self.path,
                holder,
            )


def read(path: Path) -> Holder | None:
    """Returns the holder that the file names; None if it is empty or unreadable."""
    return Holder.parse(path.read_bytes())


def _boot() -> str:
    """Names this start of the system; "" where it has no name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except (OSError, ValueError):
        return ""
