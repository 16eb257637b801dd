"""Shapes of the programs that answer: how rows, sources and choices are padded, and which program takes a batch."""

import dataclasses
import math
from collections.abc import Collection, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Form:
    """Shapes of a program: padded choices and their tokens (0: it generates), rows at a time, lengths of the source."""

    choices: int
    tokens: int
    rows: int
    buckets: tuple[int, ...]

    @property
    def size(self) -> tuple[int, int, int]:
        return self.choices, self.tokens, self.rows


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program of a student: `rows` rows with sources of `length` tokens, for one of its objectives."""

    objective: int
    form: Form
    rows: int
    length: int

    def blank(self, *, keys: bool) -> list[np.ndarray]:
        """Returns rows of padding: sources, then sampling keys if wanted, then choices if the form has some."""
        arrays: list[np.ndarray] = [np.zeros((self.rows, self.length), np.int32)]
        if keys:
            arrays.append(np.zeros((self.rows, 2), np.uint32))
        if self.form.choices:
            arrays.append(np.zeros((self.rows, self.form.choices, self.form.tokens), np.int32))
        return arrays


def programs(objective: int, form: Form, *, sizes: Sequence[int]) -> list[Program]:
    """Lists the programs of a form by batch size, longest sources first: each takes all questions of the next ones."""
    fitting = [size for size in sizes if size <= form.rows]
    return [Program(objective, form, rows, length) for length in reversed(form.buckets) for rows in fitting]


def cheapest(known: Collection[Program], *, rows: int, length: int) -> Program:
    """Chooses the program for `rows` sources of at most `length` tokens: fewest batches, then least padding."""
    fitting = [program for program in known if program.length >= length]
    return min(fitting, key=lambda each: (-(-rows // each.rows), each.rows * each.length))


def padded(rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
    """Pads rows of tokens with 0: int32 [rows, length]."""
    found = np.zeros((len(rows), length), np.int32)
    for row, ids in zip(found, rows, strict=True):
        row[: len(ids)] = ids
    return found


def of_choices(choices: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Returns the padded shape (choices, tokens) of a row's choices: powers of two, so few shapes are compiled."""
    return 2 ** math.ceil(math.log2(len(choices))), 2 ** math.ceil(math.log2(max(map(len, choices))))
