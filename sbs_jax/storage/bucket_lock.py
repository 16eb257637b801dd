"""Lock of a folder in a bucket, for one process at a time.

The lock's object names its holder in JSON, and its generation changes with every write. A process writes it only over
the generation that it has read, so of several one succeeds. Nobody releases the lock of a process that was killed: its
holder writes it again every 20 seconds, and one that nobody has written for 60 seconds is taken over. The earlier
holder, if it still runs, finds this before its next write (`check`).
"""

import dataclasses
import json
import logging
import threading
import time
from pathlib import Path

from sbs_jax.storage import lock, places

log = logging.getLogger(__name__)

RENEWED, STALE = 20.0, 60.0  # seconds


def lock_of(folder: Path, *, instead: str) -> "lock.Lock | BucketLock":
    """Returns the lock of a folder, `<folder>/lock`, on disk or in a bucket."""
    if isinstance(folder, places.BucketPath):
        return BucketLock(folder / "lock", of=folder, instead=instead)
    return lock.Lock(folder / "lock", of=folder, instead=instead)


class BucketLock:
    """Lock object at `path`, which guards `of`; used as lock.Lock is."""

    def __init__(self, path: places.BucketPath, *, of: places.BucketPath, instead: str | None = None) -> None:
        self.path, self._of = path, of
        self._instead = f", or choose {instead}" if instead else ""
        self.holder = lock.Holder.of_this_process()
        self._guard = threading.Lock()  # of the next three, which the renewing thread changes too
        self._generation = 0  # of our last write
        self._written = 0.0  # when, by this process's clock
        self._lost_to: str | None = None
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "BucketLock":
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def take(self) -> None:
        """Takes the lock. HeldError names the process that holds it; OSError if the object cannot be written.

        After a process that was killed on another host, or whose end cannot be seen, this takes 60 seconds.
        """
        before, generation = self._read()
        if before is not None and not before.has_ended():
            generation = self._wait_for_silence(before, generation)
        try:
            self._write(replaces=generation)
        except places.GenerationError:
            raise self._held(self._read()[0]) from None
        if before is not None:
            log.info("%s was left behind by %s; this process takes it.", self.path, before)
        self._thread = threading.Thread(target=self._renew, name=f"lock of {self._of}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises TakenOverError if another process has the lock; any other OSError means that this is unknown now."""
        with self._guard:
            if self._lost_to is None and time.monotonic() - self._written > RENEWED / 2:
                self._write_again()
            if self._lost_to is not None:
                raise lock.taken_over(self._lost_to, of=self._of, holder=self.holder, instead=self._instead)

    def release(self) -> None:
        """Releases the lock. The object stays, empty."""
        if self._thread is None:
            return
        self._released.set()
        self._thread.join()
        self._thread = None
        if self._lost_to is None:
            try:
                self.path.write_versioned(b"", replaces=self._generation)
            except OSError as error:
                log.info("%s still names this process: %s", self.path, error)  # the next one waits

    def _wait_for_silence(self, before: lock.Holder, generation: int) -> int:
        """Waits until the holder has not renewed the lock for too long; HeldError if it does."""
        log.info("%s belongs to %s. Waiting %g s: if it runs, it renews its lock.", self.path, before, STALE)
        end = time.monotonic() + STALE
        while time.monotonic() < end:
            time.sleep(min(1.0, STALE / 10))
            holder, now = self._read()
            if holder is None:
                return now  # released
            if now != generation:
                raise self._held(holder)
        return generation

    def _held(self, holder: lock.Holder | None) -> lock.HeldError:
        return lock.held(holder, of=self._of, instead=self._instead)

    def _read(self) -> tuple[lock.Holder | None, int]:
        try:
            data, generation = self.path.read_versioned()
        except FileNotFoundError:
            return None, 0
        return lock.Holder.parse(data), generation

    def _write(self, *, replaces: int) -> None:
        text = (json.dumps(dataclasses.asdict(self.holder)) + "\n").encode()
        try:
            self._generation = self.path.write_versioned(text, replaces=replaces)
        except places.GenerationError:
            holder, generation = self._read()
            if holder is None or holder.token != self.holder.token:
                raise
            self._generation = generation  # the answer to our write was lost, and its repetition was refused
        self._written = time.monotonic()

    def _write_again(self) -> None:
        """Renews the lock, or notes who has taken it over."""
        try:
            self._write(replaces=self._generation)
        except places.GenerationError:
            holder, generation = self._read()
            if holder is None and generation == 0:
                self._write(replaces=0)  # somebody removed the object
            else:
                self._lost_to = str(holder or "An unnamed process")

    def _renew(self) -> None:
        while not self._released.wait(RENEWED):
            try:
                with self._guard:
                    if self._lost_to is None:
                        self._write_again()
            except OSError as error:
                log.warning("The lock %s cannot be renewed now: %s", self.path, error)
