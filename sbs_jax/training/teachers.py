"""The teacher that a run keeps in memory: its shapes before the run, its parameters at every start.

It is a run of ours, of any family and with adapters or without, on the mesh of the student that it teaches.
"""

from pathlib import Path
from typing import Any

from sbs_jax.data import selection, tokens
from sbs_jax.run import manifest
from sbs_jax.student import adapters, families, partitioning, stacks
from sbs_jax.training import students
from sbs_jax.training.config import TrainConfig
from sbs_jax.weights import runs


def abstract(
    config: TrainConfig, partitioner: partitioning.Partitioner, *, execution: stacks.Execution
) -> tuple[families.Structure | None, dict[str, Any]]:
    """Returns structure and shapes with shardings of a run's teacher; (None, {}) without one. Loads no parameter."""
    if config.teacher is None:
        return None, {}
    model, tuning, _ = runs.describe(config.teacher)
    if model.vocab_size != config.model.vocab_size:
        raise ValueError(
            f"The table of the teacher {config.teacher} has {model.vocab_size} rows, and the student's "
            f"{config.model.vocab_size}. Take a student with a table of the teacher's size."
        )
    adapted = adapters.abstract(model, tuning, execution=execution)
    return adapted.structure, partitioner.with_shardings(adapted.shapes, parameters=adapted.shapes, axes=adapted.axes)


def check(config: TrainConfig) -> None:
    """Raises ValueError if a run's teacher has another vocabulary than the student."""
    if config.teacher is None:
        return
    _, _, origin = runs.describe(config.teacher)
    theirs, ours = selection.DataOptions(**origin["data"]["options"]).vocabulary, config.data.vocabulary
    if tokens.vocabulary_sha256(theirs) != tokens.vocabulary_sha256(ours):
        raise ValueError(
            f"The teacher {config.teacher} has another vocabulary, {theirs}, than the student, {ours}. Give the "
            "student the teacher's."
        )


def load(config: TrainConfig) -> students.Student:
    """Loads a run's teacher on the run's mesh; every process must call it. The registry's options stay the run's."""
    assert config.teacher is not None
    return students.load_student(config.teacher, layout=config.layout, register=False)


def load_same(config: TrainConfig, run: str | Path) -> students.Student:
    """Loads the teacher that a run had, as its manifest identifies it. ValueError if it has changed since."""
    found, identity = load(config), manifest.read(run)["data"].get("teacher")
    if (now := found.identity()) != identity:
        raise ValueError(
            f"The teacher {config.teacher} has changed since the run: {now}, not {identity}. Name the step that the "
            "run had: --gin.TEACHER=<run>/checkpoints/<step>."
        )
    return found
