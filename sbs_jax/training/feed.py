"""Batches of a training run: rows per process, arrays on the devices, and the examples they came from."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sbs_jax.data import batches, selection, soft_targets, task_names
from sbs_jax.run import manifest
from sbs_jax.training.config import TrainConfig
from sbs_jax.training.step import Batch, Trainer


def train_batches(config: TrainConfig, trainer: Trainer, *, skip: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields this process's rows of each batch, without the first `skip` batches."""
    rows = trainer.partitioner.local_rows(config.batch_size)
    return batches.train_dataset(config.mixture_or_task_name, **_options(config), skip_batches=skip, rows=rows)


def on_devices(config: TrainConfig, trainer: Trainer, *, skip: int) -> Iterator[tuple[Batch, float]]:
    """Yields batches on the devices, each with the tokens of the global batch, estimated from this process's rows."""
    for batch in train_batches(config, trainer, skip=skip):
        rows = len(batch["decoder_target_tokens"])
        yield trainer.partitioner.put_batch(batch), batches.count_tokens(batch) * config.batch_size / rows


def batch_examples(config: TrainConfig, *, step: int) -> tuple[list[batches.BatchExample], dict[str, np.ndarray]]:
    """Returns the examples of a step's batch, and arrays with each example in a separate row."""
    return batches.batch_examples(config.mixture_or_task_name, **_options(config), batch=step - 1)


def fingerprint(config: TrainConfig, data: Mapping[str, Any]) -> str:
    """Returns hashes of the records and of the training tokens, a line each, for processes to compare."""
    lines = [
        f"{name} {split['file']} {split['sha256']}"
        for part in manifest.data_of_parts(data).values()
        for name, split in part["splits"].items()
    ]
    if config.soft_targets is not None:
        lines.append(f"soft targets {soft_targets.sha256(config.soft_targets)}")
    task, lengths = config.mixture_or_task_name, config.task_feature_lengths
    return "\n".join([*lines, *batches.fingerprint(task, split=selection.TRAIN, lengths=lengths)])


def _options(config: TrainConfig) -> dict[str, Any]:
    """Returns the options that determine the rows of each step, by their names in data/batches.py."""
    return {
        "lengths": config.task_feature_lengths,
        "split": selection.TRAIN,
        "batch_size": config.batch_size,
        "pack": config.pack,
        "seed": config.seed,
        "weights": config.loss_weights,
        "teacher": teacher(config),
    }


def teacher(config: TrainConfig) -> soft_targets.Store | None:
    """Opens the store of a run's soft targets. Its files are hashed once, however many runs of a process use it."""
    path = config.soft_targets
    return None if path is None else _opened(path, soft_targets.sha256(path))


@functools.lru_cache(maxsize=1)
def _opened(path: str, sha256: str) -> soft_targets.Store:
    del sha256
    return soft_targets.Store(path)


def check_teacher(config: TrainConfig) -> None:
    """Raises ValueError if a run's soft targets are of another vocabulary, or lack one of its training rows."""
    if (store := teacher(config)) is None:
        return
    if store.form.vocabulary_size > config.model.vocab_size:
        raise ValueError(
            f"The teacher of {store.path} has {store.form.vocabulary_size} ids, and the student's table "
            f"{config.model.vocab_size} rows. Take a student of the teacher's vocabulary."
        )
    names = task_names.subtasks(config.mixture_or_task_name)
    batches.soft_rows(names, selection.TRAIN, store=store, lengths=config.task_feature_lengths)
