"""Runs of ours as a form of weights: one step of a run directory, adapters not merged."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sbs_jax.run import directory, saving
from sbs_jax.run.checkpoints import METADATA, PARAMETERS, locate, refuse_damaged
from sbs_jax.storage import places
from sbs_jax.student import adapters, families
from sbs_jax.weights import tensor_store
from sbs_jax.weights.arrays import Index, LazyArray, Opened


def is_run(path: str | Path) -> bool:
    """Detects a run directory, or one of its `checkpoints/<step>`."""
    path = places.of(path)
    holds_steps = (path / "checkpoints").is_dir() or (path / directory.MANIFEST).is_file()
    return holds_steps or path.parent.name == "checkpoints"


def describe(path: str | Path) -> tuple[families.ModelConfig, adapters.Tuning | None, dict[str, Any]]:
    """Reads model, tuning and manifest of a run, or of the step that is named, without its arrays.

    FileNotFoundError if the run or its manifest does not exist; every process must call it.
    """
    run, step = locate(path)
    metadata = saving.read_json(run / "checkpoints" / str(step))
    return (
        families.config_of(metadata["model"]),
        adapters.Tuning.of(metadata.get("tuning")),
        directory.read_manifest(run),
    )


def open_run(path: str | Path) -> Opened:
    """Opens the best step of a run, or the step that is named; every process must call it.

    ValueError for a damaged step; FileNotFoundError if it does not exist, or its run removes it meanwhile.
    """
    run, step = locate(path)
    checkpoint = run / "checkpoints" / str(step)

    @contextlib.contextmanager
    def present() -> Iterator[None]:
        try:
            yield
        finally:
            # The run may remove this step at any time; the opened arrays are valid if the step still exists afterwards.
            if not checkpoint.is_dir():
                raise FileNotFoundError(
                    f"{run} no longer has a checkpoint of step {step}: the run removed it. Try again, or "
                    "name another step."
                )

    def guarded(array: LazyArray) -> LazyArray:
        def read(index: Index) -> np.ndarray:
            with present():
                return array.read(index)

        return LazyArray(array.shape, array.dtype, read)

    refuse_damaged(run, step, items=(PARAMETERS, METADATA))
    with present():
        metadata = saving.read_json(checkpoint)
        arrays = tensor_store.orbax_arrays(checkpoint / PARAMETERS)
    origin = directory.read_manifest(run) if (run / directory.MANIFEST).is_file() else None
    return Opened(
        families.config_of(metadata["model"]) if "model" in metadata else None,
        {name: guarded(array) for name, array in arrays.items()},
        step=step,
        vocabulary=None if origin is None else origin["data"]["options"]["vocabulary"],
        origin=origin,
        tuning=adapters.Tuning.of(metadata.get("tuning")),
        base=metadata.get("base"),
    )
