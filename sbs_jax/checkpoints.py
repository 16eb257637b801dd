"""Checkpoints of a run, and parameters from wherever they come: a run, Hugging Face, T5X, an .npz file.

A run directory holds `checkpoints/<step>/` with three items, written by Orbax atomically: `parameters` (a flat
dictionary of float32 arrays), `optimizer` (state and step), `metadata` (JSON: architecture, step, metrics so far).
Parameters are an item of their own so that predicting reads nothing else.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

from sbs_jax import hosts, run_dir, t5
from sbs_jax.convert import hugging_face, names, npz, t5x

PARAMETERS, OPTIMIZER, METADATA = "parameters", "optimizer", "metadata"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """What a checkpoint holds, its arrays on the shardings that were asked for."""

    step: int
    parameters: t5.Parameters
    optimizer: Any
    metadata: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run: the newest `keep` and the best by validation are kept.

    Use it with `with`: leaving it waits for a save under way, whatever the reason for leaving; but not where one of
    several processes fails, since the others may never come to what they would finish together.
    """

    def __init__(self, run_dir: str | Path, *, keep: int) -> None:
        self.directory = Path(run_dir).absolute() / "checkpoints"
        best = policy.BestN(get_metric_fn=_rank, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy.AnyPreservationPolicy([policy.LatestN(keep), best]),
            # Without a best_fn the manager does not write metrics down, and a resumed run would not know its best.
            best_fn=_rank,
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest(self) -> int | None:
        """Newest complete step, None in a new run; the same on every process."""
        return hosts.from_first(self._manager.latest_step)

    def save(
        self,
        step: int,
        *,
        parameters: t5.Parameters,
        optimizer: Any,
        metadata: Mapping[str, Any],
        validation: float | None,
    ) -> None:
        """Copies the arrays to the host, then writes in the background; `validation` is the metric to be best by."""
        metrics = None if validation is None else {"validation": validation, "step": step}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **{
                    PARAMETERS: ocp.args.StandardSave(parameters),
                    OPTIMIZER: ocp.args.StandardSave(optimizer),
                    METADATA: ocp.args.JsonSave(dict(metadata)),
                }
            ),
            metrics=metrics,
        )

    def restore(self, step: int, *, parameters: Any, optimizer: Any) -> Restored:
        """Arrays of a step, on the shardings of the given abstract trees."""
        items = {
            PARAMETERS: ocp.args.StandardRestore(parameters),
            OPTIMIZER: ocp.args.StandardRestore(optimizer),
            METADATA: ocp.args.JsonRestore(),
        }
        got = self._manager.restore(step, args=ocp.args.Composite(**items))
        return Restored(step=step, parameters=got[PARAMETERS], optimizer=got[OPTIMIZER], metadata=got[METADATA])

    def wait(self) -> None:
        """Until everything saved so far is on disk."""
        self._manager.wait_until_finished()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None or not hosts.waited_for():
            self._manager.close()


def _rank(metrics: Any) -> Any:
    """Of equals the earliest is best: more training that brought nothing is not preferred."""
    return metrics["validation"], -metrics["step"]


def read_metadata(run_dir: str | Path, step: int) -> dict[str, Any]:
    """Metadata of a step, without its arrays."""
    return json.loads((Path(run_dir) / "checkpoints" / str(step) / METADATA / "metadata").read_text("utf-8"))


def steps(run_dir: str | Path) -> list[int]:
    """Complete checkpoints of a run, ascending."""
    directory = Path(run_dir) / "checkpoints"
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())


def best_step(run_dir: str | Path) -> int | None:
    """The best step by validation as the newest checkpoint knows it; the newest where nothing was evaluated."""
    existing = steps(run_dir)
    if not existing:
        return None
    best = read_metadata(run_dir, existing[-1]).get("best")
    return existing[-1] if best is None else best["step"]


def locate(path: str | Path) -> tuple[Path, int]:
    """(run directory, step) of a run directory (its best step) or of one of its `checkpoints/<step>`."""
    path = Path(path).absolute()
    if path.name.isdigit() and path.parent.name == "checkpoints":
        run_dir, step = path.parent.parent, int(path.name)
        if not path.is_dir():
            raise FileNotFoundError(f"No checkpoint at {path}; this run has steps {steps(run_dir)}.")
        return run_dir, step
    step = best_step(path)
    if step is None:
        raise FileNotFoundError(
            f"{path} holds no checkpoint; expected a run directory (with checkpoints/<step>), or one such step."
        )
    return path, step


# Forms of checkpoints, as `sbs convert` names them.
SBS, HUGGING_FACE, T5X = "sbs", "hf", "t5x"


def form(path: str | Path) -> str:
    """Which form the checkpoint at a path has. FileNotFoundError, with what is expected, where there is none."""
    text = str(path)
    if text.endswith(".npz"):
        return SBS
    if "://" not in text:
        local = Path(text)
        if not local.exists():
            raise FileNotFoundError(f"There is no checkpoint at {path}: nothing is there.")
        if hugging_face.is_directory(local):
            return HUGGING_FACE
        if (
            (local / "checkpoints").is_dir()
            or local.parent.name == "checkpoints"
            or (local / run_dir.MANIFEST).is_file()
        ):
            return SBS
    if t5x.is_checkpoint(text):
        return T5X
    raise FileNotFoundError(
        f"{path} holds no checkpoint: expected a run directory (with checkpoints/<step>) or one such step, a Hugging "
        "Face directory (config.json), a T5X model directory (checkpoint_<step>/) or checkpoint, or an .npz file."
    )


def open_any(path: str | Path, *, kind: str) -> names.Opened:
    """Architecture and arrays of a checkpoint; arrays are read when they are asked for, by slices."""
    if kind == HUGGING_FACE:
        return hugging_face.open_directory(path)
    if kind == T5X:
        return t5x.open_checkpoint(path)
    directory, step = locate(path)
    config = t5.T5Config.of(read_metadata(directory, step)["model"])
    arrays = t5x.orbax_arrays(directory / "checkpoints" / str(step) / PARAMETERS)
    origin, vocabulary = None, None
    if (directory / run_dir.MANIFEST).is_file():
        origin = run_dir.read_manifest(directory)
        vocabulary = origin["data"]["options"]["vocabulary"]
    return names.Opened(config, arrays, step=step, vocabulary=vocabulary, origin=origin)


def load_parameters(path: str | Path, *, like: Mapping[str, jax.ShapeDtypeStruct]) -> t5.Parameters:
    """Parameters from a checkpoint of any form (`form`), on the shardings and in the types of `like`.

    A host reads what its own devices hold, one array after the other. A parameter that is missing, left over or of
    another shape is an error that lists them: it is another architecture. An `.npz` holds one array per parameter under
    its full name.
    """
    kind = form(path)
    wanted = {name: tuple(leaf.shape) for name, leaf in like.items()}
    if str(path).endswith(".npz"):
        found = npz.arrays(path, shapes=wanted)
        return {
            name: jax.make_array_from_callback(leaf.shape, leaf.sharding, found[name].astype(leaf.dtype).__getitem__)
            for name, leaf in like.items()
        }
    if kind != SBS:
        arrays = open_any(path, kind=kind).arrays
        names.check(path, {name: array.shape for name, array in arrays.items()}, wanted, kind=kind)
        return {name: arrays[name].onto(leaf) for name, leaf in like.items()}
    directory, step = locate(path)
    options = ocp.CheckpointManagerOptions(read_only=True)  # the run may still be writing
    handlers = {PARAMETERS: ocp.StandardCheckpointHandler()}
    with ocp.CheckpointManager(directory / "checkpoints", options=options, item_handlers=handlers) as manager:
        tree = manager.item_metadata(step)[PARAMETERS].tree
        names.check(path, {name: tuple(leaf.shape) for name, leaf in tree.items()}, wanted, kind=kind)
        items = {PARAMETERS: ocp.args.StandardRestore(dict(like))}
        return manager.restore(step, args=ocp.args.Composite(**items))[PARAMETERS]


def save_parameters(path: str | Path, parameters: t5.Parameters, *, config: t5.T5Config, step: int) -> None:
    """Writes `<path>/checkpoints/<step>` with parameters and architecture, and no optimiser: weights to start from."""
    with ocp.CheckpointManager(Path(path).absolute() / "checkpoints") as manager:
        manager.save(
            step,
            args=ocp.args.Composite(
                **{
                    PARAMETERS: ocp.args.StandardSave(parameters),
                    METADATA: ocp.args.JsonSave({"step": step, "best": None, "model": dataclasses.asdict(config)}),
                }
            ),
        )


def save_npz(path: str | Path, parameters: t5.Parameters, *, dtype: str) -> None:
    """Writes parameters as one `.npz` of the given float type (the form of the embedded student)."""
    arrays = {name: np.asarray(x).astype(dtype) for name, x in sorted(parameters.items())}
    np.savez_compressed(path, allow_pickle=False, **arrays)
