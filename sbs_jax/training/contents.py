"""Contents of a run's manifest and of a checkpoint's metadata: the facts that resuming and loading need."""

import contextlib
import dataclasses
import logging
import math
from typing import Any

from sbs_jax import hosts
from sbs_jax.data import batches, selection, soft_targets, task_names
from sbs_jax.run import manifest as run_manifest
from sbs_jax.run import settings
from sbs_jax.storage import hub
from sbs_jax.student import adapters, families
from sbs_jax.training.config import TrainConfig
from sbs_jax.training.step import Trainer
from sbs_jax.training.students import Student

log = logging.getLogger(__name__)


def pinned(config: TrainConfig) -> TrainConfig:
    """Fixes the revision of models of the Hugging Face Hub: that of the run in `model_dir`, or the newest.

    Every process gets the same; the errors are those of hub.folder.
    """

    def revisions() -> tuple[str | None, str]:
        known = {}
        with contextlib.suppress(FileNotFoundError, ValueError):  # a new run, or a manifest that `begin` refuses
            found = run_manifest.read(config.model_dir)
            known = {**found.get("settings", {}), **found["data"].get("options", {})}
        start, vocabulary = known.get("initial_checkpoint_path"), known.get("vocabulary")
        weights = config.initial_checkpoint_path
        weights = weights and hub.pinned(weights, known=start if isinstance(start, str) else None)
        known = vocabulary if isinstance(vocabulary, str) else weights
        return weights, hub.pinned(config.data.vocabulary, known=known)

    weights, vocabulary = hosts.from_first(revisions)
    if (weights, vocabulary) == (config.initial_checkpoint_path, config.data.vocabulary):
        return config
    data = dataclasses.replace(config.data, vocabulary=vocabulary)
    return dataclasses.replace(config, initial_checkpoint_path=weights, data=data)


def manifest(
    config: TrainConfig, *, data: dict[str, Any], trainer: Trainer, teacher: Student | None = None
) -> dict[str, Any]:
    """Collects data hashes, settings, mesh and parameter table, and logs them; warns about truncated sequences.

    `teacher` is the one that the run keeps in memory; its identity is part of the data.
    """
    lengths = _truncated(config, data)
    parameters = {
        name: {"shape": leaf.shape, "dtype": str(leaf.dtype), "spec": str(leaf.sharding.spec)}
        for name, leaf in {**trainer.saved.frozen, **trainer.saved.parameters}.items()
    }
    if config.soft_targets is not None:
        data = {**data, "soft_targets_sha256": soft_targets.sha256(config.soft_targets)}
    if teacher is not None:
        data = {**data, "teacher": teacher.identity()}
    total = sum(math.prod(leaf.shape) for leaf in families.abstract(config.model)[1].values())
    devices = [str(device) for device in trainer.partitioner.mesh.devices.flat]
    log.info("Devices: %s; mesh %s.", ", ".join(devices), trainer.partitioner.sizes)
    log.info("Parameters: %s in %d arrays.", f"{total:,}", len(parameters))
    if config.tuning is not None:
        log.info("%s", adapters.summary(config.model, trainer.saved.parameters, trainer.saved.frozen))
    for part in run_manifest.data_of_parts(data).values():
        log.info("Data: %s %s", part["dataset"], {name: split["counts"] for name, split in part["splits"].items()})
    names = task_names.parts(config.mixture_or_task_name)
    return {
        "data": data,
        "lengths": lengths,
        "labels": None if len(names) > 1 else _of_part(*names)["labels"],
        "run": of_run(config),
        "settings": settings.describe(config),
        "model": dataclasses.asdict(config.model),
        "mesh": trainer.partitioner.sizes,
        "devices": devices,
        "parameter_count": total,
        "parameters": parameters,
    }


def of_run(config: TrainConfig) -> dict[str, Any]:
    """Describes the tasks of a run: what they are, how long, and what grades them."""
    names = task_names.parts(config.mixture_or_task_name)
    return {
        "mixture_or_task_name": config.mixture_or_task_name,
        "task_feature_lengths": dict(config.task_feature_lengths),
        "max_decode_length": config.max_decode_length,
        "primary_metric": task_names.primary_metric(config.eval_task_names),
        **({"parts": {part: _of_part(part) for part in names}} if len(names) > 1 else {}),
    }


def _of_part(part: str) -> dict[str, Any]:
    """Describes a part of a mixture, for `run.manifest.of_part`."""
    labels = task_names.dataset_of(part).labels
    metric = task_names.primary_metric(task_names.graded(part))
    return {"labels": None if labels is None else list(labels), "primary_metric": metric}


def _truncated(config: TrainConfig, data: dict[str, Any]) -> dict[str, Any]:
    """Counts sequences that the feature lengths truncate, by split and task."""
    lengths: dict[str, dict[str, dict[str, int]]] = {}
    for part, facts in run_manifest.data_of_parts(data, whole=config.mixture_or_task_name).items():
        for split, names in ((selection.TRAIN, (part,)), (selection.TEST, task_names.graded(part))):
            for name in names if split in facts["splits"] else ():
                found = batches.count_truncated(name, split, config.task_feature_lengths)
                lengths[split] = lengths.get(split, {}) | found
    for split, of_tasks in lengths.items():
        for task, counts in of_tasks.items():
            if counts["inputs cut"] or counts["targets cut"]:
                log.warning("%s, %s: sequences longer than the feature lengths are truncated: %s", task, split, counts)
    return lengths


def student(config: TrainConfig, base: dict[str, Any] | None) -> dict[str, Any]:
    """Describes the student for a checkpoint's metadata; `base` is the identity of the weights under adapters."""
    model = {"model": dataclasses.asdict(config.model)}
    if config.tuning is None or base is None:
        return model
    return model | {"tuning": dataclasses.asdict(config.tuning), "base": base}
