"""The student as StableHLO programs, one per task and shape; weights are their first argument.

`generate` needs jax (a version that reads the artefact: README.md), numpy and safetensors.
"""

import functools
from pathlib import Path

import jax
import numpy as np
from jax import export
from safetensors.flax import load_file

HERE = Path(__file__).resolve().parent
# `answer_32x88.jax_export`: greedy answers to 32 rows of 88 tokens.
PROGRAMS = {}
for _file in sorted(HERE.glob("*_*x*.jax_export")):
    _task, _, _shape = _file.stem.partition("_")
    PROGRAMS.setdefault(_task, {})[tuple(map(int, _shape.split("x")))] = _file
TASKS = tuple(PROGRAMS)


@functools.cache
def weights() -> dict:
    return load_file(HERE / "model.safetensors")


@functools.cache
def program(file: Path):
    """Loads `program(weights, tokens int32 [B, S])`: (tokens int32 [B, T], natural log probabilities float32 [B])."""
    return jax.jit(export.deserialize(bytearray(file.read_bytes())).call)


def generate(rows: np.ndarray, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Answers source rows [N, S], padded with 0: tokens [N, T] (end token included, then 0) and scores [N]."""
    longest = int(np.count_nonzero(rows, axis=1).max(initial=1))
    fitting = {shape: file for shape, file in PROGRAMS[task].items() if shape[1] >= longest}
    found = []
    while len(rows):
        # The shortest rows that fit; among those the smallest batch that takes all rows, else the largest.
        batch, length = min(fitting, key=lambda shape: (shape[1], shape[0] < len(rows), abs(shape[0] - len(rows))))
        padded = np.zeros((batch, length), np.int32)
        now, rows = rows[:batch, :longest], rows[batch:]
        padded[: len(now), :longest] = now
        tokens, scores = program(fitting[batch, length])(weights(), padded)
        found.append((np.asarray(tokens)[: len(now)], np.asarray(scores)[: len(now)]))
    tokens, scores = zip(*found)  # noqa: B905
    return np.concatenate(tokens), np.concatenate(scores)
