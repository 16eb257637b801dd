"""Background save of one checkpoint: its directory is renamed into place when all of it is on disk.

`checkpoints.py` decides which ones to keep, and reads them.
"""

import asyncio
import concurrent.futures
import contextlib
import gc
import json
import logging
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypedDict

import jax
import orbax.checkpoint as ocp
from etils import epath

from sbs_jax import hosts
from sbs_jax.storage import atomic, checksums, json_files, places
from sbs_jax.student import adapters, families

log = logging.getLogger(__name__)

PARAMETERS, OPTIMIZER, METADATA = "parameters", "optimizer", "metadata"
WRITING = ".writing"  # suffix of the directory's name until then
_STATUS = ".written"  # suffix of the file in which a process reports the end of its part
_WORTH_COLLECTING = 32_000_000  # bytes of a failed save; a garbage collection takes half a second
_SEEN_WITHIN = 60.0  # seconds in which a network file system shows a file to another host


class Save:
    """One save: it copies arrays to the host, writes them in threads, and puts the directory in place.

    Orbax's handlers write the arrays. Its checkpointers, which put directories in place, are not used: if one process
    fails, they leave the others in a barrier for ten minutes. Here every process writes a status file when its part is
    on disk, and process 0 finishes; it learns of the others' failures when all wait for the save.
    """

    def __init__(
        self, step: int, place: Path, *, handler: ocp.PyTreeCheckpointHandler, arrays: Any, metadata: dict[str, Any]
    ) -> None:
        self.step = step
        self._handler = handler
        self._metadata = metadata
        self._size = size(arrays)
        self._temporary, self._final = place, place.parent / str(step)  # the same in a bucket
        self._error: BaseException | None = None
        self._own_part_done = threading.Event()
        self._exchanged = threading.Event()  # every process knows of every failure
        self._futures: list[Any] = []
        try:
            for item, tree in arrays.items():
                copied = handler.async_save(epath.Path(str(self._temporary / item)), args=ocp.args.PyTreeSave(tree))
                self._futures += _run(copied) or []
        except Exception as error:
            self._error = _storage_error(error)
            if self._error is None:
                raise

    def start(self, then: Callable[[], None], failed: Callable[[str], None]) -> None:
        """Starts writing. Process 0 calls `then` when the checkpoint is on disk, or `failed` with the reason."""
        self._then, self._failed = then, failed
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._write, name=f"checkpoint of step {self.step}", daemon=True)
        self._thread.start()

    def wait(self) -> str | None:
        """Waits for the save; returns None if it is on disk, otherwise the reason; the same on every process."""
        self._own_part_done.wait()
        failures = hosts.from_all(None if self._error is None else checksums.reason(self._error))
        for index, failure in enumerate(failures):
            if failure is not None and self._error is None:
                self._error = OSError(f"process {index}: {failure}")
        self._exchanged.set()
        self._thread.join()
        if self._error is not None and not isinstance(self._error, OSError):
            raise self._error
        if self._error is not None:
            if hosts.is_first():
                remove(self._temporary)  # no process writes there any more
            if self._size > _WORTH_COLLECTING:
                gc.collect()
        return hosts.from_first(lambda: None if self._error is None else checksums.reason(self._error))

    def _write(self) -> None:
        for future in self._futures:  # also after an error: nothing may be writing when the directory is removed
            try:
                future.result()
            except Exception as error:
                self._error = self._error or _storage_error(error) or error
        self._futures = []
        try:
            if not hosts.is_first():
                self._write_status()
                return
            self._own_part_done.set()
            if self._error is None:
                self._complete()
        except Exception as error:
            self._error = self._error or _storage_error(error) or error
        finally:
            self._own_part_done.set()
        if self._error is None:
            self._then()
            return
        if not hosts.has_peers():
            remove(self._temporary)
        if isinstance(self._error, OSError):
            self._failed(checksums.reason(self._error))

    def _complete(self) -> None:
        """Waits for the others' parts and puts the directory in place."""
        known = self._wait_for_others()
        for item in (PARAMETERS, OPTIMIZER):
            if (self._temporary / item).is_dir():
                self._handler.finalize(epath.Path(str(self._temporary / item)))
        written = time.monotonic()
        total = complete(self._temporary, metadata=self._metadata, known=known)
        put_in_place(self._temporary, self._final)
        now = time.monotonic()
        log.info(
            "Checkpoint of step %d: %s on disk after %.2f s, %.2f s of them for checksums.",
            *(self.step, megabytes(total), now - self._began, now - written),
        )

    def _write_status(self) -> None:
        """Writes this process's status file: the checksums of what it wrote, or the reason why it could not."""
        status: dict[str, Any] = {"files": {}} if self._error is None else {"error": checksums.reason(self._error)}
        if self._error is None and not places.in_bucket(self._temporary):
            folders = [
                self._temporary / item / f"ocdbt.process_{jax.process_index()}" for item in (PARAMETERS, OPTIMIZER)
            ]
            files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
            names = [path.relative_to(self._temporary).as_posix() for path in files]
            status["files"] = checksums.entries(self._temporary, names)
        file = self._temporary / f"{jax.process_index()}{_STATUS}"
        file.write_text(f"{json.dumps(status)}\n", "utf-8")

    def _wait_for_others(self) -> dict[str, Any]:
        """Returns the checksums of what the others wrote."""
        found: dict[str, Any] = {}
        deadline = None
        missing = {index: self._temporary / f"{index}{_STATUS}" for index in range(1, jax.process_count())}
        while missing:
            for index, file in list(missing.items()):
                status = file.read_text("utf-8") if file.exists() else ""
                if not status.endswith("\n"):  # not all of it is visible yet
                    continue
                said = json.loads(status)
                if "error" in said:
                    raise OSError(f"process {index}: {said['error']}")
                found |= said["files"]
                file.unlink()
                del missing[index]
            if self._error is not None:
                raise self._error
            if self._exchanged.is_set() and deadline is None:
                deadline = time.monotonic() + _SEEN_WITHIN
            if deadline is not None and time.monotonic() > deadline:
                raise OSError(f"this process does not see the files of the others in {self._temporary}")
            if missing:
                time.sleep(0.5 if places.in_bucket(self._temporary) else 0.05)
        return found


def array_handler() -> ocp.PyTreeCheckpointHandler:
    # Compression would save 8 % of trained float32 arrays, for four times the work.
    return ocp.PyTreeCheckpointHandler(use_compression=False)


def restore(handler: ocp.PyTreeCheckpointHandler, directory: Path, *, like: Any) -> Any:
    arguments = ocp.checkpoint_utils.construct_restore_args(like)
    return handler.restore(epath.Path(str(directory)), args=ocp.args.PyTreeRestore(like, restore_args=arguments))


def staging(folder: Path, step: int, *, attempt: int) -> Path:
    """Returns where a step is written: a temporary name, or in a bucket, where nothing can be renamed, its own."""
    return folder / (str(step) if places.in_bucket(folder) else f"{step}.{attempt}{WRITING}")


def put_in_place(temporary: Path, final: Path) -> None:
    """Gives a complete step its name; in a bucket its checksums, written last, have made it one."""
    if temporary != final:
        temporary.rename(final)
        atomic.sync_directory(final.parent)


def complete(
    directory: Path, *, metadata: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]] | None = None
) -> int:
    """Adds metadata and checksums to a step whose arrays are written; returns its size in bytes.

    `known` are the checksums that other processes have of their files.
    """
    (directory / METADATA / "metadata").write_text(json.dumps(metadata), "utf-8")
    return checksums.write(directory, known=known)


def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Runs a coroutine in a new thread, because a notebook already runs an event loop in this one.

    Not `asyncio.run`: its cleanup looks at the tasks of other threads' loops, and Orbax has some.
    """

    def run() -> Any:
        loop = asyncio.new_event_loop()
        try:
            return loop.run_until_complete(coroutine)
        finally:
            loop.close()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def _storage_error(error: BaseException) -> OSError | None:
    """Converts a storage error to OSError, None for others.

    TensorStore raises ValueError: 'RESOURCE_EXHAUSTED: ..', and gcsfs, through which Orbax looks at a bucket, errors of
    its own.
    """
    if isinstance(error, OSError):
        # A new one, because the traceback of the old one holds the arrays.
        return OSError(error.errno, error.strerror, error.filename) if error.strerror else OSError(str(error))
    text = str(error)
    if code := re.search(r"os_error_code='(\d+)'", text):
        path = re.search(r'"(/[^"]*)"', text)
        return OSError(int(code[1]), os.strerror(int(code[1])), path[1] if path else None)
    if type(error).__module__.partition(".")[0] == "gcsfs":
        return OSError(text)
    return OSError(text) if isinstance(error, ValueError) and re.match(r"[A-Z_]{5,}: ", text) else None


def remove(path: Path) -> None:
    """Removes a directory as far as possible; unfinished writes may still add files to it."""
    if isinstance(path, places.BucketPath):
        with contextlib.suppress(OSError):
            path.remove_tree(first=checksums.FILE)  # without them the rest is no checkpoint
        return
    for _ in range(10):
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return
        time.sleep(0.05)


def size(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def free(path: Path) -> int | None:
    """Returns the free bytes at a path; None if its file system does not know, and of a bucket."""
    if places.in_bucket(path):
        return None
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return None
    return usage.free if usage.total else None


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


class _Base(TypedDict):
    path: str | None
    seed: int | None
    fingerprint: str


class _Metadata(TypedDict, total=False):
    step: int
    model: dict
    tuning: dict | None
    base: _Base | None
    skipped: int
    lines: int
    window: list
    evaluation_due: bool


def read_json(directory: Path) -> dict[str, Any]:
    """Reads the metadata of a step. ValueError for fields of another type than those that are written."""
    file = directory / METADATA / "metadata"
    value = json_files.read_json(file)
    try:
        json_files.typed(value, _Metadata, extra=True)
        if "model" in value:
            json_files.typed(value["model"], families.config_type(value["model"]))
        try:
            adapters.Tuning.of(value.get("tuning"))
        except (TypeError, KeyError):
            raise ValueError(f"the field 'tuning' is {json_files.brief(value['tuning'])}; expected a run's.") from None
    except ValueError as error:
        raise ValueError(f"{file}: {json_files.part(str(error))} Restore the checkpoint from a copy.") from None
    return value


# ------------------------------------------------------------------------------------ Orbax after a failed write
#
# If one array cannot be written, Orbax closes its event loop while others are being written. Those writes hold their
# arrays until garbage collection (`Save.wait`), and their log messages only repeat the error that is already raised.


def _of_abandoned_writes(text: str) -> bool:
    theirs = "orbax" in text or "ocdbt" in text
    return theirs and any(part in text for part in ("_SignalingThread.run() raised", "never retrieved", "pending"))


class _Abandoned(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        # Garbage collection may run inside the parser, and formatting a traceback would enter the parser again, which
        # fails on Python 3.11. So this looks at the traceback's files, not at its text.
        words = [record.getMessage(), record.pathname]
        _, error, place = record.exc_info or (None, None, None)
        words.append(str(error))
        while place is not None:
            words.append(place.tb_frame.f_code.co_filename)
            place = place.tb_next
        return record.levelno < logging.ERROR or not _of_abandoned_writes("\n".join(words))


def _quiet_hook(otherwise: Callable[[Any], Any]) -> Callable[[Any], None]:
    def hook(ignored: Any) -> None:
        code = getattr(ignored.object, "cr_code", None)
        closed = isinstance(ignored.exc_value, RuntimeError) and str(ignored.exc_value) == "Event loop is closed"
        if not closed and "orbax" not in getattr(code, "co_filename", ""):
            otherwise(ignored)

    return hook


for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_Abandoned())
sys.unraisablehook = _quiet_hook(sys.unraisablehook)
