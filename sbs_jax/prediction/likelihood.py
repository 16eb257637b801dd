"""Likelihood of rationales by a trained student, in one pass of teacher forcing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sbs_jax.data import registry, selection, task_names, tokens
from sbs_jax.data.dataset import MIXTURES
from sbs_jax.student import partitioning
from sbs_jax.training import evaluate, students

_DIGITS = 4  # of a score. Other batches and padding change the sixth, which must not decide between two texts.


class Scorer:
    """A student of rationales, with the prefix, lengths and vocabulary of its training."""

    def __init__(self, student: students.Student, *, batch_size: int) -> None:
        """Raises ValueError for a student without a rationale task, or whose vocabulary is another one now."""
        run, data = student.manifest["run"], student.manifest["data"]
        dataset, kind = task_names.answering(run["mixture_or_task_name"])
        if kind not in (selection.RATIONALE, *MIXTURES):
            raise ValueError(
                f"the student was trained on {dataset.name}_{kind}, which has no rationale task; give a run of "
                "gin_configs/methods/step_by_step.gin."
            )
        self._described = student.identity()
        expected, found = data.get("vocabulary_sha256"), self._described["vocabulary"]
        if found != expected:
            raise ValueError(
                f"{student.options.vocabulary} is another vocabulary than that of the student: SHA-256 {found}; "
                f"expected {expected}. Put the file of its training back."
            )
        self._student, self._lengths = student, run["task_feature_lengths"]
        self._vocabulary = registry.vocabulary(student.options.vocabulary)
        self._batch_size = batch_size
        self._generator = evaluate.Generators(
            max_decode_length=0,
            structure=student.structure,
            eos_id=student.config.eos_id,
            partitioner=student.partitioner,
            batch_size=batch_size,
        ).of(by_loss=True)

    @classmethod
    def load(cls, run: str | Path, *, dataset: str, base: str | None = None, batch_size: int = 64) -> Scorer:
        """Loads the best checkpoint of a run. ValueError if it was not trained on the dataset."""
        student = students.load_student(run, layout=partitioning.DATA_PARALLEL, base=base, dataset=dataset)
        return cls(student, batch_size=batch_size)

    def describe(self) -> dict[str, Any]:
        """Returns step, checksum and vocabulary of the student, as JSON."""
        return dict(self._described)

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Returns the mean log probability (nats) of the tokens of each rationale, EOS included, after its input.

        Both are truncated as in training. Rounded, so that batches and padding do not decide between two texts.
        """
        if not pairs:
            return []
        options = self._student.options
        numbers = [selection.numbers_of(text, options) for text, _ in pairs]
        texts = {
            "inputs": [options.rationale_prefix + n.hide(text) for n, (text, _) in zip(numbers, pairs, strict=True)],
            "targets": [n.hide(rationale) for n, (_, rationale) in zip(numbers, pairs, strict=True)],
        }
        tables = {feature: tokens.TokenTable.of(each, self._vocabulary) for feature, each in texts.items()}
        inputs_NS, targets_NT = (table.padded(self._lengths[feature]) for feature, table in tables.items())
        shifted_NT = np.pad(targets_NT[:, :-1], ((0, 0), (1, 0)))
        limit = inputs_NS.shape[1]
        groups = evaluate.grouped(np.minimum(tables["inputs"].sizes, limit), limit=limit, batch_size=self._batch_size)
        self._generator.expect(length for length, _ in groups)
        scores_N = np.empty(len(pairs), np.float64)
        for length, rows in groups:
            arrays = inputs_NS[rows, :length], shifted_NT[rows], targets_NT[rows]
            sums_N3 = np.concatenate(list(self._generator.batches(self._student.parameters, *arrays)))
            scores_N[rows] = -sums_N3[:, 0].astype(np.float64) / sums_N3[:, 2]
        return np.round(scores_N, _DIGITS).tolist()
