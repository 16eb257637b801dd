"""Directory of one run: configuration, manifest, metrics, trackers, predictions.

config.gin            operative configuration; a different one is refused
manifest.json         data hashes, settings, parameter table, every start with its versions (manifest.py)
metrics.jsonl         one JSON object a line: {"kind": "train", "step": 50, "loss": ..}
tensorboard/          the same for TensorBoard
trackers/             ids of the run at other trackers, if it has any (trackers.py)
predictions/          <task>-<step>.jsonl
dataset/              rows, of a run by sbs_jax.distill (api.py)
checkpoints/<step>/   see checkpoints.py
lock                  the process that is writing here, if any (storage/lock.py)

All processes call the same methods; the first one writes.
"""

import contextlib
import datetime
import itertools
import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sbs_jax import hosts
from sbs_jax.checks import nearest
from sbs_jax.run import manifest, pending_writes, trackers
from sbs_jax.storage import atomic, bucket_lock, checksums, json_files, lock, places, user_files

MANIFEST = manifest.NAME
read_manifest = manifest.read

_SEEN_WITHIN = 15.0  # seconds in which a network file system shows a new file to another host
_ATTEMPTS = 60.0  # seconds between attempts to write into a bucket that is out of reach
_SHOWN = 60  # lines of a difference in an error
# Parts of a run's wall time in metrics, `seconds/<part>`. `steps` are those that lasted; `lost` is what came after the
# checkpoint that a process resumed from: steps that are repeated, and the wait for a machine.
TIME_PARTS = ("steps", "start", "compiling", "data", "evaluation", "saving", "lost")
ROWS = "dataset"  # folder of the rows that `sbs_jax.distill` was given
# What a process killed early in its start leaves behind, and what is there before a start.
_REMAINS = {"lock", "config.gin.tmp", f"{MANIFEST}.tmp", ROWS}

log = logging.getLogger(__name__)


class RunDir:
    """A run directory, open for writing (made if missing); use it with `with`.

    Entering takes the lock: lock.HeldError if another process writes there. Call `begin` next, before any computation.
    After that, disk errors do not raise: unwritten contents wait in memory for the next call, and at the end `flush`
    names the incomplete files. lock.TakenOverError if another process has taken the directory over.
    """

    def __init__(
        self, path: str | Path, *, config_text: str, tracker_names: Sequence[str] = (trackers.TENSORBOARD,)
    ) -> None:
        """Checks that the trackers' packages are installed (ModuleNotFoundError); touches no file."""
        trackers.check_installed(tracker_names)
        self.path = places.of(path).absolute()
        self._tracker_names = tracker_names
        self._trackers: list[trackers.Tracker] | None = None  # opened by the first line
        self._settings: dict[str, Any] = {}
        self._config_text = config_text
        self._lock = bucket_lock.lock_of(self.path, instead="another MODEL_DIR")
        self._pending = pending_writes.PendingWrites()
        self._failing = False  # during an outage of the disk that was logged
        self._failed: dict[Path, OSError] = {}  # by the last attempt
        self._next_attempt = 0.0  # monotonic; a bucket out of reach is tried for seconds each time
        self._given_up: lock.TakenOverError | None = None  # set when another process writes here
        self._count = 0

    def __enter__(self) -> "RunDir":
        opened = hosts.from_first(self._open)
        if not hosts.is_first():
            self._refuse_another_folder(opened["token"])
        self._count = opened["lines"]
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if hosts.is_first():
            for tracker in self._trackers or ():
                tracker.close(finished=kind is None)
            with contextlib.suppress(lock.TakenOverError):
                self._write(now=True)
            self._lock.release()

    @property
    def lines(self) -> int:
        """Number of metrics lines so far, on disk or waiting; the same on every process."""
        return self._count

    def begin(self, contents: Mapping[str, Any], *, step: int, accept_changes: bool) -> None:
        """Writes config.gin and the manifest (`contents`, versions, host). The run continues at `step`.

        FileExistsError, with a diff, if the run exists and anything that decides its numbers has changed;
        `accept_changes` allows it and writes the diff into the manifest.
        """
        hosts.from_first(lambda: self._begin(contents, step=step, accept_changes=accept_changes))

    def check(self) -> None:
        """Raises lock.TakenOverError if another process has taken this directory over. Call it before writing here."""
        if hosts.is_first():
            try:
                self._check()
            except lock.TakenOverError:
                raise
            except OSError:
                pass  # unknown while the disk fails

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Writes one line of metrics.jsonl, which is on disk or waiting on return, and hands it to the trackers."""
        self._count += 1
        if not hosts.is_first():
            return
        self._pending.append(self._metrics, (json.dumps({"kind": kind, "step": step, **values}) + "\n").encode())
        if self._trackers is None:
            self._trackers = trackers.opened(self._tracker_names, self.path, self._pending, settings=self._settings)
        for tracker in self._trackers:
            tracker.log(kind, step, values)
        self._write()

    def metrics(self) -> list[dict[str, Any]]:
        """Returns all metrics lines so far, on every process."""

        def all_lines() -> list[dict[str, Any]]:
            return read_metrics(self.path) + [json.loads(line) for line in self._pending.waiting(self._metrics)]

        return hosts.from_first(all_lines)

    def truncate_metrics(self, *, lines: int, step: int | None = None) -> None:
        """Drops the lines that a run resumed at `step` will repeat: keeps the first `lines`, byte for byte.

        ValueError if a kept line is damaged; a warning if there are fewer. If earlier lines were removed, fewer than
        `lines` are kept: those up to `step`.
        """
        self._count = hosts.from_first(lambda: self._truncate(lines, step))

    def write_predictions(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes `predictions/<name>.jsonl`."""
        if not hosts.is_first():
            return
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self._pending.replace(self.path / "predictions" / f"{name}.jsonl", text.encode("utf-8", "backslashreplace"))
        self._write()

    def note_end(self, facts: Mapping[str, Any]) -> None:
        """Writes into the manifest as "ended" where the training ended ("step") and why."""
        if not hosts.is_first():
            return
        contents = {**manifest.read(self.path), "ended": dict(facts)}
        self._pending.replace(self.path / MANIFEST, manifest.encoded(contents))
        self._write()

    def flush(self) -> None:
        """Writes all waiting contents; OSError names the incomplete files and the reasons."""
        if not hosts.is_first():
            return
        failed = self._write(now=True)
        if failed:
            missing = [f"  {path}: {_reason(error)}" for path, error in failed.items()]
            lines = [line.decode().rstrip() for line in self._pending.waiting(self._metrics)]
            if lines:
                missing += ["Append these lines to metrics.jsonl:", *lines]
            raise OSError(
                "These files of the run are not complete, because they could not be written:\n" + "\n".join(missing)
            )

    # ------------------------------------------------------------------ on process 0

    def _open(self) -> dict[str, Any]:
        with _explaining_disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._refuse_other_contents()
            self._lock.take()
        try:
            with _explaining_disk_errors(self.path):
                if not (self.path / "config.gin").exists():
                    atomic.replace(self.path / "config.gin", self._config_text.encode())
                lines = self._follow_files()
        except BaseException:
            self._lock.release()
            raise
        return {"token": self._lock.holder.token, "lines": lines}

    def _follow_files(self) -> int:
        """Finds the ends of the growing files; returns the number of complete metrics lines."""
        self._metrics = self.path / "metrics.jsonl"
        whole = _whole_lines(self._metrics)
        self._pending = pending_writes.PendingWrites()
        self._pending.follow(self._metrics, end=sum(map(len, whole)))
        return len(whole)

    def _refuse_other_contents(self) -> None:
        held = {path.name for path in self.path.iterdir()}
        if "config.gin" not in held and held - _REMAINS:
            raise FileExistsError(
                f"{self.path} is not empty and not a run directory (it has {', '.join(sorted(held - _REMAINS)[:5])}); "
                "choose another MODEL_DIR."
            )

    def _begin(self, contents: Mapping[str, Any], *, step: int, accept_changes: bool) -> None:
        self._check()
        config = self.path / "config.gin"
        new = json.loads(json.dumps(contents))
        old, damage = self._manifest_before(step=step, accept_changes=accept_changes)
        changed, notes = manifest.changes(
            old, new, old_config=user_files.whole(config).decode("utf-8", "replace"), new_config=self._config_text
        )
        changed = damage + changed
        if changed and not accept_changes:
            self._refuse_changes(changed, notes)
        here = {"git_revision": manifest.git_revision(), "versions": dict(manifest.versions())}
        new |= here
        here |= {name: new[name] for name in ("mesh", "devices") if name in new}
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        start = {"step": step, "host": self._lock.holder.host, "time": now, **here}
        accepted = list((old or {}).get("accepted_changes", []))
        if changed:
            log.warning("Resuming with changes:\n%s", "\n".join(changed))
            accepted.append({"step": step, "time": now, "diff": changed})
        new |= {"accepted_changes": accepted, "starts": [*(old or {}).get("starts", []), start]}
        new[manifest.CHECKPOINTED] = step > 0 or (old or {}).get(manifest.CHECKPOINTED, False)
        if old is not None and old.get("ended", {}).get("step") == step:
            new["ended"] = old["ended"]  # nothing is trained
        if old is not None and (other := manifest.allowed_changes(old, new)):
            log.info("Changed since the last start: %s.", "; ".join(other))
        self._settings = manifest.flat(new.get("settings", {}))
        with _explaining_disk_errors(self.path):
            # In this order: config.gin marks the directory as a run's.
            atomic.replace(config, self._config_text.encode())
            manifest.write(self.path, new)

    def _manifest_before(self, *, step: int, accept_changes: bool) -> tuple[dict[str, Any] | None, list[str]]:
        """Returns the previous manifest, None in a new run; and, with `accept_changes`, why it cannot be read."""
        if not (self.path / MANIFEST).exists():
            if step == 0:
                return None, []
            damage = f"{self.path / MANIFEST} is missing, although there are checkpoints up to step {step}"
            if not accept_changes:
                raise FileNotFoundError(
                    f"{damage}, so data and settings cannot be compared. Restore it from a copy, or resume without the "
                    "comparison: --accept_changes."
                )
            return None, [damage]
        try:
            return manifest.read(self.path), []
        except ValueError as error:
            if not accept_changes:
                raise
            return None, [str(error)]

    def _refuse_changes(self, changed: list[str], notes: list[str]) -> None:
        more = [f"({len(changed) - _SHOWN} more lines)"] if len(changed) > _SHOWN else []
        raise FileExistsError(
            f"{self.path} holds a run with another configuration, other data or other defaults of the code:\n"
            + "\n".join([*changed[:_SHOWN], *more, *notes])
            + "\nRepeat the existing configuration with the same data to resume, choose another MODEL_DIR, or accept "
            f"the changes with --accept_changes, which writes them into {MANIFEST}."
        )

    def _truncate(self, lines: int, step: int | None) -> int:
        self._check()
        path = self.path / "metrics.jsonl"
        whole = _whole_lines(path)
        parsed = [_parse(line, path=path, number=number) for number, line in enumerate(whole[:lines], start=1)]
        if step is not None:
            parsed = list(itertools.takewhile(lambda line: line["kind"] != "test" and line["step"] <= step, parsed))
        kept = whole[: len(parsed)]
        if len(kept) < lines:
            last = f"the last is of step {parsed[-1]['step']}" if parsed else "there is none"
            log.warning(
                "%s has %d lines, but the checkpoint was saved after %d (%s). The missing lines were never written, or "
                "were removed; the run continues without them.",
                *(path, len(kept), lines, last),
            )
        size = sum(map(len, kept))
        if path.exists() and path.stat().st_size != size:
            with _explaining_disk_errors(self.path):
                if places.in_bucket(path):
                    path.write_bytes(b"".join(kept))
                else:
                    with path.open("r+b") as file:
                        file.truncate(size)
        return self._follow_files()

    def _check(self) -> None:
        if self._given_up is None:
            try:
                self._lock.check()
            except lock.TakenOverError as error:
                self._given_up = error
        if self._given_up is not None:  # for good: the other process may have written, even if it has left
            raise self._given_up

    def _write(self, *, now: bool = False) -> dict[Path, OSError]:
        """Tries to write the waiting contents; logs the start and the end of an outage once each.

        During an outage of a bucket, one attempt in a minute; always `now`.
        """
        if self._failing and not now and time.monotonic() < self._next_attempt:
            return self._failed
        try:
            self._check()
            failed = self._pending.write()
        except lock.TakenOverError:
            raise
        except OSError as error:  # even the lock cannot be read
            failed = dict.fromkeys(self._pending.files(), error)
        if failed and not self._failing:
            path, error = next(iter(failed.items()))
            log.warning(
                "Cannot write %s: %s. Its contents wait in memory until a later write succeeds; training continues.",
                path,
                _reason(error),
            )
        elif self._failing and not failed:
            log.info("%s can be written again; everything that waited is on disk.", self.path)
        self._failing, self._failed = bool(failed), failed
        self._next_attempt = time.monotonic() + (_ATTEMPTS if places.in_bucket(self.path) else 0.0)
        return failed

    # ------------------------------------------------------------------ on the others

    def _refuse_another_folder(self, token: str) -> None:
        """Checks that this process sees the first one's lock; otherwise checkpoints would be split over two folders."""
        deadline = time.monotonic() + _SEEN_WITHIN
        while True:
            with contextlib.suppress(OSError):
                holder = lock.read(self._lock.path)
                if holder is not None and holder.token == token:
                    return
            if time.monotonic() > deadline:
                raise FileNotFoundError(
                    f"{self.path} on {hosts.describe()} is not the folder that process 0 writes to; MODEL_DIR must be "
                    "one that all hosts share (a network file system or a mounted bucket)."
                )
            time.sleep(0.2)


def steps(run_dir: str | Path) -> list[int]:
    """Lists the complete checkpoints of a run, ascending."""
    directory = places.of(run_dir) / "checkpoints"
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit() and (p / checksums.FILE).is_file())


def step_of(path: Path) -> int | None:
    """Returns the step of a path `<run>/checkpoints/<step>`; None for another path."""
    return int(path.name) if path.name.isdigit() and path.parent.name == "checkpoints" else None


def check_has_checkpoint(path: str | Path) -> None:
    """Raises FileNotFoundError unless this is a run directory with a checkpoint, or one `checkpoints/<step>` of it."""
    path = places.of(path).absolute()
    if step_of(path) is not None:
        if not path.is_dir():
            raise FileNotFoundError(f"No checkpoint at {path}; this run has steps {steps(path.parent.parent)}.")
    elif not steps(path):
        raise no_checkpoint(path)


def no_checkpoint(path: Path) -> FileNotFoundError:
    """Returns the error of a path where a run with a checkpoint was expected, with the nearest run directories."""
    if not path.exists():
        return FileNotFoundError(f"There is no run at {path}{_runs_beside(path)}")
    if (path / MANIFEST).is_file():
        return FileNotFoundError(
            f"{path} holds no checkpoint yet: its training ended before the first one, or still runs. Repeat its "
            "`sbs train` command."
        )
    return FileNotFoundError(
        f"{path} holds no checkpoint; expected a run directory (with checkpoints/<step>), or one such step"
        f"{_runs_beside(path / 'x')}"
    )


def _runs_beside(path: Path) -> str:
    folder = path.parent
    found = sorted(each.name for each in folder.iterdir() if (each / MANIFEST).is_file()) if folder.is_dir() else []
    return f"; {folder} has the runs {', '.join(found[:10])}.{nearest(path.name, found)}" if found else "."


def last_lines(lines: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the last metrics line of each kind, {"train": {"step": .., ..}, ..}, without its kind."""
    return {line["kind"]: {name: value for name, value in line.items() if name != "kind"} for line in lines}


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Reads a run's metrics.jsonl, without an incomplete last line. ValueError names a damaged line."""
    file = places.of(path) / "metrics.jsonl"
    return [_parse(line, path=file, number=number) for number, line in enumerate(_whole_lines(file), start=1)]


def had_checkpoints(path: Path) -> bool:
    """Tells whether a run had a checkpoint, by its manifest, or by its metrics if an earlier version wrote it.

    A test follows the last checkpoint; a line after an evaluation follows that one's.
    """
    lines, known = [], None
    with contextlib.suppress(ValueError):  # a damaged line proves nothing
        lines = read_metrics(path)
    if (path / MANIFEST).exists():
        with contextlib.suppress(ValueError):  # damaged: `begin` refuses it
            known = manifest.had_checkpoint(read_manifest(path))
    evaluated = [line["step"] for line in lines if line["kind"] == "validation"]
    tested = any(line["kind"] == "test" for line in lines)
    if known is None:
        known = any(line["step"] > min(evaluated, default=math.inf) for line in lines)
    return known or tested


def read_scores(path: str | Path) -> dict[int, float]:
    """Reads the validation scores by step in metrics.jsonl; {} if there are none."""
    if not (places.of(path) / "metrics.jsonl").exists() or not (places.of(path) / MANIFEST).exists():
        return {}
    metric = manifest.read(path).get("run", {}).get("primary_metric")
    lines = [line for line in read_metrics(path) if line["kind"] == "validation" and metric in line]
    return {line["step"]: line[metric] for line in lines}


def _whole_lines(path: Path) -> list[bytes]:
    """Reads the complete lines, without a truncated last one."""
    if not path.exists():
        return []
    most = user_files.LONGEST_LINE
    found = []
    with user_files.opened(path) as file:
        while (line := file.readline(most + 1)).endswith(b"\n"):
            found.append(line)
    if len(line) > most:
        raise ValueError(
            f"{path}:{len(found) + 1}: the line is longer than {most} bytes; restore the file from a copy."
        )
    return found


def _parse(line: bytes, *, path: Path, number: int) -> dict[str, Any]:
    where = f"{path}:{number}"
    try:
        found = json_files.parse_json(json_files.decoded(line, where), where)
        values = {**found} if isinstance(found, dict) else {}
        kind, step = values.pop("kind", None), values.pop("step", None)
        numbers = all(type(x) in (int, float) and (abs(x) < 1e300 or x != x) for x in values.values())
        if not isinstance(kind, str) or type(step) is not int or step < 0 or not numbers:
            raise ValueError(
                f"{where}: got {json_files.brief(found)}; "
                'expected {"kind": text, "step": whole number, name: number}.'
            )
    except ValueError as error:
        raise ValueError(
            f"{error} Restore the file from a copy, or delete the line: the run can be read and resumed without it."
        ) from None
    return found


@contextlib.contextmanager
def _explaining_disk_errors(path: Path) -> Iterator[None]:
    """Turns a disk error at the start into one for the user, with the path and the reason."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # raised by our code, with a message for the user
            raise
        raise OSError(
            f"{path} cannot be written to: {_reason(error)}. Fix that, or choose another MODEL_DIR."
        ) from error


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
