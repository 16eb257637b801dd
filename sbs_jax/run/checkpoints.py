"""Checkpoints of a run: saving, retention, verification and restoring.

A run directory holds `checkpoints/<step>/` with three items: `parameters` (a flat dictionary of float32 arrays) and
`optimizer` in Orbax's form, `metadata` (JSON: architecture, step, validation scores so far, progress of the training
loop). Parameters are a separate item, so that prediction reads nothing else. `checksums.json` beside them has every
file's size and SHA-256. The directory gets its name when all of this is on disk; until then it is
`<step>.<n>.writing`. In a bucket it has its name from the start, and `checksums.json`, written last, makes it a
checkpoint.
"""

import dataclasses
import errno
import logging
import math
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from sbs_jax import checks, hosts
from sbs_jax.run import directory, manifest, saving
from sbs_jax.run.directory import check_has_checkpoint, no_checkpoint, step_of
from sbs_jax.run.directory import steps as steps  # a part of this module's interface
from sbs_jax.storage import checksums, json_files, places
from sbs_jax.student import adapters, families

log = logging.getLogger(__name__)

PARAMETERS, OPTIMIZER, METADATA = saving.PARAMETERS, saving.OPTIMIZER, saving.METADATA
DAMAGED = "damaged"  # folder of a run for damaged checkpoints
_REMOVING = ".removing"  # suffix of a step while it is removed
_LEFT_OVER = re.compile(r"\d+(\.\d+\.writing|\.removing|\.orbax-checkpoint-tmp.*)")
_RETRY = 2.0  # seconds between attempts of `finish`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retention:
    """Numbers of checkpoints to keep: the newest, the best by validation, and every `period`-th step."""

    newest: int
    best: int
    period: int | None

    def __post_init__(self) -> None:
        checks.whole_number("Retention.newest", self.newest, least=1)
        checks.whole_number("Retention.best", self.best, least=0)
        if self.period is not None:
            checks.whole_number("Retention.period", self.period, least=1)

    def kept(self, steps: Sequence[int], *, scores: Mapping[int, float]) -> set[int]:
        """Returns the steps to keep. Best = highest score; ties go to the earliest step; unscored steps never count.

        newest 2, best 1, period 40 of steps 10, 20, .., 60 with scores {20: 0.5, 30: 0.5}: 20, 40, 50, 60.
        """
        best = best_first(steps, scores=scores)[: self.best]
        periodic = [step for step in steps if self.period is not None and step % self.period == 0]
        return {*sorted(steps)[-self.newest :], *best, *periodic}


def best_first(steps: Sequence[int], *, scores: Mapping[int, float]) -> list[int]:
    """Sorts the steps that have a score, highest first; ties go to the earliest: more training gained nothing."""
    scored = [step for step in steps if math.isfinite(scores.get(step, math.nan))]
    return sorted(scored, key=lambda step: (-scores[step], step))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """Contents of a checkpoint, its arrays on the requested shardings."""

    step: int
    parameters: families.Parameters
    optimizer: Any
    metadata: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, written in the background; the only writer of `<run>/checkpoints`.

    `scores` are validation metrics by step; the training loop adds a step's before it saves that step. All processes
    call the same methods in the same order. Use it with `with`: leaving it waits for a save in progress, except when
    one of several processes fails, because the others may never reach the point where they finish the save together.
    """

    def __init__(self, run_dir: str | Path, *, retention: Retention, scores: Mapping[int, float]) -> None:
        self._run_dir = places.of(run_dir).absolute()
        self.directory = self._run_dir / "checkpoints"
        self._retention = retention
        self._scores = scores
        self._handler = saving.array_handler()
        self._saving: saving.Save | None = None
        self._attempts = 0
        self._good: set[int] = set()  # steps that this process has verified or written
        self._noted = False  # the manifest says that there is a checkpoint
        self._missing: str | None = None  # why the last save is not on disk
        hosts.from_first(self._tidy)

    def newest_good(self) -> int | None:
        """Returns the newest step that passes its checksums, None in a new run; the same on every process.

        Newer ones that are damaged or incomplete are named in a warning and moved to `<run>/damaged`. ValueError if no
        checkpoint is good or all are gone: only the user may decide to start over.
        """
        found = hosts.from_first(self._find_newest_good)
        if found["problem"] is not None:
            raise ValueError(found["problem"])
        if found["step"] is not None:
            self._good.add(found["step"])
        return found["step"]

    def save(self, step: int, *, parameters: families.Parameters, optimizer: Any, metadata: Mapping[str, Any]) -> None:
        """Copies the arrays to the host and returns; they are written in the background.

        Waits for a previous save that is still being written, and logs how long. If the storage fails (full, read-only,
        no permission), now or in the background, a warning is logged, nothing is raised, and nothing of the save
        remains. A step that is already on disk stays as it is.
        """
        self.wait(because=f"Step {step}")
        arrays = {PARAMETERS: parameters, OPTIMIZER: optimizer}
        answer = hosts.from_first(lambda: self._make_folder(step, needed=saving.size(arrays)))
        self._missing = answer["refused"]
        if answer["refused"] is not None:
            self._warn(step, answer["refused"])
        elif not answer["exists"]:
            scores = dict(self._scores)
            place = places.of(answer["place"])
            save = saving.Save(step, place, handler=self._handler, arrays=arrays, metadata=dict(metadata))
            save.start(lambda: self._settle(step, scores), lambda reason: self._warn(step, reason))
            self._saving = save

    def finish(
        self,
        step: int,
        *,
        parameters: families.Parameters,
        optimizer: Any,
        metadata: Mapping[str, Any],
        patience: float,
    ) -> None:
        """Makes the last save and returns when `step` is on disk (at once if it already is).

        A storage failure is retried every few seconds, for `patience` seconds; then OSError.
        """
        self.wait()
        if hosts.from_first(lambda: self._is_known_on_disk(step)):
            return
        deadline = time.monotonic() + patience
        while True:
            self.save(step, parameters=parameters, optimizer=optimizer, metadata=metadata)
            self.wait()
            if self._missing is None:
                return
            if hosts.from_first(lambda: time.monotonic() + _RETRY > deadline):
                break
            time.sleep(_RETRY)
        needed = saving.megabytes(saving.size({PARAMETERS: parameters, OPTIMIZER: optimizer}))
        free = hosts.from_first(lambda: saving.free(self.directory))
        newest = hosts.from_first(self._newest)
        raise OSError(
            f"The checkpoint of step {step} was not saved to {self.directory} within {patience:g} s: {self._missing} "
            f"({needed} needed, {'?' if free is None else saving.megabytes(free)} free). Free space there or make it "
            f"writable, and repeat the command: the run resumes at step {newest or 0}."
        )

    def best_step(self) -> int | None:
        """Returns the best step on disk by `scores`, or the newest if none was evaluated; the same on every process."""
        return hosts.from_first(lambda: _best(steps(self._run_dir), scores=self._scores))

    def restore(self, step: int, *, parameters: Any, optimizer: Any) -> Restored:
        """Reads the arrays of a step, on the shardings of the given abstract trees. ValueError if it is damaged."""
        if step not in self._good:
            refuse_damaged(self._run_dir, step, items=(PARAMETERS, OPTIMIZER, METADATA))
        return _restored(self._handler, self.directory / str(step), parameters=parameters, optimizer=optimizer)

    def wait(self, *, because: str | None = None) -> None:
        """Waits until the save in progress is on disk or has failed (then a warning was logged)."""
        save, self._saving = self._saving, None
        if save is None:
            return
        begin = time.monotonic()
        reason = save.wait()
        if because is not None and time.monotonic() - begin > 0.1:
            log.info("%s waited %.1f s for the checkpoint of step %d.", because, time.monotonic() - begin, save.step)
        self._missing = reason
        if reason is None:
            self._good.add(save.step)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None or not hosts.has_peers():
            self.wait()
            self._handler.close()

    # The methods below run on process 0 alone.

    def _tidy(self) -> None:
        """Removes the remains of interrupted saves and removals."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in self.directory.iterdir():
            if _is_left_over(path):
                saving.remove(path)

    def _find_newest_good(self) -> dict[str, Any]:
        damaged: dict[int, str] = {}
        for step in sorted((int(p.name) for p in self.directory.iterdir() if p.name.isdigit()), reverse=True):
            problem = checksums.problem(self.directory / str(step))
            if problem is None:
                for bad, what in damaged.items():
                    self._set_aside(bad, what)
                return {"step": step, "problem": None}
            damaged[step] = problem
        remedy = f"Restore one from a copy, or move {self._run_dir} away to start over from step 0."
        if damaged:
            listed = "\n".join(f"  {self.directory / str(step)}: {problem}." for step, problem in damaged.items())
            return {"step": None, "problem": f"No checkpoint of this run is good:\n{listed}\n{remedy}"}
        if directory.had_checkpoints(self._run_dir):
            return {"step": None, "problem": f"This run had checkpoints, but {self.directory} has none. {remedy}"}
        return {"step": None, "problem": None}

    def _set_aside(self, step: int, problem: str) -> None:
        """Moves a damaged step aside, for inspection."""
        folder = self._run_dir / DAMAGED
        folder.mkdir(exist_ok=True)
        target, number = folder / str(step), 1
        while target.exists():
            number += 1
            target = folder / f"{step}.{number}"
        source = self.directory / str(step)
        if isinstance(source, places.BucketPath) and isinstance(target, places.BucketPath):
            source.copy_tree(target)
            source.remove_tree(first=checksums.FILE)
        else:
            source.rename(target)
        log.warning("The checkpoint of step %d cannot be used: %s. It was moved to %s.", step, problem, target)

    def _make_folder(self, step: int, *, needed: int) -> dict[str, Any]:
        """Makes the folder for a step; or reports that the step exists, or why it cannot be written."""
        try:
            if self._is_on_disk(step):
                return {"exists": True, "refused": None, "place": None}
            final = self.directory / str(step)
            if final.is_symlink() or final.exists():
                self._set_aside(step, checksums.problem(final) or "a new one replaces it")
            self._tidy()
            free = saving.free(self.directory)
            if free is not None and free < needed:
                # A partial checkpoint would use up the space that the metrics need.
                lacking = f"{saving.megabytes(needed)} needed, {saving.megabytes(free)} free"
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {lacking}")
            # Each attempt has its own name: TensorStore may still be writing files of a failed one.
            self._attempts += 1
            temporary = saving.staging(self.directory, step, attempt=self._attempts)
            (temporary / METADATA).mkdir(parents=True)
            for item in (PARAMETERS, OPTIMIZER):
                # If this process failed before Orbax made this folder, Orbax on the others would wait long for it.
                (temporary / item / "array_metadatas").mkdir(parents=True)
        except OSError as error:
            return {"exists": False, "refused": checksums.reason(error), "place": None}
        return {"exists": False, "refused": None, "place": str(temporary)}

    def _is_on_disk(self, step: int) -> bool:
        directory = self.directory / str(step)
        if step in self._good:
            return (directory / checksums.FILE).is_file()
        return directory.is_dir() and checksums.problem(directory) is None

    def _is_known_on_disk(self, step: int) -> bool:
        try:
            return self._is_on_disk(step)
        except OSError:  # of a bucket out of reach
            return False

    def _settle(self, step: int, scores: Mapping[int, float]) -> None:
        """Notes that there is a checkpoint and removes those to drop; called when `step` is on disk."""
        try:
            if not self._noted:
                manifest.note_checkpoint(self._run_dir)
                self._noted = True
        except (OSError, ValueError) as error:
            log.warning("The manifest could not be written: %s.", checksums.reason(error))
        try:
            existing = steps(self._run_dir)
            for old in sorted(set(existing) - self._retention.kept(existing, scores=scores) - {step}):
                going = self.directory / str(old)
                if not places.in_bucket(going):  # renamed first, so that no reader sees a partial checkpoint
                    going = self.directory / f"{old}{_REMOVING}"
                    saving.remove(going)
                    (self.directory / str(old)).rename(going)
                saving.remove(going)
        except OSError as error:
            log.warning("An old checkpoint could not be removed: %s.", checksums.reason(error))

    def _warn(self, step: int, reason: str) -> None:
        if hosts.is_first():
            log.warning(
                "The checkpoint of step %d could not be written: %s. %s Training continues.",
                step,
                reason,
                _newest_text(self._newest()),
            )

    def _newest(self) -> int | None:
        return max(self._good, default=None) or max(steps(self._run_dir), default=None)


def _is_left_over(path: Path) -> bool:
    """Detects the remains of an interrupted save or removal: by the name, or in a bucket a step without checksums."""
    unfinished = places.in_bucket(path) and path.name.isdigit() and not (path / checksums.FILE).is_file()
    return unfinished or _LEFT_OVER.fullmatch(path.name) is not None


def _newest_text(step: int | None) -> str:
    return "There is no checkpoint yet." if step is None else f"The newest good one is step {step}."


# ------------------------------------------------------------------------------------ reading a run


def refuse_damaged(run_dir: Path, step: int, *, items: Iterable[str]) -> None:
    """Raises ValueError, on every process, if files of these items of a step fail their checksums."""
    directory = run_dir / "checkpoints" / str(step)
    found = hosts.from_first(
        lambda: [checksums.problem(directory, under=tuple(items)), directory.is_dir(), steps(run_dir)]
    )
    problem, exists, others = found
    if problem is None:
        return
    others = [other for other in others if other != step]
    have = f"Other steps there: {', '.join(map(str, others))}." if others else "There is no other step."
    if not exists:
        raise FileNotFoundError(f"There is no checkpoint of step {step} in {run_dir}. {have}")
    raise ValueError(f"The checkpoint {directory} cannot be used: {problem}. {have}")


def restore(run_dir: str | Path, step: int, *, parameters: Any, optimizer: Any) -> Restored:
    """Restores a step like `Checkpoints.restore`, from a run that another process may be writing."""
    run_dir = places.of(run_dir).absolute()
    refuse_damaged(run_dir, step, items=(PARAMETERS, OPTIMIZER, METADATA))
    handler = saving.array_handler()
    try:
        return _restored(handler, run_dir / "checkpoints" / str(step), parameters=parameters, optimizer=optimizer)
    finally:
        handler.close()


def _restored(handler: ocp.PyTreeCheckpointHandler, directory: Path, *, parameters: Any, optimizer: Any) -> Restored:
    return Restored(
        step=int(directory.name),
        parameters=saving.restore(handler, directory / PARAMETERS, like=parameters),
        optimizer=saving.restore(handler, directory / OPTIMIZER, like=optimizer),
        metadata=saving.read_json(directory),
    )


def read_metadata(run_dir: str | Path, step: int) -> dict[str, Any]:
    """Reads the metadata of a step, without its arrays. ValueError if it is damaged."""
    refuse_damaged(places.of(run_dir), step, items=[METADATA])
    return saving.read_json(places.of(run_dir) / "checkpoints" / str(step))


def best_step(path: str | Path) -> int | None:
    """Returns the best checkpoint by validation (ties go to the earliest); the newest if none was evaluated."""
    return _best(steps(path), scores=read_scores(path))


def _best(existing: Sequence[int], *, scores: Mapping[int, float]) -> int | None:
    ranked = best_first(existing, scores=scores) or existing[::-1]
    return ranked[0] if ranked else None


def read_scores(path: str | Path) -> dict[int, float]:
    """Reads the validation scores by step, which select the best checkpoint; {} if there are none.

    They are in the metadata of the newest checkpoint. metrics.jsonl has those that are not: of a run of an earlier
    version, and of an evaluation after the last save.
    """
    existing = steps(path)
    for step in reversed(existing):
        place = places.of(path) / "checkpoints" / str(step)
        if checksums.problem(place, under=(METADATA,)) is not None:  # damaged, or removed by its run meanwhile
            continue
        try:
            metadata = saving.read_json(place)
        except FileNotFoundError:
            continue
        scores = scores_of(metadata, where=str(place))
        if scores is not None and step == existing[-1] and not metadata.get("evaluation_due"):
            return scores
        return directory.read_scores(path) | (scores or {})
    return directory.read_scores(path)


def scores_of(metadata: Mapping[str, Any], *, where: str) -> dict[int, float] | None:
    """Returns the validation scores by step in a checkpoint's metadata; None if an earlier version wrote it."""
    if "scores" not in metadata:
        return None
    found = json_files.typed(metadata["scores"], dict[str, float], where=f"{where}: scores")
    return {int(step): score for step, score in found.items()}


def locate(path: str | Path) -> tuple[Path, int]:
    """Returns (run directory, step) for a run directory (its best step) or for one `checkpoints/<step>`.

    The same on every process, even while the run is writing. FileNotFoundError if there is no such checkpoint.
    """
    path = places.of(path).absolute()
    if step_of(path) is not None:
        check_has_checkpoint(path)
        return path.parent.parent, int(path.name)
    step = hosts.from_first(lambda: best_step(path))
    if step is None:
        raise no_checkpoint(path)
    return path, step


def save_parameters(
    path: str | Path,
    parameters: families.Parameters,
    *,
    config: families.ModelConfig,
    step: int,
    tuning: adapters.Tuning | None = None,
    base: Mapping[str, Any] | None = None,
) -> None:
    """Writes `<path>/checkpoints/<step>` with parameters and architecture, without an optimizer.

    With a tuning, the parameters are adapters on a base of the given identity.
    """
    metadata = {"step": step, "model": dataclasses.asdict(config)}
    if tuning is not None and base is not None:
        metadata |= {"tuning": dataclasses.asdict(tuning), "base": dict(base)}
    folder, handler = places.of(path).absolute() / "checkpoints", saving.array_handler()
    temporary = saving.staging(folder, step, attempt=1)
    (temporary / METADATA).mkdir(parents=True)
    handler.save(epath.Path(str(temporary / PARAMETERS)), args=ocp.args.PyTreeSave(parameters))
    handler.finalize(epath.Path(str(temporary / PARAMETERS)))
    saving.complete(temporary, metadata=metadata)
    saving.put_in_place(temporary, folder / str(step))
