"""Batches of a training run: rows per process, arrays on the devices, and the examples they came from."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sbs_jax.data import batches, selection
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
    }
