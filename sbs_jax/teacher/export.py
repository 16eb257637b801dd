"""Stored replies to records: `<records_dir>/<dataset>/` with its manifest, the same bytes every time.

What a row becomes depends on its input, the prompt, the settings and the stored replies alone; so an export can be made
while the sampling is not finished (rows without a reply say so), and again when it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbs_jax.data import parsing, release
from sbs_jax.data.dataset import Row
from sbs_jax.data.records import Manifest, Record
from sbs_jax.teacher import prompts, sampler
from sbs_jax.teacher.clients import Reply
from sbs_jax.teacher.store import Failure, Store

if TYPE_CHECKING:
    from sbs_jax.data.dataset import Dataset

# Rows whose replies are read together.
_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class Question:
    """A row of a dataset as the sampler asks about it (`sampler.Asked`)."""

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
        """What the dataset's parser reads from a reply."""
        return self.dataset.parsers[self.parser](text, self.row)

    def read(self, text: str) -> tuple[str | None, str | None]:
        parsed = self.parse(text)
        return parsed.rationale, parsed.label

    def agrees(self, label: str) -> bool:
        return self.row.label is not None and self.dataset.same_label(self.row.label, label)


@dataclasses.dataclass(frozen=True)
class Answered:
    """A row's record, and the replies that it was made from, in the order of the samples."""

    record: Record
    replies: tuple[str, ...]


def answers(
    dataset: Dataset,
    rows: Sequence[Row],
    *,
    template: prompts.Template,
    parser: str,
    settings: sampler.Settings,
    store: Store,
) -> Iterator[Answered]:
    """One record per row, in the rows' order."""
    for start in range(0, len(rows), _CHUNK):
        questions = [Question(dataset, template, parser, row) for row in rows[start : start + _CHUNK]]
        # The first ask of every sample together; the rest is rare, and looked up one by one.
        keys = [
            sampler.request_of(question, settings, sample=sample).key
            for question in questions
            for sample in range(settings.samples)
        ]
        found = store.find(keys)
        for number, question in enumerate(questions):
            mine = keys[number * settings.samples : (number + 1) * settings.samples]
            yield _answer(question, [found.get(key) for key in mine], settings=settings, store=store)


def _answer(
    question: Question, first: list[Reply | Failure | None], *, settings: sampler.Settings, store: Store
) -> Answered:
    got = [
        _with_room(question, reply, settings=settings, store=store, sample=sample, hint=None)
        for sample, reply in enumerate(first)
    ]
    parsed = [question.parse(reply.text) if isinstance(reply, Reply) else None for reply in got]
    labels = [None if each is None else each.label for each in parsed]
    chosen = sampler.majority(labels, question.dataset.same_label)
    label = None if chosen is None else labels[chosen]
    votes = None
    if settings.samples > 1 and label is not None:
        same = sum(each is not None and question.dataset.same_label(label, each) for each in labels)
        votes = (same, settings.samples)
    texts = tuple(reply.text for reply in got if isinstance(reply, Reply))
    plain = Record(
        id=question.id,
        input=question.row.input,
        label=question.row.label,
        choices=question.row.choices,
        prompt=question.template.hash,
    )
    if settings.hint and question.label is not None and (label is None or not question.agrees(label)):
        hinted = sampler.request_of(question, settings, sample=0, hint=question.label)
        reply = _with_room(
            question, store.get(hinted.key), settings=settings, store=store, sample=0, hint=question.label
        )
        if isinstance(reply, Reply):
            read = question.parse(reply.text)
            # A second reply that still says something else is no better than the first.
            if read.label is not None and question.agrees(read.label):
                return Answered(_record(plain, reply, read, hinted=True), (*texts, reply.text))
    if chosen is None:
        # Nothing to use: what became of the first sample says why.
        reply, read = got[0], parsed[0]
        if isinstance(reply, Reply):
            assert read is not None  # it was parsed above
            return Answered(_record(plain, reply, read), texts)
        reason = parsing.NOT_ASKED if reply is None else reply.reason
        return Answered(dataclasses.replace(plain, outcome=reason), texts)
    reply, read = got[chosen], parsed[chosen]
    assert isinstance(reply, Reply)  # a label was read from it
    assert read is not None
    return Answered(_record(plain, reply, read, votes=votes), texts)


def _record(
    plain: Record, reply: Reply, read: parsing.Parsed, *, hinted: bool = False, votes: tuple[int, int] | None = None
) -> Record:
    return dataclasses.replace(
        plain,
        teacher_text=reply.text,
        rationale=read.rationale,
        teacher_label=read.label,
        outcome=read.outcome,
        hinted=hinted,
        votes=votes,
    )


def _with_room(
    question: Question,
    reply: Reply | Failure | None,
    *,
    settings: sampler.Settings,
    store: Store,
    sample: int,
    hint: str | None,
) -> Reply | Failure | None:
    """The reply that ended, among those with more and more room; a failure where none did."""
    for room in range(1, sampler.ROOM_STEPS + 1):
        if not isinstance(reply, Reply) or reply.finish != sampler.LENGTH:
            return reply
        request = sampler.request_of(question, settings, sample=sample, room=room, hint=hint)
        reply = store.get(request.key)
    if isinstance(reply, Reply) and reply.finish == sampler.LENGTH:
        return Failure(parsing.CUT_SHORT, "")
    return reply


def write(
    dataset: Dataset,
    splits: Mapping[str, release.Source],
    *,
    template: prompts.Template,
    parser: str,
    settings: sampler.Settings,
    store: Store,
    records_dir: str | Path,
    inputs: str,
    overwrite: bool,
) -> Manifest:
    """Writes the records of all splits, and a manifest that says how the teacher was asked."""
    found = {
        split: [
            answered.record
            for answered in answers(
                dataset, source.rows, template=template, parser=parser, settings=settings, store=store
            )
        ]
        for split, source in splits.items()
    }
    return release.write_directory(
        dataset,
        found,
        sources={split: source.sources for split, source in splits.items()},
        records_dir=records_dir,
        parser=parser,
        inputs=inputs,
        skipped={},
        overwrite=overwrite,
        teacher=described(template, settings),
    )


def described(template: prompts.Template, settings: sampler.Settings) -> dict[str, Any]:
    """How the teacher was asked, for a manifest; what only changes the speed is left out."""
    return {
        "model": settings.model,
        "form": settings.form,
        "parameters": dataclasses.asdict(settings.parameters),
        "samples": settings.samples,
        "hint": settings.hint,
        "prompt": template.hash,
        "prompt_version": template.version,
    }
