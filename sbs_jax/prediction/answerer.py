"""One student that answers questions: its texts in tokens, their batches, and the programs that take them."""

import dataclasses
import functools
import hashlib
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sbs_jax import compiling
from sbs_jax.data import registry, selection, task_names, tokens
from sbs_jax.data.dataset import answers_in_two_steps
from sbs_jax.data.slots import NO_NUMBERS, Numbers
from sbs_jax.prediction import precision, shapes
from sbs_jax.prediction.inputs import Question
from sbs_jax.prediction.settings import BEAM, CHOICES, GREEDY, MOST_CHOICES, SAMPLE, Answer, Settings
from sbs_jax.storage import json_files
from sbs_jax.student import decoding, partitioning
from sbs_jax.training import evaluate, students

log = logging.getLogger(__name__)

# With fixed shapes: choices that are scored together, rows at a time, and lengths to pad choices to (and the longest).
_TOGETHER, _FIXED_ROWS, _FIXED_LENGTHS = 8, 8, (8, 32)
# Characters of choices whose tokens are kept, in case the next row has the same.
_KEPT_CHOICES = 2000


@dataclasses.dataclass(frozen=True)
class _Objective:
    """One kind of output to generate: a label or a rationale."""

    prefix: str
    kind: str  # for `registry.graded_text`
    length: int  # tokens to generate at most
    decoding: str


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A question in tokens: its source per objective, its choices and the numbers in slots; or its error."""

    id: str
    text: str = ""  # the input without a prefix, its numbers in slots
    numbers: Numbers = NO_NUMBERS
    sources: tuple[list[int], ...] = ()
    labels: tuple[str, ...] = ()
    choices: tuple[list[int], ...] = ()
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class _Part:
    """A row of a batch: a question's source, and with choices up to `form.choices` of them."""

    id: str
    source: list[int]
    form: shapes.Form
    choices: tuple[list[int], ...] = ()


class _Result(NamedTuple):
    """An answer by one objective: what is graded, its log probability, those of the choices, and the text in slots."""

    prediction: str
    score: float
    scores: dict[str, float] | None
    text: str


class Answerer:
    """One student with its vocabulary, objectives and compiled functions."""

    def __init__(
        self,
        student: students.Student,
        *,
        settings: Settings,
        owner: str,
        fixed_shapes: bool,
        progress: compiling.Progress,
    ) -> None:
        self._settings, self._owner, self._student = settings, owner, student
        self._vocabulary = registry.vocabulary(student.options.vocabulary)
        run = student.manifest["run"]
        self._dataset, kind = task_names.answering(run["mixture_or_task_name"])
        self._two_steps = answers_in_two_steps(kind) and settings.objective == selection.LABEL
        lengths = run["task_feature_lengths"]
        self._limit, self._choice_limit = lengths["inputs"], max(lengths["targets"], run["max_decode_length"])
        self._buckets = evaluate.buckets(self._limit)
        self._objectives = self._make_objectives(kind, answer=run["max_decode_length"], rationale=lengths["targets"])
        self._structure, self._parameters = precision.held(
            student.structure, student.parameters, weights=settings.weights
        )
        self._generators = [self._generator(objective, progress) for objective in self._objectives]
        self._fixed = fixed_shapes
        self._compiled: tuple[shapes.Program, ...] = ()  # replaced, never changed: two threads use it
        self._rows = self._generators[0].sizes[-1]
        self._generating = shapes.Form(0, 0, self._rows, self._buckets)
        self._scoring = self._make_forms() if settings.decoding == CHOICES else []
        progress.count += len(self.programs())

    @property
    def labels(self) -> Sequence[str] | None:
        return self._dataset.labels

    def _make_forms(self) -> list[shapes.Form]:
        """Returns the forms for choices that are compiled before the questions: of the labels, and the fixed ones."""
        found = []
        if self.labels is not None:
            found.append(self._own_form(self._choice_tokens(tuple(self.labels))))
        if self._fixed:
            sizes = self._generators[0].sizes
            rows = max((size for size in sizes if size <= _FIXED_ROWS), default=sizes[0])
            # Fewer lengths of the source, for fewer programs to compile.
            found += [shapes.Form(_TOGETHER, length, rows, self._buckets[::-3][::-1]) for length in self._lengths()]
        return found

    def _lengths(self) -> list[int]:
        return sorted({min(length, self._choice_limit) for length in (*_FIXED_LENGTHS, self._choice_limit)})

    def work(self, choices: Sequence[str] | None) -> int:
        if choices:
            # A token has two characters or more in most texts; tokenizing here would take longer.
            most = min(max(map(len, choices)) // 2, self._choice_limit)
            length = next(each for each in self._lengths() if each >= most)
        elif self.labels is not None:
            choices, length = self.labels, self._scoring[0].tokens
        else:
            return 1  # an error
        return -(-len(choices) // _TOGETHER) * max(1, length // _TOGETHER)

    def _own_form(self, choices: Sequence[Sequence[int]]) -> shapes.Form:
        return shapes.Form(*shapes.of_choices(choices), self._rows, self._buckets)

    def _form(self, choices: Sequence[Sequence[int]], *, source: int) -> shapes.Form:
        """Chooses the form with the fewest tokens to compute; every part encodes the source again."""
        if not self._fixed:
            return self._own_form(choices)
        longest = max(map(len, choices))
        ready = {program.form for program in self._compiled} or self._scoring
        fitting = [form for form in self._scoring if form.tokens >= longest and form in ready]
        return min(fitting, key=lambda form: -(-len(choices) // form.choices) * (form.choices * form.tokens + source))

    def _make_objectives(self, kind: str, *, answer: int, rationale: int) -> list[_Objective]:
        settings, options = self._settings, self._student.options
        explains = settings.rationale or settings.objective == selection.RATIONALE or self._two_steps
        if explains and kind in (selection.LABEL, selection.LABEL_GIVEN_RATIONALE):
            log.warning("%s was trained on labels only; its rationales mean nothing.", self._owner)
        if settings.decoding == CHOICES and kind == selection.RATIONALE_THEN_LABEL:
            raise ValueError(
                f"{self._owner} writes a rationale before its label, so a label has no likelihood of its own; "
                "predict with --decoding greedy, beam or sample."
            )
        then_label = kind == selection.RATIONALE_THEN_LABEL
        to_label = _Objective(options.label_prefix, kind if then_label else selection.LABEL, answer, settings.decoding)
        beside = GREEDY if settings.decoding == CHOICES else settings.decoding
        to_rationale = _Objective(options.rationale_prefix, selection.RATIONALE, rationale, beside)
        if settings.objective == selection.RATIONALE:
            return [to_rationale]
        # A single-task student writes the rationale with the label; a cascade's reads it before the label.
        return [to_label, to_rationale] if explains and not then_label else [to_label]

    def _generator(self, objective: _Objective, progress: compiling.Progress) -> evaluate.Generator:
        s = self._settings
        # Faster on a CPU (docs/speed.md; not measured elsewhere). Rows split over devices cannot change places.
        drop_ended = self._student.partitioner.data_parallel_size == 1 and partitioning.platform() == "cpu"
        search: dict[str, Callable[..., Any]] = {
            GREEDY: functools.partial(decoding.greedy, length=objective.length, drop_ended=drop_ended),
            BEAM: functools.partial(
                decoding.beam_search, length=objective.length, beams=s.beams, length_penalty=s.length_penalty
            ),
            SAMPLE: functools.partial(
                decoding.sample,
                length=objective.length,
                temperature=s.temperature,
                top_k=s.top_k,
                top_p=s.top_p,
                drop_ended=drop_ended,
            ),
            CHOICES: decoding.score_choices,
        }
        return evaluate.Generator(
            self._structure,
            eos_id=self._student.config.eos_id,
            partitioner=self._student.partitioner,
            batch_size=s.batch_size,
            length=objective.length,
            compute=search[objective.decoding],
            smaller=s.smaller,
            progress=progress,
        )

    def describe(self) -> dict[str, Any]:
        return {**self._student.identity(), "prefixes": [objective.prefix for objective in self._objectives]}

    # ------------------------------------------------------------------------------- questions

    def prepare(self, questions: Sequence[Question]) -> list[_Prepared]:
        """Encodes the questions, each with its error if it has one."""
        numbers = [self._numbers(question) for question in questions]
        texts = [
            "" if isinstance(found, str) else found.hide(question.input)
            for question, found in zip(questions, numbers, strict=True)
        ]
        encoded = [
            tokens.encode([objective.prefix + text for text in texts], self._vocabulary)
            for objective in self._objectives
        ]
        return [
            _Prepared(q.id, error=found) if isinstance(found, str) else self._prepared(q, found, text, sources)
            for q, found, text, *sources in zip(questions, numbers, texts, *encoded, strict=True)
        ]

    def _numbers(self, question: Question) -> Numbers | str:
        """Returns the numbers of a question that become slots, or the reason why it cannot be read."""
        try:
            return selection.numbers_of(question.input, self._student.options)
        except ValueError as error:
            return str(error)

    def _prepared(self, question: Question, numbers: Numbers, text: str, sources: list[list[int]]) -> _Prepared:
        most = max(map(len, sources))
        if most > self._limit:
            if self._settings.too_long == "error":
                return _Prepared(
                    question.id,
                    error=f"the input has {most} tokens (with prefix and end); this student was trained with at most "
                    f"{self._limit}. Shorten it, or truncate with --too_long cut.",
                )
            sources = [self._cut(ids) for ids in sources]
        prepared = _Prepared(question.id, text, numbers, tuple(sources))
        if self._settings.decoding != CHOICES:
            return prepared
        labels = question.choices if question.choices is not None else self.labels
        error = self._misfit(labels)
        if error is not None:
            return _Prepared(question.id, error=error)
        assert labels is not None
        choices = self._choice_tokens(tuple(map(numbers.hide, labels)))
        if len(set(map(tuple, choices))) < len(choices):
            first, second = next(
                pair for pair in itertools.combinations(range(len(choices)), 2) if choices[pair[0]] == choices[pair[1]]
            )
            return _Prepared(
                question.id,
                error=f"the choices {json_files.brief(labels[first])} and {json_files.brief(labels[second])} are the "
                "same tokens in this student's vocabulary; write them in characters that it has.",
            )
        longest = max(map(len, choices))
        if longest > self._choice_limit:
            return _Prepared(
                question.id,
                error=f"a choice has {longest} tokens (with its end); this student was trained with at most "
                f"{self._choice_limit}. Shorten it.",
            )
        return dataclasses.replace(prepared, labels=tuple(labels), choices=choices)

    def _cut(self, ids: list[int]) -> list[int]:
        return tokens.cut(np.asarray(ids, np.int32), self._limit).tolist()

    def _with_rationales(self, rows: Sequence[_Prepared], rationales: Sequence[str]) -> list[_Prepared]:
        """Returns the rows as the second step reads them: x and the rationale, truncated if they are too long."""
        joined = map(selection.with_rationale, [row.text for row in rows], rationales)
        encoded = tokens.encode([self._objectives[0].prefix + text for text in joined], self._vocabulary)
        return [
            dataclasses.replace(row, sources=(self._cut(ids), *row.sources[1:]))
            for row, ids in zip(rows, encoded, strict=True)
        ]

    def _misfit(self, labels: Sequence[str] | None) -> str | None:
        if labels is None:
            return (
                f"{self._dataset.name} has no label set that all rows share, and this row has no choices; "
                'add "choices": ["..", ".."] to the row.'
            )
        if not 2 <= len(labels) <= MOST_CHOICES:
            return f"got {len(labels)} choices; expected 2 to {MOST_CHOICES}."
        if len(set(labels)) < len(labels):
            return (
                f"the choices name {json_files.brief(next(x for x in labels if labels.count(x) > 1))} more than once."
            )
        return None

    def _choice_tokens(self, labels: tuple[str, ...]) -> tuple[list[int], ...]:
        if sum(map(len, labels)) > _KEPT_CHOICES:  # they would fill the memory
            return tuple(tokens.encode(labels, self._vocabulary))
        return self._kept_tokens(labels)

    @functools.lru_cache(maxsize=512)  # noqa: B019  (lives as long as the student)
    def _kept_tokens(self, labels: tuple[str, ...]) -> tuple[list[int], ...]:
        return tuple(tokens.encode(labels, self._vocabulary))

    # --------------------------------------------------------------------------------- answers

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        if not questions:
            return []
        prepared = self.prepare(questions)
        good = [n for n, each in enumerate(prepared) if each.error is None]
        wants = self._settings.rationale
        explained: dict[int, _Result] = {}
        if len(self._objectives) > 1:  # the second writes rationales: only for questions that need or want one
            asked = [n for n in good if self._two_steps or questions[n].rationale]
            explained = dict(zip(asked, self._results(1, [prepared[n] for n in asked]), strict=True))
        rows = [prepared[n] for n in good]
        if self._two_steps:
            rows = self._with_rationales(rows, [explained[n].text for n in good])
        found: dict[int, Answer] = {}
        for n, (prediction, score, scores, text) in zip(good, self._results(0, rows), strict=True):
            rationale = None
            if wants and questions[n].rationale and explained:
                rationale = explained[n].prediction
            elif wants and questions[n].rationale:
                text = prepared[n].numbers.fill(text)
                rationale = text.rpartition(selection.ANSWER_MARKER)[0].strip() or text.strip()
            found[n] = Answer(
                id=questions[n].id, prediction=prediction, score=score, rationale=rationale, scores=scores
            )
        return [
            found.get(n) or Answer(id=each.id, prediction=None, score=None, error=each.error)
            for n, each in enumerate(prepared)
        ]

    def _results(self, number: int, rows: Sequence[_Prepared]) -> list[_Result]:
        """Answers the rows by one objective, in order."""
        objective = self._objectives[number]
        if objective.decoding == CHOICES:
            return self._chosen(number, rows)
        parts = [_Part(row.id, row.sources[number], self._generating) for row in rows]
        found = []
        for row, (ids, score) in zip(rows, self._computed(number, parts), strict=True):
            text = self._vocabulary.decode(ids)
            prediction = registry.graded_text(row.numbers.fill(text), kind=objective.kind)
            found.append(_Result(prediction, score, None, text))
        return found

    def _chosen(self, number: int, rows: Sequence[_Prepared]) -> list[_Result]:
        parts = []
        for row in rows:
            form = self._form(row.choices, source=len(row.sources[number]))
            parts += [
                _Part(row.id, row.sources[number], form, row.choices[start : start + form.choices])
                for start in range(0, len(row.choices), form.choices)
            ]
        scored = iter(zip(parts, self._computed(number, parts), strict=True))
        found = []
        for row in rows:
            log_p: list[float] = []
            while len(log_p) < len(row.labels):
                part, (log_p_N,) = next(scored)
                log_p += log_p_N[: len(part.choices)].tolist()
            log_p_N = np.asarray(log_p, np.float64)
            p_N = np.exp(log_p_N - log_p_N.max())
            best = int(np.argmax(log_p_N))
            scores = dict(zip(row.labels, (p_N / p_N.sum()).tolist(), strict=True))
            found.append(_Result(row.labels[best], float(log_p_N[best]), scores, row.labels[best]))
        return found

    def _computed(self, number: int, parts: Sequence[_Part]) -> list[tuple[Any, ...]]:
        """Returns the results of each part, in order. A batch holds parts of one form; its first is the longest."""
        order = sorted(range(len(parts)), key=lambda n: (*parts[n].form.size, len(parts[n].source)), reverse=True)
        found: dict[int, tuple[Any, ...]] = {}
        start = 0
        while start < len(order):
            form = parts[order[start]].form
            chunk = [n for n in order[start : start + form.rows] if parts[n].form == form]
            start += len(chunk)
            found |= zip(chunk, self._batch(number, [parts[n] for n in chunk]), strict=True)
        return [found[n] for n in range(len(parts))]

    def _batch(self, number: int, parts: Sequence[_Part]) -> list[tuple[Any, ...]]:
        objective, form = self._objectives[number], parts[0].form
        program = self._program(number, form, rows=len(parts), length=len(parts[0].source))
        arrays = [shapes.padded([part.source for part in parts], program.length)]
        if objective.decoding == SAMPLE:
            arrays.append(np.stack([_key(part.id, seed=self._settings.seed, kind=objective.kind) for part in parts]))
        if objective.decoding == CHOICES:
            filled = [[*part.choices, *[[]] * (form.choices - len(part.choices))] for part in parts]
            arrays.append(np.stack([shapes.padded(choices, form.tokens) for choices in filled]))
            found = self._generators[number].batches(self._parameters, *arrays, sizes=[program.rows])
            return [(log_p_N,) for log_p_BN in found for log_p_N in log_p_BN]
        return list(self._generators[number].run(self._parameters, *arrays, sizes=[program.rows]))

    # -------------------------------------------------------------------------------- programs

    def _program(self, number: int, form: shapes.Form, *, rows: int, length: int) -> shapes.Program:
        """Chooses the program of a batch: with fixed shapes, among those that are compiled."""
        known = (
            [each for each in self._compiled if (each.objective, each.form) == (number, form)] if self._fixed else []
        )
        known = known or shapes.programs(number, form, sizes=self._generators[number].sizes)
        return shapes.cheapest(known, rows=rows, length=length)

    def programs(self) -> list[shapes.Program]:
        """Lists the programs that are known before the questions, the most useful first."""
        found = [
            shapes.programs(number, form, sizes=self._generators[number].sizes)
            for number, objective in enumerate(self._objectives)
            for form in (self._scoring if objective.decoding == CHOICES else [self._generating])
        ]
        return list(dict.fromkeys(itertools.chain(*found)))

    def least(self) -> list[shapes.Program]:
        """Lists the fewest programs that can answer every question: of each objective, the labels and any choices."""
        forms = {self._generating, *self._scoring[-1:], *(self._scoring[:1] if self.labels is not None else ())}
        first = {(each.objective, each.form): each for each in reversed(self.programs())}
        return [program for (_, form), program in first.items() if form in forms]

    def compile(self, program: shapes.Program) -> None:
        """Compiles a program, or loads it from disk, by computing rows of padding, which end at once."""
        arrays = program.blank(keys=self._objectives[program.objective].decoding == SAMPLE)
        for _ in self._generators[program.objective].batches(self._parameters, *arrays, sizes=[program.rows]):
            pass
        self._compiled = (*self._compiled, program)


def _key(row_id: str, *, seed: int, kind: str) -> np.ndarray:
    """Derives a row's sampling key, uint32 [2], from the seed, its id and the objective only."""
    digest = hashlib.blake2b(f"{seed}\0{kind}\0{row_id}".encode(errors="surrogatepass"), digest_size=8).digest()
    return np.frombuffer(digest, np.uint32)
