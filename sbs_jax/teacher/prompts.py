"""Prompts: an instruction, about ten solved examples (exemplars), and the question.

A dataset's prompt is one JSON file, `tasks/prompts/<dataset>.json`:

    {"version": 1,
     "instruction": "Solve each arithmetic problem. ..",
     "question": "Q: {input}\\nA:",
     "answer": "{rationale} The answer is {label}.",
     "hint": "(The correct answer is {label}. ..)",
     "stops": ["\\nQ:"],
     "exemplars": [{"input": "Ann has 3 pens and buys 4.\\nHow many pens has she?",
                    "rationale": "3 pens and 4 pens are 3 + 4 = 7 pens.", "label": "( 3.0 + 4.0 )"}, ..]}

If a row's input joins several texts, `split` is the text between them, and the question numbers them:

    "split": "</s>", "question": "Premise: {0}\\nHypothesis: {1}\\nReason:"

An exemplar's input has the form of a row's input, and its label the form that the teacher should write ("(b) tea").
`answer` must have the form that the dataset's strict parser reads.

A dataset's module, `tasks/<name>.py`, can call `add` with a `Template` instead of having a file. Standard library only.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from sbs_jax.checks import nearest, whole_number
from sbs_jax.storage.json_files import brief, read_json, typed

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
FOLDER = Path(__file__).parents[2] / "tasks" / "prompts"  # in the checkout and in the wheel

_PLACE = re.compile(r"\{(\w+)\}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exemplar:
    """A solved example. The label has the form that the teacher should write: "(b) tea"."""

    input: str
    rationale: str
    label: str


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a chat; the role is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """The prompt of one row, as chat messages and as one text to continue; `template` is its template's hash."""

    messages: tuple[Message, ...]
    text: str
    stops: tuple[str, ...]
    template: str

    def sent(self, form: str) -> str:
        """Returns all text that is sent in a form ("chat" or "completion"), for counting tokens."""
        return self.text if form == "completion" else "".join(message.content for message in self.messages)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Template:
    """One dataset's prompt. ValueError names the field if the parts do not fit together.

    Attributes:
      version: a number for people; code compares `hash`.
      instruction: the system message of a chat, the first paragraph of a text; may be empty.
      question: contains {input} once; with `split`, {0}, {1} and so on once each.
      answer: contains {rationale} and {label} once each.
      hint: contains {label}; a second request (`--hint`) has it on a separate line below the question's last line of
        input. None: there is no such request.
      stops: stop strings of a completion, which would otherwise continue with an invented example.
      exemplars: the solved examples, in order.
      split: the text between the parts of an input; None for an input of one part.
    """

    version: int
    instruction: str
    question: str
    answer: str
    hint: str | None = None
    stops: tuple[str, ...]
    exemplars: tuple[Exemplar, ...]
    split: str | None = None

    def __post_init__(self) -> None:
        whole_number("version", self.version, least=1)
        if self.split == "":
            raise ValueError("the field 'split' is empty; expected the text between an input's parts, or null.")
        found = _PLACE.findall(self.question)
        if self.split is None:
            _check_places("question", self.question, ("input",))
        elif len(found) < 2 or sorted(found) != [str(number) for number in range(len(found))]:
            raise ValueError(
                f"the field 'question' is {brief(self.question)}; with 'split', expected {{0}}, {{1}} and so on, once "
                "each."
            )
        _check_places("answer", self.answer, ("rationale", "label"))
        if self.hint is not None:
            _check_places("hint", self.hint, ("label",))
        if "" in self.stops:
            raise ValueError(f"the field 'stops' is {brief(list(self.stops))}; expected no empty text.")
        for number, exemplar in enumerate(self.exemplars):
            where = f"exemplars[{number}]"
            for name, text in vars(exemplar).items():
                if not text.strip():
                    raise ValueError(f"{where}: the field {name!r} is blank; expected text.")
            try:
                answer = self.asked(exemplar.input) and self.answered(exemplar)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            cut = [stop for stop in self.stops if stop in answer]
            if cut:
                raise ValueError(
                    f"{where}: the stop string {brief(cut[0])} is inside the answer {brief(answer)}; change either."
                )

    @functools.cached_property
    def hash(self) -> str:
        """Hashes every part of the template into 12 hexadecimal digits."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def asked(self, input: str, *, hint: str | None = None) -> str:  # noqa: A002  # the record's word
        """Fills the question with an input; `hint` is a label to reveal.

        Raises ValueError if `split` does not divide the input into as many parts as the question has, or the template
        has no hint to reveal it with.
        """
        question = self.question
        places = list(_PLACE.finditer(question))
        parts = {"input": input}
        if self.split is not None:
            texts = input.split(self.split)
            if len(texts) != len(places):
                raise ValueError(
                    f"the input {input[:80]!r} has {len(texts)} parts between {brief(self.split)}; the question of the "
                    f"prompt expects {len(places)}."
                )
            parts = {str(number): text for number, text in enumerate(texts)}
        if hint is None:
            return _filled(question, parts)
        end = question.find("\n", places[-1].end())
        end = len(question) if end < 0 else end
        if self.hint is None:
            raise ValueError("the prompt has no 'hint'; add one with {label}, or leave out --hint.")
        given = _filled(self.hint, {"label": hint})
        return f"{_filled(question[:end], parts)}\n{given}{_filled(question[end:], parts)}"

    def answered(self, exemplar: Exemplar) -> str:
        """Fills the answer with an exemplar."""
        return _filled(self.answer, {"rationale": exemplar.rationale, "label": exemplar.label})

    @functools.cached_property
    def _shown(self) -> tuple[tuple[Message, ...], str]:
        """Builds the part before every question, as chat messages and as text."""
        messages = [Message(SYSTEM, self.instruction)] if self.instruction else []
        paragraphs = [self.instruction] if self.instruction else []
        for exemplar in self.exemplars:
            asked, answered = self.asked(exemplar.input), self.answered(exemplar)
            messages += [Message(USER, asked), Message(ASSISTANT, answered)]
            paragraphs.append(f"{asked}{'' if asked[-1].isspace() else ' '}{answered}")
        return tuple(messages), "".join(f"{paragraph}\n\n" for paragraph in paragraphs)


def render(template: Template, input: str, *, hint: str | None = None) -> Prompt:  # noqa: A002  # the record's word
    """Renders the prompt about one input; `hint` reveals the known label and asks for its reasons.

    As text, for the template at the top of this module and one exemplar:

        Solve each arithmetic problem. ..

        Q: Ann has 3 pens and buys 4.
        How many pens has she?
        A: 3 pens and 4 pens are 3 + 4 = 7 pens. The answer is ( 3.0 + 4.0 ).

        Q: Half of the 84 seats are taken.
        How many are free?
        (The correct answer is ( 84.0 / 2.0 ). ..)
        A:

    A chat has the same texts as turns: system, then user and assistant per exemplar, then user. Exemplars never have a
    hint.
    """
    messages, text = template._shown
    asked = template.asked(input, hint=hint)
    return Prompt(
        messages=(*messages, Message(USER, asked)),
        text=text + asked,
        stops=template.stops,
        template=template.hash,
    )


# ------------------------------------------------------------------------------------ reading

_added: dict[str, Template] = {}


def add(dataset: str, template: Template) -> None:
    """Registers a template, for a dataset that keeps it in its own module."""
    if _added.setdefault(dataset, template) != template:
        raise ValueError(f"Another prompt is already registered for {dataset!r}; choose another name.")


def names() -> tuple[str, ...]:
    """Lists the datasets that have a prompt, sorted."""
    return tuple(sorted({path.stem for path in FOLDER.glob("*.json")} | _added.keys()))


def read(name_or_path: str | Path) -> Template:
    """Reads the template of a dataset ("svamp"), or of a file (a `Path`, or text with a "/" or ending in ".json").

    A dataset's template is the one that its module added (import `tasks` first), else `tasks/prompts/<name>.json`.
    ValueError has near matches, or file and field; FileNotFoundError names the file.
    """
    name, path = os.fspath(name_or_path), Path(name_or_path)
    if not (isinstance(name_or_path, Path) or name.endswith(".json") or "/" in name or os.sep in name):
        if name in _added:
            return _added[name]
        if name not in names():
            raise ValueError(
                f"There is no prompt for {name!r}; there are {list(names())}.{nearest(name, names())} Give a file with "
                f"--prompt, write tasks/prompts/{name}.json, or call sbs_jax.teacher.prompts.add in the dataset's "
                "module."
            )
        path = FOLDER / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"There is no prompt file {path}; its form is described in sbs_jax/teacher/prompts.py.")
    value = read_json(path)
    try:
        return typed(value, Template)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _check_places(field: str, text: str, names: tuple[str, ...]) -> None:
    """Raises ValueError unless the text has each of `names` once in braces, and no other word in braces."""
    found = _PLACE.findall(text)
    wanted = " and ".join(f"{{{name}}}" for name in names)
    for name in found:
        if name not in names:
            near = nearest(name[:100], names)
            raise ValueError(f"the field {field!r} has {{{name[:100]}}}; expected {wanted}.{near}")
    if sorted(found) != sorted(names):
        raise ValueError(f"the field {field!r} is {brief(text)}; expected {wanted} in it, once each.")


def _filled(text: str, parts: Mapping[str, str]) -> str:
    """Fills the placeholders of a text in one pass, so braces in the filled parts stay."""
    return _PLACE.sub(lambda match: parts[match[1]], text)
