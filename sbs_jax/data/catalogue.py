"""Datasets by name, without SeqIO: the shipped ones, folders with dataset.json, and those that a program adds.

registry.py makes their SeqIO tasks, which needs TensorFlow; names, rows and prompts do not.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from sbs_jax import checks
from sbs_jax.data import dataset_folder
from sbs_jax.data.dataset import Dataset, of_text

# Plain text, which has no records (corpus.py).
CORPUS = of_text("corpus", lengths={"inputs": 512, "targets": 114})

_DATASETS: dict[str, Dataset] = {}
_outside: dict[str, Mapping[str, str]] = {}  # SeqIO task or mixture of a --module: its file and hash
_listeners: list[Callable[[Dataset], None]] = []


def registered() -> dict[str, Dataset]:
    """Returns all datasets by name, including the shipped ones.

    Importing their package registers them; it is imported by name, so that no module depends on it.
    """
    importlib.import_module("tasks")
    return _DATASETS


def on_add(listener: Callable[[Dataset], None]) -> None:
    """Calls `listener` with every dataset, those that exist and those to come."""
    _listeners.append(listener)
    for dataset in _DATASETS.values():
        listener(dataset)


def add(dataset: Dataset) -> None:
    """Registers a dataset. ValueError if another one has its name, or no task can have it."""
    dataset.check_name()
    known = _DATASETS.get(dataset.name)
    if known is not None and known != dataset:
        if known.definition is not None and known.definition == dataset.definition:
            return
        raise ValueError(f"Another dataset is already registered as {dataset.name!r}; choose another name.")
    _DATASETS[dataset.name] = dataset
    for listener in _listeners:
        listener(dataset)


def names() -> tuple[str, ...]:
    """Returns the names of all datasets, sorted."""
    return tuple(sorted(registered()))


def note_outside(tasks: Mapping[str, Mapping[str, str]]) -> None:
    """Notes the tasks and mixtures that a --module registered in SeqIO, with the file's name and hash."""
    _outside.update(tasks)


def module_of(task: str) -> Mapping[str, str] | None:
    """Returns file and hash of the --module that registered a task in SeqIO; None for other tasks."""
    return _outside.get(task)


def get(name: str) -> Dataset:
    """Returns the dataset of this name, or of a folder with dataset.json, which this registers.

    ValueError with near matches if there is none.
    """
    if name == CORPUS.name:
        return CORPUS
    if name not in registered() and dataset_folder.is_folder(name):
        return restore(dataset_folder.read(name))
    if name not in _DATASETS:
        raise ValueError(
            f"Unknown dataset {name!r}; known are {list(names())}, folders with {dataset_folder.FILE} (`sbs init`) and "
            "those of a --module."
            f"{checks.nearest(name, names())}"
        )
    return _DATASETS[name]


def restore(dataset: Dataset) -> Dataset:
    """Registers the dataset of a folder or of a run's manifest, and returns it."""
    registered()  # shipped datasets have their names first
    add(dataset)
    return _DATASETS[dataset.name]


def restore_from(data: Mapping[str, Any], *, where: str) -> None:
    """Makes the datasets of a run known, from "data" of its manifest, whose file errors call `where`.

    ValueError if it is the dataset of a `--module` that was not given; the file of a manifest is never run.
    """
    for part in data.get("parts", {}).values():
        restore_from(part, where=where)
    if definition := data.get("definition"):
        restore(dataset_folder.of(definition, where=where))
    elif (module := data.get("module")) and data.get("dataset") not in {*registered(), *_outside}:
        raise ValueError(
            f"{where}: the dataset {data.get('dataset')!r} is defined by the Python file {module['file']!r} (SHA-256 "
            f"{module['sha256'][:12]}); give its path with --module."
        )


def scripted_reply(asked: str, *, sample: int) -> str | None:
    """Returns the reply of the first dataset whose scripted teacher knows the input, or None."""
    for dataset in registered().values():
        if dataset.scripted_reply is not None and (reply := dataset.scripted_reply(asked, sample)) is not None:
            return reply
    return None
