"""A student that answers questions: texts in, answers out, whatever makes a question unanswerable said in its answer.

`Predictor` is what `sbs predict`, `sbs serve` and exports ask. It knows the prefixes, vocabulary and lengths that the
student was trained with.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sbs_jax import datasets, evaluate, features, partitioning, records, selection, tokens

DECODINGS = ("greedy", "beam", "sample", "choices")
WEIGHTS = ("float32", "bfloat16", "int8")
OBJECTIVES = (datasets.LABEL, datasets.RATIONALE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How answers are made.

    Attributes:
      decoding: "greedy", "beam", "sample", or "choices": the likeliest of a closed set of labels.
      rationale: whether to generate the rationale too.
      batch_size: rows at a time.
      weights: how kernels are held and multiplied.
      objective: "label", or "rationale" to answer with the rationale alone.
    """

    decoding: str = "greedy"
    beams: int = 4
    length_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    rationale: bool = False
    batch_size: int = 32
    weights: str = "float32"
    objective: str = datasets.LABEL

    def __post_init__(self) -> None:
        for name, known in (("decoding", DECODINGS), ("weights", WEIGHTS), ("objective", OBJECTIVES)):
            selection.check_choice(f"Settings.{name}", getattr(self, name), known)
        if self.decoding != "greedy" or self.weights != "float32":
            raise ValueError(
                f"got decoding {self.decoding!r} and weights {self.weights!r}; greedy and float32 for now."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """One thing to answer: the text without prefix; perhaps the adapters to answer with, and the possible answers."""

    id: str
    input: str
    adapter: str | None = None
    choices: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of a question: a prediction and its natural log probability, or why there is none."""

    id: str
    prediction: str | None
    score: float | None
    rationale: str | None = None
    scores: Mapping[str, float] | None = None
    error: str | None = None


class Predictor:
    """One loaded student (and adapters), compiled for a few static shapes. One thread at a time may call `answer`."""

    def __init__(self, students: Mapping[str | None, evaluate.Student], *, settings: Settings) -> None:
        self.settings, self._students = settings, students

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        settings: Settings,
        base: str | None = None,
        adapters: Mapping[str, str | Path] | None = None,
    ) -> "Predictor":
        """The student of a run, and of others over the same base by the names that questions have for them."""
        layout = partitioning.DATA_PARALLEL
        student, others = evaluate.load_students(model, adapters or {}, layout=layout, base=base)
        return cls({None: student, **others}, settings=settings)

    def check(self, question: Question) -> str | None:
        """None, or why this question cannot be answered."""
        if question.adapter not in self._students:
            return unknown_adapter(question.adapter, [name for name in self._students if name is not None])
        student = self._students[question.adapter]
        limit = student.manifest["run"]["task_feature_lengths"]["inputs"]
        vocabulary = datasets.vocabulary(student.options.vocabulary)
        got = len(tokens.encode([student.options.label_prefix + question.input], vocabulary)[0])
        if got > limit:
            return f"the input has {got} tokens with prefix and end, and this student takes {limit}; shorten it."
        return None

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """An answer to each, in order."""
        errors = [self.check(question) for question in questions]
        found: dict[int, Answer] = {}
        for name, student in self._students.items():
            numbers = [n for n, q in enumerate(questions) if errors[n] is None and q.adapter == name]
            asked = [questions[n] for n in numbers]
            options, run = student.options, student.manifest["run"]
            kind = datasets.split_task(run["mixture_or_task_name"])[1]
            kind = datasets.RATIONALE_THEN_LABEL if kind == datasets.RATIONALE_THEN_LABEL else datasets.LABEL
            predicted = self._generated(student, asked, options.label_prefix, kind, run["max_decode_length"])
            rationales = [(None, None)] * len(asked)
            if self.settings.rationale:
                length = run["task_feature_lengths"]["targets"]
                rationales = self._generated(student, asked, options.rationale_prefix, datasets.RATIONALE, length)
            for n, (text, score), (rationale, _) in zip(numbers, predicted, rationales, strict=True):
                found[n] = Answer(id=questions[n].id, prediction=text, score=score, rationale=rationale)
        return [
            found.get(n) or Answer(id=question.id, prediction=None, score=None, error=errors[n])
            for n, question in enumerate(questions)
        ]

    def warm_up(self) -> float:
        """Compiles everything; seconds."""
        start = time.monotonic()
        for name in self._students:
            self.answer([Question(id="", input="", adapter=name)])
        return time.monotonic() - start

    def _generated(
        self, student: evaluate.Student, asked: Sequence[Question], prefix: str, kind: str, length: int
    ) -> list[tuple[str, float]]:
        if not asked:
            return []
        vocabulary = datasets.vocabulary(student.options.vocabulary)
        rows, _ = features.encode_inputs(
            [prefix + question.input for question in asked],
            vocabulary=vocabulary,
            length=student.manifest["run"]["task_feature_lengths"]["inputs"],
        )
        generator = evaluate.Generator(
            student.structure, partitioner=student.partitioner, batch_size=self.settings.batch_size, length=length
        )
        return [
            (datasets.graded_text(vocabulary.decode(ids), kind=kind), score)
            for ids, score in generator.run(student.parameters, np.asarray(rows))
        ]


def unknown_adapter(name: str | None, known: Sequence[str]) -> str:
    """Says that no adapter has this name, and which there are."""
    listed = ", ".join(map(repr, known))
    there = f"There are {listed}" if listed else "There are none: give some by --adapters NAME=RUN"
    near = selection.near_matches(str(name)[:200], known)
    return f"no adapter is named {records.brief(name)}.{near} {there}."
