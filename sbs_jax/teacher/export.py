"""Export of stored replies as records, which depend only on input, prompt, settings and store (same bytes every time).

An export can run before sampling is finished (rows without a reply are marked), and again afterwards.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from sbs_jax.data import parsing
from sbs_jax.data.dataset import Row
from sbs_jax.data.records import Rationale, Record
from sbs_jax.teacher import prompts, sampler
from sbs_jax.teacher.clients import Reply
from sbs_jax.teacher.store import Failure, Store

if TYPE_CHECKING:
    from sbs_jax.data.dataset import Dataset

_CHUNK = 256  # rows whose replies are read together


@dataclasses.dataclass(frozen=True)
class Question:
    """A row of a dataset as a `sampler.Asked`."""

    dataset: Dataset
    template: prompts.Template
    parser: str
    row: Row

    @property
    def id(self) -> str:
        assert self.row.id is not None  # read_unanswered gave every row one
        return self.row.id

    @property
    def label(self) -> str | None:
        return self.row.label

    def prompt(self, *, hint: str | None) -> prompts.Prompt:
        return prompts.render(self.template, self.row.input, hint=hint)

    def parse(self, text: str) -> parsing.Parsed:
        return self.dataset.parse(text, self.row, parser=self.parser)

    def read(self, text: str) -> tuple[str | None, str | None]:
        parsed = self.parse(text)
        return parsed.rationale, parsed.label

    def agrees(self, label: str) -> bool:
        return self.row.label is not None and self.dataset.same_label(self.row.label, label)


@dataclasses.dataclass(frozen=True)
class Answered:
    """A row's record, and its replies in sample order."""

    record: Record
    replies: tuple[str, ...]


def answers(questions: Iterable[Question], *, settings: sampler.Settings, store: Store) -> Iterator[Answered]:
    """Yields one record per question, in order."""
    questions = iter(questions)
    while some := list(itertools.islice(questions, _CHUNK)):
        # The first request of every sample is looked up here, together; retries and hints are rare.
        keys = [
            sampler.request_of(question, settings, sample=sample).key
            for question in some
            for sample in range(settings.samples)
        ]
        found: dict[str, Reply | Failure | None] = {**dict.fromkeys(keys), **store.find(keys)}
        for question in some:
            yield _answer(question, settings, lambda key, found=found: found[key] if key in found else store.get(key))


def _answer(
    question: Question, settings: sampler.Settings, look_up: Callable[[str], Reply | Failure | None]
) -> Answered:
    got = [sampler.answer_of(question, settings, look_up, sample=sample) for sample in range(settings.samples)]
    parsed = [question.parse(reply.text) if isinstance(reply, Reply) else None for reply in got]
    labels = [None if each is None else each.label for each in parsed]
    same_label = question.dataset.same_label
    chosen = sampler.majority(labels, same_label)
    label = None if chosen is None else labels[chosen]
    texts = tuple(reply.text for reply in got if isinstance(reply, Reply))
    plain = Record(
        id=question.id,
        input=question.row.input,
        label=question.row.label,
        choices=question.row.choices,
        weight=question.row.weight,
        prompt=question.template.hash,
    )
    if settings.hint and question.label is not None and (label is None or not question.agrees(label)):
        reply = sampler.answer_of(question, settings, look_up, sample=0, hint=question.label)
        if isinstance(reply, Reply):
            read = question.parse(reply.text)
            # Keep the first reply: a second one that still disagrees is no better.
            if read.label is not None and question.agrees(read.label):
                return Answered(_record(plain, reply, read, others=parsed, hinted=True), (*texts, reply.text))
    # If no sample has a label, the first one gives the outcome.
    reply, read = got[chosen or 0], parsed[chosen or 0]
    if not isinstance(reply, Reply):
        reason = reply.reason if isinstance(reply, Failure) else parsing.NOT_ASKED
        return Answered(dataclasses.replace(plain, outcome=reason), texts)
    assert read is not None  # it was parsed above
    votes = None
    if settings.samples > 1 and label is not None:
        votes = (sum(each is not None and same_label(label, each) for each in labels), settings.samples)
    return Answered(_record(plain, reply, read, others=parsed, votes=votes), texts)


def _record(
    plain: Record,
    reply: Reply,
    read: parsing.Parsed,
    *,
    others: Iterable[parsing.Parsed | None],
    hinted: bool = False,
    votes: tuple[int, int] | None = None,
) -> Record:
    """Makes the record of a reply; `others` are all samples, from which it gets further rationales."""
    texts = {read.rationale}
    kept = []
    for each in others:
        # Both parts must be usable: nothing tells what a rationale without a label argues for.
        if each is not None and each.rationale is not None and each.label is not None and each.rationale not in texts:
            texts.add(each.rationale)
            kept.append(Rationale(rationale=each.rationale, teacher_label=each.label))
    return dataclasses.replace(
        plain,
        teacher_text=reply.text,
        rationale=read.rationale,
        teacher_label=read.label,
        outcome=read.outcome,
        hinted=hinted,
        votes=votes,
        other_rationales=tuple(kept),
    )


def described(template: prompts.Template, settings: sampler.Settings) -> dict[str, Any]:
    """Describes the teacher's model, parameters and prompt for a manifest, without settings of speed."""
    return {
        "model": settings.model,
        "form": settings.form,
        "parameters": {k: v for k, v in dataclasses.asdict(settings.parameters).items() if k != "more" or v},
        "samples": settings.samples,
        "hint": settings.hint,
        "prompt": template.hash,
        "prompt_version": template.version,
    }
