"""Soft targets of training rows by a trained student, the teacher of a smaller one: `sbs soft_targets`.

The targets are teacher-forced, a shard of rows at a time (data/soft_targets.py). A shard's numbers depend on its rows
alone, so an interrupted command continues with the first shard that is not written, and writes the same bytes.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from sbs_jax import compiling, hosts
from sbs_jax.data import batches, registry, selection, task_names
from sbs_jax.data import soft_targets as store
from sbs_jax.storage import places
from sbs_jax.student import families, soft_targets
from sbs_jax.training import evaluate, students

log = logging.getLogger(__name__)

# Options of the data that name files; the hashes of these are compared instead.
_FILES = ("records_dir", "augmentation", "vocabulary")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """Counts of the store's rows and target tokens, of the rows that an earlier process wrote, and its bytes."""

    rows: int
    tokens: int
    resumed: int
    bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Part:
    """Some rows of a task: one file of the store."""

    file: str
    task: str
    rows: np.ndarray  # numbers of the task's rows
    lengths: Sequence[int]  # of inputs, one program each; ascending
    targets: int  # length


def write(
    student: students.Student,
    *,
    output: str | Path,
    tasks: Sequence[str] | None = None,
    top_k: int = 64,
    batch_size: int = 32,
    shard_rows: int = 2048,
) -> Summary:
    """Writes the student's soft targets for the training rows of tasks (None: those that it was trained on).

    ValueError for a task without records, whose rows have no ids of their own, for a `top_k` above the vocabulary, and
    for a store of another teacher or other data. Every process computes its share, and the first one writes.
    """
    if (augmentation := student.manifest["data"]["options"].get("augmentation")) is not None:
        # `load_student` leaves these further training rows out, which no answer depends on.
        registry.configure(dataclasses.replace(student.options, augmentation=augmentation))
    names = [*tasks] if tasks else [*task_names.subtasks(student.manifest["run"]["mixture_or_task_name"])]
    _check(student, names, top_k=top_k)
    parts = _parts(student, names, batch_size=batch_size, shard_rows=shard_rows)
    about = _about(student, names, top_k=top_k, shard_rows=shard_rows)
    hosts.agree({"teacher and records": json.dumps(about, sort_keys=True)})
    folder = places.of(output)
    generator = evaluate.Generator(
        student.structure,
        eos_id=student.config.eos_id,
        partitioner=student.partitioner,
        batch_size=batch_size,
        length=0,
        compute=functools.partial(_largest, count=top_k, ids=store.ids_dtype(student.config.vocab_size)),
        progress=compiling.Progress(count=len({(size, part.targets) for part in parts for size in part.lengths})),
    )
    files = [part.file for part in parts]
    with contextlib.ExitStack() as stack:
        writer = None
        if hosts.is_first():
            writer = stack.enter_context(store.Writer(folder, about=about, files=files))
        missing = set(hosts.from_first(lambda: writer.missing if writer is not None else []))
        resumed = sum(len(part.rows) for part in parts if part.file not in missing)
        total = sum(len(part.rows) for part in parts)
        hidden = not (hosts.is_first() and sys.stderr.isatty())
        with tqdm(total=total, initial=resumed, unit="row", desc=folder.name, disable=hidden) as bar:
            for part in parts:
                if part.file in missing:
                    rows = _scored(part, student=student, generator=generator)
                    if writer is not None:
                        writer.add(part.file, rows)
                    bar.update(len(part.rows))
        hosts.barrier()
    return Summary(resumed=resumed, **store.counts(folder))


def _check(student: students.Student, names: Sequence[str], *, top_k: int) -> None:
    for name in names:
        if not registry.is_of_records(name):
            raise ValueError(
                f"{name} is not made of records, so its rows have no ids to find their soft targets by. Choose tasks "
                "of a dataset of records with --task."
            )
    if top_k > student.config.vocab_size:
        raise ValueError(
            f"--top_k is {top_k}, and the vocabulary of this student has {student.config.vocab_size} ids; choose at "
            "most as many."
        )


def _parts(student: students.Student, names: Sequence[str], *, batch_size: int, shard_rows: int) -> list[_Part]:
    """Cuts the rows of tasks into the files of the store, and chooses the lengths that they are padded to."""
    found = []
    limits = student.manifest["run"]["task_feature_lengths"]
    for name in names:
        sizes = {feature: table.sizes for feature, table in registry.token_tables(name, selection.TRAIN).items()}
        length = {feature: min(limits[feature], -(-int(sizes[feature].max()) // 8) * 8) for feature in limits}
        inputs_N = np.minimum(sizes["inputs"], length["inputs"])
        groups = evaluate.grouped(inputs_N, limit=length["inputs"], batch_size=batch_size)
        for number, start in enumerate(range(0, len(inputs_N), shard_rows)):
            found.append(
                _Part(
                    file=f"{name}-{number:05d}.safetensors",
                    task=name,
                    rows=np.arange(start, min(start + shard_rows, len(inputs_N))),
                    lengths=sorted(padded for padded, _ in groups),
                    targets=length["targets"],
                )
            )
    return found


def _about(student: students.Student, names: Sequence[str], *, top_k: int, shard_rows: int) -> dict[str, Any]:
    """Describes everything that the store's numbers depend on, as JSON."""
    identity = student.identity()
    options = dataclasses.asdict(registry.options())
    found = {task_names.dataset_of(name).name: None for name in names}
    return {
        "version": 1,
        "teacher": {name: identity[name] for name in ("step", "checksum")},
        "vocabulary": identity["vocabulary"],
        "vocabulary_size": student.config.vocab_size,
        "top_k": top_k,
        "ids": str(store.ids_dtype(student.config.vocab_size)),
        "log_p": str(store.LOG_P),
        "shard_rows": shard_rows,
        "tasks": [*names],
        "task_feature_lengths": dict(student.manifest["run"]["task_feature_lengths"]),
        "options": {name: value for name, value in options.items() if name not in _FILES},
        "records": {name: registry.sources(name)["splits"][selection.TRAIN] for name in found},
    }


def _largest(
    model: families.Model, inputs_BS: jax.Array, shifted_BT: jax.Array, *, count: int, ids: np.dtype
) -> tuple[jax.Array, ...]:
    """Returns the soft targets of each row's targets, which are its shifted decoder inputs, in the store's types."""
    found = soft_targets.largest(model.logits(model.states(inputs_BS, shifted_BT)), count=count)
    stored = store.LOG_P
    return found.ids.astype(ids), found.log_p.astype(stored), found.log_p_rest.astype(stored)


def _scored(part: _Part, *, student: students.Student, generator: evaluate.Generator) -> store.Rows:
    """Computes a file of the store: rows of about the same length together, kept in the order of the records."""
    features = batches.eval_features(
        part.task,
        split=selection.TRAIN,
        lengths={"inputs": part.lengths[-1], "targets": part.targets},
        rows=part.rows,
    )
    inputs_NS, targets_NT = features["encoder_input_tokens"], features["decoder_target_tokens"]
    sizes_N = np.count_nonzero(features["decoder_task_ids"], axis=1)
    lengths_N = inputs_NS.shape[1] - np.argmax(inputs_NS[:, ::-1] != 0, axis=1)
    found: dict[int, tuple[np.ndarray, ...]] = {}
    for number, chosen in _by_length(lengths_N, part.lengths):
        arrays = inputs_NS[chosen, :number], features["decoder_input_tokens"][chosen]
        rows = iter(chosen.tolist())
        for batch in generator.batches(student.parameters, *arrays):
            for each, row in zip(zip(*batch, strict=True), rows, strict=False):
                found[row] = tuple(array[: sizes_N[row]] for array in each)
    ids, log_p, rest = (np.concatenate([found[row][place] for row in range(len(sizes_N))]) for place in range(3))
    examples = registry.examples(part.task, selection.TRAIN)
    return store.Rows(
        keys=np.array([store.key(part.task, examples[row].id) for row in part.rows.tolist()], np.uint64),
        targets=np.array(
            [store.targets_hash(row[:size]) for row, size in zip(targets_NT, sizes_N, strict=True)], np.uint64
        ),
        sizes=sizes_N.astype(np.uint32),
        ids=ids,
        log_p=log_p,
        log_p_rest=rest,
    )


def _by_length(lengths_N: np.ndarray, lengths: Sequence[int]) -> list[tuple[int, np.ndarray]]:
    """Assigns rows to the shortest of ascending lengths that holds them; leaves out lengths without rows."""
    shortest_N = np.searchsorted(lengths, lengths_N)
    groups = ((length, np.flatnonzero(shortest_N == number)) for number, length in enumerate(lengths))
    return [(length, rows) for length, rows in groups if len(rows)]
