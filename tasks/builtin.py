"""The built-in dataset: questions about lost things, and a scripted teacher. No download, no account.

A row describes a thing by seven properties and asks one of eight questions:

    A tiny red iron lamp, found in the garden in March by the baker. Will it float?     -> no

An answer takes two steps: find the relevant property, and know its consequence. The teacher writes both, in the raw
form of a hosted model without a stop string:

    Iron sinks. So the answer is no.\\n\\nQ: A huge white wool bell, found ..

The consequence ("iron sinks") is general knowledge: the embedded student has seen it in its pre-training text
(`tasks/builtin_corpus.py`), which has no questions and no answers.

A seed generates everything, as files in the layout of the official release, which are then imported, parsed and
recorded like any other dataset.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sbs_jax.data.dataset import Dataset, Row
from sbs_jax.data.grading import accuracy, same_text
from sbs_jax.data.parsing import (
    LABEL_NOT_IN_SET,
    NO_LABEL,
    Parsed,
    member,
    split_answer,
    strict_reply,
    unusable,
    usable,
    without_full_stop,
)
from sbs_jax.data.release import SPLITS, read_inputs
from sbs_jax.storage.json_files import text_field

NAME = "builtin"
LABELS = ("yes", "no")
MARKER = "So the answer is"
DATA = Path(__file__).parent / "builtin_data"


def vocabulary_path() -> str:
    """Returns the path of the embedded student's SentencePiece model; a function, for gin."""
    return str(DATA / "sentencepiece.model")


def student_path() -> str:
    """Returns the path of the embedded student's pre-trained parameters."""
    return str(DATA / "student.npz")


# Share of rows with a wrong fact and the wrong answer.
WRONG = 0.15
# Share of rows with an unusable reply: truncated, without an answer, or with one outside the label set.
UNUSABLE = 0.05
# Share of replies that run on into an invented next example, like those of a model without a stop string.
RUNS_ON = 0.8

# Values of each property, as used in a description.
PROPERTIES: Mapping[str, tuple[str, ...]] = {
    "size": ("tiny", "little", "small", "medium", "large", "big", "huge", "giant"),
    "colour": ("red", "green", "black", "brown", "white", "silver", "cream", "yellow"),
    "material": ("iron", "copper", "stone", "glass", "wood", "paper", "wool", "wax"),
    "thing": ("lamp", "candle", "torch", "bell", "drum", "flute", "knife", "saw"),
    "place": ("garden", "harbour", "beach", "roof", "cellar", "attic", "kitchen", "library"),
    "month": ("January", "February", "March", "April", "July", "August", "October", "December"),
    "finder": ("baker", "cook", "farmer", "gardener", "sailor", "miner", "judge", "clerk"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A question about one property: its answer is `yes` for the values in `values`, else `no`."""

    text: str
    about: str
    values: tuple[str, ...]
    yes: str
    no: str

    def label(self, value: str) -> str:
        """Returns the right answer for a thing with this value."""
        return "yes" if value in self.values else "no"

    def fact(self, value: str) -> str:
        """Returns the true consequence of a value: "Iron sinks."."""
        return self.claim(value, self.label(value))

    def claim(self, value: str, label: str) -> str:
        """Returns the sentence that argues for `label`, true or not."""
        return f"{value[0].upper()}{value[1:]} {self.yes if label == 'yes' else self.no}."


def _question(text: str, about: str, values: str, yes: str, no: str) -> Question:
    return Question(text=text, about=about, values=tuple(values.split()), yes=yes, no=no)


QUESTIONS = (
    _question("Will it float?", "material", "wood paper wax", "floats", "sinks"),
    _question("Will fire destroy it?", "material", "wood paper wool wax", "burns", "outlasts fire"),
    _question("Can it carry a current?", "material", "iron copper", "conducts", "insulates"),
    _question("Does it break when dropped?", "material", "glass wax", "cracks", "stays whole"),
    _question("Must it be kept dry?", "material", "iron wood paper", "suffers from damp", "bears damp"),
    _question("Does it fit in a pocket?", "size", "tiny little", "fits a pocket", "fills a bag"),
    _question("Can it lie in a drawer?", "size", "tiny little small medium", "fits a drawer", "needs a shelf"),
    _question("Must two people lift it?", "size", "huge giant", "needs two people", "needs one hand"),
    _question("Is it easy to see in snow?", "colour", "red green black brown", "stands out", "blends in"),
    _question("Will it look dirty soon?", "colour", "white silver cream", "shows stains", "hides stains"),
    _question("Could an apple look like that?", "colour", "red green yellow", "suits apples", "suits no apple"),
    _question("Does it help at night?", "thing", "lamp candle torch", "gives light", "stays dark"),
    _question("Might it wake a baby?", "thing", "bell drum flute", "makes noise", "keeps quiet"),
    _question("Should a child leave it alone?", "thing", "candle torch knife saw", "hurts fingers", "spares fingers"),
    _question("Did rain fall on it?", "place", "garden harbour beach roof", "gets rain", "keeps off rain"),
    _question("Was a boat close by?", "place", "harbour beach", "has boats", "has no boats"),
    _question("Did someone have to climb?", "place", "roof attic", "lies high", "lies low"),
    _question("Did the finder wear a coat?", "month", "January February December", "is cold", "is mild"),
    _question("Was the year still young?", "month", "January February March April", "comes early", "comes late"),
    _question("Were the trees green?", "month", "April July August", "has leaves", "has no leaves"),
    _question("Was school closed?", "month", "July August December", "has holidays", "has lessons"),
    _question("May it smell of food?", "finder", "baker cook farmer", "makes food", "makes no food"),
    _question("Does the finder know mud?", "finder", "farmer gardener miner", "works in earth", "works in rooms"),
    _question("Is the finder up before dawn?", "finder", "baker farmer sailor", "wakes early", "sleeps long"),
    _question("Does the finder own many books?", "finder", "judge clerk", "reads much", "reads little"),
)

# Questions of the dataset; the other facts are in the pre-training text only. With eight questions, a few hundred
# examples have about 50 of each, where the methods differ most (docs/experiments.md).
ASKED = tuple(
    question
    for question in QUESTIONS
    if question.text
    in (
        *("Will it float?", "Can it carry a current?", "Does it fit in a pocket?", "Is it easy to see in snow?"),
        *("Does it help at night?", "Did rain fall on it?", "Did the finder wear a coat?", "May it smell of food?"),
    )
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A thing (property -> value), the order of place, month and finder in its description, and a question about it."""

    thing: Mapping[str, str]
    order: tuple[str, ...]
    question: Question

    @property
    def value(self) -> str:
        """Value that decides the answer."""
        return self.thing[self.question.about]

    @property
    def text(self) -> str:
        """Input of the student."""
        return f"{description(self.thing, order=self.order)} {self.question.text}"

    @property
    def label(self) -> str:
        """Right answer."""
        return self.question.label(self.value)


def random_thing(random_: random.Random) -> tuple[dict[str, str], tuple[str, ...]]:
    """Draws a thing and the order of its description's second half, all uniform."""
    thing = {name: random_.choice(values) for name, values in PROPERTIES.items()}
    return thing, tuple(random_.sample(("place", "month", "finder"), 3))


def description(thing: Mapping[str, str], *, order: tuple[str, ...]) -> str:
    """Describes a thing: "A tiny red iron lamp, found in the garden in March by the baker."."""
    found = {
        "place": f"in the {thing['place']}",
        "month": f"in {thing['month']}",
        "finder": f"by the {thing['finder']}",
    }
    first = " ".join(thing[name] for name in ("size", "colour", "material", "thing"))
    return f"A {first}, found {' '.join(found[name] for name in order)}."


def random_problem(random_: random.Random) -> Problem:
    """Draws a problem; questions are uniform, and so are the two answers to each."""
    thing, order = random_thing(random_)
    question = random_.choice(ASKED)
    label = random_.choice(LABELS)
    fitting = [value for value in PROPERTIES[question.about] if question.label(value) == label]
    return Problem(thing=thing | {question.about: random_.choice(fitting)}, order=order, question=question)


def problem_of(text: str) -> Problem:
    """Finds the last problem in a text, such as a prompt that ends with one. ValueError if there is none.

    >>> problem_of("Q: A tiny red iron lamp, found in March by the baker in the roof. Will it float?\\nA:").label
    'no'
    """
    words = {name: f"(?P<{name}>{'|'.join(values)})" for name, values in PROPERTIES.items()}
    second = {
        "place": f"in the {words['place']}",
        "month": f"in {words['month']}",
        "finder": f"by the {words['finder']}",
    }
    first = " ".join(words[name] for name in ("size", "colour", "material", "thing"))
    asked = {question.text: question for question in QUESTIONS}
    question = "|".join(re.escape(text) for text in asked)
    found = None
    for order in itertools.permutations(second):
        pattern = rf"A {first}, found {' '.join(second[name] for name in order)}\. (?P<question>{question})"
        for match in re.finditer(pattern, text):
            if found is None or match.start() > found[0]:
                parts = match.groupdict()
                found = match.start(), Problem(question=asked[parts.pop("question")], thing=parts, order=order)
    if found is None:
        raise ValueError(f"{text[-200:]!r} contains no problem such as {random_problem(random.Random(0)).text!r}.")
    return found[1]


def teacher_reply(problem: Problem, random_: random.Random) -> str:
    """Writes the scripted teacher's reply: the raw text of a model without a stop string."""
    question, label = problem.question, problem.label
    roll = random_.random()
    if roll < WRONG:
        label = LABELS[1 - LABELS.index(label)]
        others = [value for value in PROPERTIES[question.about] if question.label(value) == label]
        # Half of the errors misread the description, half know the wrong fact.
        misread = random_.random() < 0.5
        rationale = question.fact(random_.choice(others)) if misread else question.claim(problem.value, label)
    else:
        rationale = question.fact(problem.value)
    reply = f"{rationale} {MARKER} {label}."
    if WRONG <= roll < WRONG + UNUSABLE:
        reply = random_.choice((rationale, f"{rationale} {MARKER} {problem.value}.", f"{rationale} {MARKER}"))
    if random_.random() < RUNS_ON:
        other = random_problem(random_)
        reply += f"\n\nQ: {other.text}\nA: {other.question.fact(other.value)} {MARKER} {other.label}."
    return reply


def write_release(folder: Path, *, rows: Mapping[str, int], seed: int) -> None:
    """Writes `<folder>/builtin/` in the layout of the official release: inputs and the teacher's replies.

    `rows` is the number of rows per split ("train", "validation", "test"). No input occurs twice, within or across
    splits. A split depends only on the seed and the splits before it.
    """
    random_ = random.Random(seed)
    seen: set[str] = set()
    (folder / NAME / "llm").mkdir(parents=True, exist_ok=True)
    for split, count in rows.items():
        problems: list[Problem] = []
        while len(problems) < count:
            problem = random_problem(random_)
            if problem.text not in seen:
                seen.add(problem.text)
                problems.append(problem)
        lines = [json.dumps({"input": problem.text, "label": problem.label}) for problem in problems]
        (folder / NAME / f"{NAME}_{SPLITS[split]}.json").write_text("\n".join(lines) + "\n", "utf-8")
        replies = [teacher_reply(problem, random_) for problem in problems]
        (folder / NAME / "llm" / f"{SPLITS[split]}_CoT_0.json").write_text(json.dumps(replies, indent=0), "utf-8")


def row(fields: Mapping[str, Any]) -> Row:
    """Makes a row from a line of the release."""
    return Row(input=text_field(fields, "input"), label=text_field(fields, "label"))


def read_release(release_dir: Path) -> dict[str, list[Row]]:
    """Reads the rows of each split, in file order."""
    return read_inputs(release_dir, NAME, row)


def official(text: str, row: Row) -> Parsed:
    """Parses as the official code reads CQA: up to "Q:", split at the marker, any label."""
    del row
    found = split_answer(text.split("Q:")[0].rstrip(), MARKER)
    if isinstance(found, Parsed):
        return found
    return usable(found[0].rstrip(), without_full_stop(found[1]))


def strict(text: str, row: Row) -> Parsed:
    """Parses up to a line that begins with "Q:"; the label must be yes or no."""
    del row

    def read(rationale: str, answer: str) -> Parsed:
        label = member(answer, LABELS)
        return unusable(LABEL_NOT_IN_SET if answer else NO_LABEL) if label is None else usable(rationale, label)

    return strict_reply(text, stops=("Q:",), marker=MARKER, read=read)


@functools.cache
def _claims() -> dict[str, str]:
    """Maps every sentence of `Question.claim`, in lower case as in the vocabulary, to the answer that it argues for."""
    return {
        question.claim(value, label).lower(): label
        for question in QUESTIONS
        for value in PROPERTIES[question.about]
        for label in LABELS
    }


def implied_label(rationale: str, choices: Sequence[str]) -> str | None:
    """Returns the answer that a claim argues for, even if the claim is false.

    >>> implied_label("Iron sinks.", ())
    'no'
    """
    del choices
    return _claims().get(rationale.strip().lower())


def scripted_reply(asked: str, sample: int) -> str | None:
    """Replies to a prompt, with the label of its hint if it has one; None if it contains no problem."""
    try:
        problem = problem_of(asked)
    except ValueError:
        return None
    # A hint is a label among the words around the problem.
    hints = [label for label in LABELS if re.search(rf"\b{label}\b", asked.replace(problem.text, ""))]
    if len(hints) == 1:
        return f"{problem.question.claim(problem.value, hints[0])} {MARKER} {hints[0]}."
    return teacher_reply(problem, random.Random(f"{problem.text} {hints} {sample}"))


DATASET = Dataset(
    name=NAME,
    labels=LABELS,
    read_release=read_release,
    parsers={"official": official, "strict": strict},
    metric_fns=(accuracy,),
    primary_metric="accuracy",
    same_label=same_text,
    feature_lengths={"inputs": 32, "targets": 16},
    implied_label=implied_label,
    scripted_reply=scripted_reply,
)
