"""Answers to questions by a trained student; an unanswerable question gets an answer with its error.

`sbs predict` and `sbs serve` use `Predictor`. It knows the prefixes, vocabulary and lengths that the student was
trained with. Rows are grouped by length and padded to one of a few lengths (`evaluate.buckets`), each compiled once.
Except for rounding, an answer depends neither on its neighbors nor on the padding.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from sbs_jax import checks, compiling
from sbs_jax.prediction.answerer import Answerer
from sbs_jax.prediction.inputs import Question as Question  # parts of this module's interface
from sbs_jax.prediction.settings import CHOICES as CHOICES
from sbs_jax.prediction.settings import Answer as Answer
from sbs_jax.prediction.settings import Settings as Settings
from sbs_jax.storage import json_files
from sbs_jax.student import partitioning
from sbs_jax.training import students


class Predictor:
    """A loaded student (and others that share its base), compiled for a few shapes. Call `answer` from one thread."""

    def __init__(
        self,
        students: Mapping[str | None, students.Student],
        *,
        settings: Settings,
        places: Mapping[str | None, str] | None = None,
        fixed_shapes: bool = False,
        cache: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        """Takes students by adapter name; None names the one for questions without an adapter.

        With `fixed_shapes`, `programs` are all that `answer` will ever need, for a server; until all are compiled, it
        pads to those that are. Otherwise rows with choices of a new size compile a program of their size, which is
        faster for many rows. `cache` is entered whenever a program is compiled (compiling.Progress).
        """
        self.settings = settings
        self.progress = compiling.Progress(at_most=not fixed_shapes, cache=cache)
        self._answerers = {
            name: Answerer(
                student,
                settings=settings,
                owner=(places or {}).get(name, "this student"),
                fixed_shapes=fixed_shapes,
                progress=self.progress,
            )
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
        fixed_shapes: bool = False,
        dataset: str | None = None,
    ) -> "Predictor":
        """Loads the student of a run, and by adapter name those of other runs over the same base.

        Each device of this process gets a copy; those of other processes are not used. Of students of several
        datasets, `dataset` chooses the one to answer for.
        """
        adapters = adapters or {}
        student, others = students.load_students(
            *(model, adapters),
            layout=partitioning.DATA_PARALLEL,
            base=base,
            dataset=dataset,
            devices=jax.local_devices(),
        )
        places = {None: str(model), **{name: str(place) for name, place in adapters.items()}}
        return cls({None: student, **others}, settings=settings, places=places, fixed_shapes=fixed_shapes)

    def describe(self) -> dict[str, Any]:
        """Returns everything the answers depend on, as JSON: settings, and each student's step and checksum."""
        students = {name or "": answerer.describe() for name, answerer in self._answerers.items()}
        return {"settings": dataclasses.asdict(self.settings), "students": students}

    def check(self, question: Question) -> str | None:
        """Returns the reason this question cannot be answered, or None."""
        error = self._misfit(question)
        return error or self._answerers[question.adapter].prepare([question])[0].error

    def work(self, question: Question) -> int:
        """Estimates a question's work in rows: with choices, one for every 8 of them of 8 tokens, else one."""
        answerer = self._answerers.get(question.adapter)
        if self.settings.decoding != CHOICES or answerer is None:
            return 1
        return answerer.work(question.choices)

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Answers the questions, in order."""
        errors = [self._misfit(question) for question in questions]
        found: dict[int, Answer] = {}
        for name, answerer in self._answerers.items():
            numbers = [n for n, q in enumerate(questions) if errors[n] is None and q.adapter == name]
            found |= zip(numbers, answerer.answer([questions[n] for n in numbers]), strict=True)
        return [
            found.get(n) or Answer(id=question.id, prediction=None, score=None, error=errors[n])
            for n, question in enumerate(questions)
        ]

    def programs(self) -> tuple[list[Callable[[], None]], list[Callable[[], None]]]:
        """Returns what compiles each program, or loads it from disk: those that can answer every question, the others.

        The others only pad less. They may be compiled by another thread than that of `answer`.
        """
        found: tuple[list[Callable[[], None]], list[Callable[[], None]]] = ([], [])
        for answerer in self._answerers.values():
            least = answerer.least()
            for program in answerer.programs():
                found[program not in least].append(functools.partial(answerer.compile, program))
        return found

    def _misfit(self, question: Question) -> str | None:
        if question.adapter not in self._answerers:
            return unknown_adapter(question.adapter, [name for name in self._answerers if name is not None])
        try:
            json_files.check_encodes([question.input, *(question.choices or ())])
        except ValueError as error:
            return str(error)
        return None


def unknown_adapter(name: str | None, known: Sequence[str]) -> str:
    """Returns the error for an unknown adapter name, with the known ones."""
    listed = ", ".join(map(repr, known))
    there = f"Known are {listed}" if listed else "None are loaded: give --adapters NAME=RUN"
    near = checks.nearest(str(name)[:200], known)
    return f"no adapter is named {json_files.brief(name)}.{near} {there}."
