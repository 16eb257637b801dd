"""The student to export: structure, arrays, card and vocabulary."""

import dataclasses
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sbs_jax.data import registry, tokens, vocabularies
from sbs_jax.export import card as cards
from sbs_jax.student import decoding, families, partitioning
from sbs_jax.training import students
from sbs_jax.weights.arrays import LazyArray, Opened

log = logging.getLogger(__name__)

ANSWER, RATIONALE = "answer", "rationale"
ARTEFACT = Path(__file__).parent / "artefact"


@dataclasses.dataclass(frozen=True)
class Student:
    """A student to export. Adapters that cannot be merged are part of `structure` and `arrays`."""

    structure: families.Structure
    arrays: Mapping[str, LazyArray]
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    card: Mapping[str, Any]
    vocabulary: vocabularies.Vocabulary

    @classmethod
    def of(cls, opened: Opened, *, source: str, form: str, base: str | None) -> "Student":
        """Makes the student of an opened checkpoint. Adapters are merged if a plain T5 can hold them.

        ValueError if its task is unknown.
        """
        card = cards.of(source, opened, form=form)
        if card is None:
            raise ValueError(
                f"{source} is neither a run of ours nor an export of one, so the form of its inputs and answers is "
                "unknown. Give a run directory, or an export that sbs convert made of one."
            )
        vocabulary = registry.vocabulary(vocabulary_of(opened, source))
        if opened.tuning is None:
            structure, shapes, _ = families.abstract(opened.config)
            return cls(structure, opened.arrays, shapes, card, vocabulary)
        student = students.load_student(source, layout=partitioning.DATA_PARALLEL, base=base)
        arrays = {name: LazyArray.of(np.asarray(x)) for name, x in student.parameters.items()}
        shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in student.parameters.items()}
        return cls(student.structure, arrays, shapes, card, vocabulary)

    @property
    def kind(self) -> vocabularies.Kind:
        """The kind of its vocabulary."""
        return vocabularies.KINDS[self.card["tokenizer"]["kind"]]

    def packages(self, *others: str) -> tuple[str, ...]:
        """Lists the packages that its `run.py` needs beside `others`."""
        return (*others, *((self.kind.library,) if self.kind.library else ()))

    @property
    def tasks(self) -> dict[str, int]:
        """Maps each task of the student to its longest answer in tokens."""
        found = {ANSWER: self.card["answer"]["max_new_tokens"]}
        if self.card["rationale"] is not None:
            found[RATIONALE] = self.card["rationale"]["max_new_tokens"]
        return found

    def greedy(self, parameters: families.Parameters, rows: jax.Array, *, length: int) -> tuple[jax.Array, jax.Array]:
        """Runs `decoding.greedy`. Traceable."""
        return decoding.greedy(families.join(self.structure, parameters), rows, length=length)

    def encoded(self, texts: Sequence[str]) -> np.ndarray:
        """Encodes texts that carry their prefix: int32 [N, S]."""
        return tokens.TokenTable.of(texts, self.vocabulary).padded(self.card["input"]["max_tokens"])

    def on_device(self) -> families.Parameters:
        """Loads all parameters, in the types of training."""
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return {
            name: self.arrays[name].onto(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place))
            for name, leaf in self.shapes.items()
        }


def vocabulary_of(opened: Opened, source: str) -> str:
    """Returns the vocabulary. ValueError if there is none."""
    if opened.vocabulary is None:
        raise ValueError(
            f"{source} has no tokenizer: no run's vocabulary, no spiece.model and no tokenizer.json. Name one "
            "with --vocabulary."
        )
    return opened.vocabulary


def write_runner(folder: Path, student: Student, *, model: str) -> None:
    """Writes a runnable artefact's `run.py`, `model.py`, and the vocabulary's file, with its sentinels."""
    for source, name in (("run.py", "run.py"), (model, "model.py")):
        shutil.copyfile(ARTEFACT / source, folder / name)
    file = student.kind.file
    if file is not None:
        (folder / file).write_bytes(student.vocabulary.contents)


def check_shapes(shapes: Sequence[tuple[int, int]], *, longest: int) -> None:
    """Requires rows of at most the longest input, and one shape that holds it."""
    for rows, length in shapes:
        if length > longest:
            raise ValueError(
                f"The shape {rows}x{length} is longer than this student's inputs, up to {longest} tokens. Give at most "
                f"{rows}x{longest}."
            )
    if all(length < longest for _, length in shapes):
        raise ValueError(
            f"No shape holds this student's longest input, {longest} tokens; add one such as {shapes[-1][0]}x{longest}."
        )


def check(
    student: Student, generate: Callable[[np.ndarray], Any], *, shape: tuple[int, int], samples: Sequence[str]
) -> dict[str, Any] | None:
    """Counts the samples that `generate` (rows [B, S] to tokens [B, T]) answers as the student does.

    The student answers in its own precision. None without samples.
    """
    if not samples:
        return None
    rows, length = shape
    source = student.encoded(samples)
    padded = np.zeros((-(-len(source) // rows) * rows, length), np.int32)
    padded[: len(source)] = source
    parameters = student.on_device()
    own = jax.jit(lambda p, x: student.greedy(p, x, length=student.tasks[ANSWER])[0])
    same: list[bool] = []
    for batch in np.split(padded, len(padded) // rows):
        same += (np.asarray(own(parameters, batch)) == np.asarray(generate(batch))).all(axis=1).tolist()
    same = same[: len(source)]
    return {"samples": len(same), "same_answers": sum(same), "percent": math.floor(1000 * sum(same) / len(same)) / 10}


def warn_of_difference(checked: Mapping[str, Any] | None) -> None:
    """Warns if answers that should be equal differ."""
    if checked is not None and checked["same_answers"] < checked["samples"]:
        log.warning(
            "The export answers %d of %d samples differently from the student. Only tokens that are equally likely up "
            "to rounding should differ.",
            checked["samples"] - checked["same_answers"],
            checked["samples"],
        )


def agreed(checked: Mapping[str, Any] | None) -> str:
    """Returns the README's line on the check."""
    if checked is None:
        return ""
    return (
        f"\nAt export it answered {checked['same_answers']} of {checked['samples']} sample inputs with the same tokens "
        "as the student in its own precision.\n"
    )
