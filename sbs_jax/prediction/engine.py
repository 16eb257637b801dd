"""A student that answers questions: texts in, answers out; what makes one unanswerable is said in its answer.

`Predictor` is what `sbs predict` and `sbs serve` ask. It knows the prefixes, vocabulary and lengths that the student
was trained with. Rows are grouped by length and padded to one of a few lengths (`buckets`), each compiled once; row by
row, an answer depends, but for rounding, neither on its neighbours nor on the padding.
"""

import dataclasses
import functools
import hashlib
import itertools
import logging
import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sbs_jax import checks
from sbs_jax.data import registry, selection, tokens
from sbs_jax.prediction import weights as weights_
from sbs_jax.storage import json_files
from sbs_jax.student import decoding, partitioning
from sbs_jax.training import evaluate, students

log = logging.getLogger(__name__)

GREEDY, BEAM, SAMPLE, CHOICES = DECODINGS = ("greedy", "beam", "sample", "choices")
OBJECTIVES = (selection.LABEL, selection.RATIONALE)
TOO_LONG = ("error", "cut")
# Of one question: more choices than these are refused, which bounds what one row can cost.
MOST_CHOICES = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How answers are made.

    Attributes:
      decoding: "greedy", "beam", "sample", or "choices": the likeliest of a closed set of labels.
      beams: of beam search, as is `length_penalty`: a sequence counts as log probability / tokens ** penalty.
      temperature: of sampling, as are `top_k` (0: all tokens), `top_p` and `seed`: `decoding.sample`.
      rationale: whether to generate the rationale too, by the same decoding (by greedy search beside choices).
      batch_size: rows at a time.
      smaller: other numbers of rows that are compiled for, for batches that are not full.
      weights: how matrices are held and multiplied (`weights.py`).
      objective: "label", or "rationale" to answer with the rationale alone.
      too_long: what becomes of an input longer than the student was trained with: an "error", or "cut" to that length.
    """

    decoding: str = GREEDY
    beams: int = 4
    length_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    rationale: bool = False
    batch_size: int = 32
    smaller: tuple[int, ...] = ()
    weights: str = weights_.FLOAT32
    objective: str = selection.LABEL
    too_long: str = "error"

    def __post_init__(self) -> None:
        for name, known in (
            ("decoding", DECODINGS),
            ("weights", weights_.WEIGHTS),
            ("objective", OBJECTIVES),
            ("too_long", TOO_LONG),
        ):
            checks.choice(f"Settings.{name}", getattr(self, name), known)
        for name, least in (("beams", 1), ("batch_size", 1), ("top_k", 0), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"Settings.{name} is {value!r}; expected a whole number of at least {least}.")
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(f"Settings.temperature is {self.temperature!r}; expected a number above 0, such as 0.7.")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"Settings.top_p is {self.top_p!r}; expected a share above 0 and up to 1, such as 0.9.")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"Settings.length_penalty is {self.length_penalty!r}; expected a number, such as 1.0.")
        if self.objective == selection.RATIONALE and (self.rationale or self.decoding == CHOICES):
            raise ValueError(
                "Settings.objective is 'rationale': it asks for nothing else, and a rationale is not one of a closed "
                "set. Ask for the label, with `rationale` beside it if wanted."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """One thing to answer: the text without prefix; perhaps the adapters to answer with.

    `choices` are the possible answers where the decoding is "choices"; without them those of the dataset. `rationale`:
    whether this one's is generated too, where the settings say that any is.
    """

    id: str
    input: str
    adapter: str | None = None
    choices: tuple[str, ...] | None = None
    rationale: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of a question: a prediction and its natural log probability, or `error`: why there is none.

    `scores` has the probability of each choice, which sum to 1: the student's among these choices alone. The `score` of
    a choice is its log probability among all texts.
    """

    id: str
    prediction: str | None
    score: float | None
    rationale: str | None = None
    scores: Mapping[str, float] | None = None
    error: str | None = None


def buckets(limit: int) -> tuple[int, ...]:
    """The lengths that rows are padded to, the largest the limit: real inputs are short, where lengths lie close.

    >>> buckets(112)
    (16, 24, 32, 40, 48, 56, 72, 88, 112)
    """
    found = [limit]
    while True:
        shorter = int(found[-1] * (0.6 if found[-1] > 128 else 0.8) / 8 + 0.5) * 8
        if shorter < 16 or shorter >= found[-1]:
            return tuple(reversed(found))
        found.append(shorter)


class Predictor:
    """One loaded student (and adapters), compiled for a few static shapes. One thread at a time may call `answer`."""

    def __init__(
        self,
        students: Mapping[str | None, students.Student],
        *,
        settings: Settings,
        places: Mapping[str | None, str] | None = None,
    ) -> None:
        """The students by the names that questions have for them, None the one that answers the others."""
        self.settings = settings
        self._answerers = {
            name: _Answerer(student, settings=settings, owner=(places or {}).get(name, "this student"))
            for name, student in students.items()
        }

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
        adapters = adapters or {}
        student, others = students.load_students(model, adapters, layout=partitioning.DATA_PARALLEL, base=base)
        places = {None: str(model), **{name: str(place) for name, place in adapters.items()}}
        return cls({None: student, **others}, settings=settings, places=places)

    def describe(self) -> dict[str, Any]:
        """What its answers depend on, as JSON: settings, and of each student its step and a checksum."""
        students = {name or "": answerer.describe() for name, answerer in self._answerers.items()}
        return {"settings": dataclasses.asdict(self.settings), "students": students}

    def check(self, question: Question) -> str | None:
        """None, or why this question cannot be answered."""
        error = self._misfit(question)
        return error or self._answerers[question.adapter].prepare([question])[0].error

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """An answer to each, in order."""
        errors = [self._misfit(question) for question in questions]
        found: dict[int, Answer] = {}
        for name, answerer in self._answerers.items():
            numbers = [n for n, q in enumerate(questions) if errors[n] is None and q.adapter == name]
            found |= zip(numbers, answerer.answer([questions[n] for n in numbers]), strict=True)
        return [
            found.get(n) or Answer(id=question.id, prediction=None, score=None, error=errors[n])
            for n, question in enumerate(questions)
        ]

    def warm_up(self) -> float:
        """Compiles everything that does not depend on the questions, or reads it from the disk; seconds."""
        start = time.monotonic()
        for answerer in self._answerers.values():
            answerer.warm_up()
        return time.monotonic() - start

    def _misfit(self, question: Question) -> str | None:
        if question.adapter not in self._answerers:
            return unknown_adapter(question.adapter, [name for name in self._answerers if name is not None])
        try:
            json_files.check_encodes([question.input, *(question.choices or ())])
        except ValueError as error:
            return str(error)
        return None


def unknown_adapter(name: str | None, known: Sequence[str]) -> str:
    """Says that no adapter has this name, and which there are."""
    listed = ", ".join(map(repr, known))
    there = f"There are {listed}" if listed else "There are none: give some by --adapters NAME=RUN"
    near = checks.nearest(str(name)[:200], known)
    return f"no adapter is named {json_files.brief(name)}.{near} {there}."


@dataclasses.dataclass(frozen=True)
class _Way:
    """How a student is asked for one thing."""

    prefix: str
    kind: str  # as `datasets.graded_text` takes it
    length: int  # of an answer, in tokens
    decoding: str


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A question as tokens: of the source by each way, and of its choices. Or what is wrong with it."""

    id: str
    sources: tuple[list[int], ...] = ()
    labels: tuple[str, ...] = ()
    choices: tuple[list[int], ...] = ()
    error: str | None = None


class _Answerer:
    """One student: its tokens, ways and compiled functions."""

    def __init__(self, student: students.Student, *, settings: Settings, owner: str) -> None:
        self._settings, self._owner, self._student = settings, owner, student
        self._vocabulary = registry.vocabulary(student.options.vocabulary)
        run = student.manifest["run"]
        self._dataset, kind = registry.split_task(run["mixture_or_task_name"])
        lengths = run["task_feature_lengths"]
        self._limit, self._choice_limit = lengths["inputs"], max(lengths["targets"], run["max_decode_length"])
        self._buckets = buckets(self._limit)
        self._ways = self._ways_of(kind, answer=run["max_decode_length"], rationale=lengths["targets"])
        self._structure, self._parameters = weights_.held(
            student.structure, student.parameters, weights=settings.weights
        )
        self._generators = [self._generator(way) for way in self._ways]

    def _ways_of(self, kind: str, *, answer: int, rationale: int) -> list[_Way]:
        settings, options = self._settings, self._student.options
        explains = settings.rationale or settings.objective == selection.RATIONALE
        if explains and kind == selection.LABEL:
            log.warning("%s was trained on labels alone; its rationales mean nothing.", self._owner)
        if settings.decoding == CHOICES and kind == selection.RATIONALE_THEN_LABEL:
            raise ValueError(
                f"{self._owner} writes a rationale before its label, so a label has no likelihood of its own; "
                "predict with --decoding greedy, beam or sample."
            )
        then_label = kind == selection.RATIONALE_THEN_LABEL
        to_label = _Way(options.label_prefix, kind if then_label else selection.LABEL, answer, settings.decoding)
        beside = GREEDY if settings.decoding == CHOICES else settings.decoding
        to_rationale = _Way(options.rationale_prefix, selection.RATIONALE, rationale, beside)
        if settings.objective == selection.RATIONALE:
            return [to_rationale]
        # One that writes both has written the rationale with the label.
        return [to_label, to_rationale] if settings.rationale and not then_label else [to_label]

    def _generator(self, way: _Way) -> evaluate.Generator:
        s = self._settings
        # Measured on a CPU alone (docs/speed.md); rows that are cut over devices cannot change places.
        drop_ended = self._student.partitioner.data_parallel_size == 1 and partitioning.platform() == "cpu"
        search: dict[str, Callable[..., Any]] = {
            GREEDY: functools.partial(decoding.greedy, length=way.length, drop_ended=drop_ended),
            BEAM: functools.partial(
                decoding.beam_search, length=way.length, beams=s.beams, length_penalty=s.length_penalty
            ),
            SAMPLE: functools.partial(
                decoding.sample,
                length=way.length,
                temperature=s.temperature,
                top_k=s.top_k,
                top_p=s.top_p,
                drop_ended=drop_ended,
            ),
            CHOICES: decoding.score_choices,
        }
        return evaluate.Generator(
            self._structure,
            partitioner=self._student.partitioner,
            batch_size=s.batch_size,
            length=way.length,
            compute=search[way.decoding],
            smaller=s.smaller,
        )

    def describe(self) -> dict[str, Any]:
        checksum = 0
        for name, array in sorted(self._student.parameters.items()):
            checksum = zlib.crc32(np.asarray(array).tobytes(), zlib.crc32(name.encode(), checksum))
        return {"step": self._student.step, "checksum": f"{checksum:08x}"}

    # ------------------------------------------------------------------------------- questions

    def prepare(self, questions: Sequence[Question]) -> list[_Prepared]:
        """The questions in tokens, each with its error if it has one."""
        encoded = [
            tokens.encode([way.prefix + question.input for question in questions], self._vocabulary)
            for way in self._ways
        ]
        return [self._prepared(q, sources) for q, *sources in zip(questions, *encoded, strict=True)]

    def _prepared(self, question: Question, sources: list[list[int]]) -> _Prepared:
        most = max(map(len, sources))
        if most > self._limit:
            if self._settings.too_long == "error":
                return _Prepared(
                    question.id,
                    error=f"the input has {most} tokens, prefix and end included, and this student was trained with "
                    f"at most {self._limit}; shorten it, or have it cut (--too_long cut).",
                )
            sources = [tokens.cut(np.asarray(ids, np.int32), self._limit).tolist() for ids in sources]
        if self._settings.decoding != CHOICES:
            return _Prepared(question.id, tuple(sources))
        labels = question.choices if question.choices is not None else self._dataset.labels
        error = self._misfit(labels)
        if error is not None:
            return _Prepared(question.id, error=error)
        assert labels is not None
        choices = self._choice_tokens(tuple(labels))
        longest = max(map(len, choices))
        if longest > self._choice_limit:
            return _Prepared(
                question.id,
                error=f"a choice has {longest} tokens, its end included, and this student was trained with at most "
                f"{self._choice_limit}; shorten it.",
            )
        return _Prepared(question.id, tuple(sources), tuple(labels), choices)

    def _misfit(self, labels: Sequence[str] | None) -> str | None:
        if labels is None:
            return (
                f"no label set is known: {self._dataset.name} has none that all rows share, and this row names none; "
                'give "choices": ["..", ".."] with the row.'
            )
        if not 2 <= len(labels) <= MOST_CHOICES:
            return f"got {len(labels)} choices; expected 2 to {MOST_CHOICES}."
        if len(set(labels)) < len(labels):
            return (
                f"the choices name {json_files.brief(next(x for x in labels if labels.count(x) > 1))} more than once."
            )
        return None

    @functools.lru_cache(maxsize=4096)  # noqa: B019  (as long-lived as the student)
    def _choice_tokens(self, labels: tuple[str, ...]) -> tuple[list[int], ...]:
        return tuple(tokens.encode(labels, self._vocabulary))

    # --------------------------------------------------------------------------------- answers

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        if not questions:
            return []
        prepared = self.prepare(questions)
        good = [n for n, each in enumerate(prepared) if each.error is None]
        # Of the second way, which writes rationales, those who want one.
        asked = [good, [n for n in good if questions[n].rationale]][: len(self._ways)]
        results = [
            dict(zip(chosen, self._results(number, [prepared[n] for n in chosen]), strict=True))
            for number, chosen in enumerate(asked)
        ]
        found: dict[int, Answer] = {}
        for n in good:
            prediction, score, scores, text = results[0][n]
            rationale = results[1][n][0] if len(results) > 1 and n in results[1] else None
            if self._settings.rationale and len(results) == 1 and questions[n].rationale:
                rationale = text.rpartition(selection.ANSWER_MARKER)[0].strip() or text.strip()
            found[n] = Answer(
                id=questions[n].id, prediction=prediction, score=score, rationale=rationale, scores=scores
            )
        return [
            found.get(n) or Answer(id=each.id, prediction=None, score=None, error=each.error)
            for n, each in enumerate(prepared)
        ]

    def _results(self, number: int, rows: Sequence[_Prepared]) -> list[tuple[str, float, dict[str, float] | None, str]]:
        """Of each row: prediction, log probability, probabilities of choices, and the text it was taken from."""
        way, found = self._ways[number], {}
        shapes = {n: _choices_shape(row.choices) if way.decoding == CHOICES else (0, 0) for n, row in enumerate(rows)}
        order = sorted(range(len(rows)), key=lambda n: (shapes[n], len(rows[n].sources[number])), reverse=True)
        size = self._settings.batch_size
        start = 0
        while start < len(order):
            # As many of one shape as a batch takes; the first is the longest.
            chunk = [n for n in order[start : start + size] if shapes[n] == shapes[order[start]]]
            start += len(chunk)
            found |= zip(chunk, self._batch(number, [rows[n] for n in chunk], shapes[chunk[0]]), strict=True)
        return [found[n] for n in range(len(rows))]

    def _batch(
        self, number: int, rows: Sequence[_Prepared], shape: tuple[int, int]
    ) -> list[tuple[str, float, dict[str, float] | None, str]]:
        way, sources = self._ways[number], [row.sources[number] for row in rows]
        longest = max(map(len, sources))
        arrays: list[np.ndarray] = [_padded(sources, next(each for each in self._buckets if each >= longest))]
        if way.decoding == SAMPLE:
            arrays.append(np.stack([_key(row.id, seed=self._settings.seed, kind=way.kind) for row in rows]))
        generator = self._generators[number]
        if way.decoding != CHOICES:
            found = []
            for ids, score in generator.run(self._parameters, *arrays):
                text = self._vocabulary.decode(ids)
                found.append((registry.graded_text(text, kind=way.kind), score, None, text))
            return found
        count, length = shape
        arrays.append(np.stack([_padded([*row.choices, *[[]] * (count - len(row.choices))], length) for row in rows]))
        (log_p_BN,) = generator.batches(self._parameters, *arrays)
        found = []
        for row, log_p_N in zip(rows, log_p_BN[:, :].astype(np.float64), strict=True):
            log_p_N = log_p_N[: len(row.labels)]
            p_N = np.exp(log_p_N - log_p_N.max())
            best = int(np.argmax(log_p_N))
            scores = dict(zip(row.labels, (p_N / p_N.sum()).tolist(), strict=True))
            found.append((row.labels[best], float(log_p_N[best]), scores, row.labels[best]))
        return found

    def warm_up(self) -> None:
        for way, generator in zip(self._ways, self._generators, strict=True):
            for size, length in itertools.product(generator.sizes, self._buckets):
                arrays: list[np.ndarray] = [np.zeros((size, length), np.int32)]  # rows of padding end at once
                if way.decoding == SAMPLE:
                    arrays.append(np.zeros((size, 2), np.uint32))
                if way.decoding == CHOICES:
                    if self._dataset.labels is None:
                        continue  # the shape depends on the rows
                    shape = _choices_shape(self._choice_tokens(tuple(self._dataset.labels)))
                    arrays.append(np.zeros((size, *shape), np.int32))
                for _ in generator.batches(self._parameters, *arrays):
                    pass


def _padded(rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
    padded = np.zeros((len(rows), length), np.int32)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    return padded


def _choices_shape(choices: Sequence[Sequence[int]]) -> tuple[int, int]:
    """What a row's choices are padded to, (choices, tokens): powers of two, so that few shapes are compiled."""
    return 2 ** math.ceil(math.log2(len(choices))), 2 ** math.ceil(math.log2(max(map(len, choices))))


def _key(row_id: str, *, seed: int, kind: str) -> np.ndarray:
    """The key that a row is sampled with, uint32 [2]: of the seed, its id and what is asked, and of nothing else."""
    digest = hashlib.blake2b(f"{seed}\0{kind}\0{row_id}".encode(errors="surrogatepass"), digest_size=8).digest()
    return np.frombuffer(digest, np.uint32)
