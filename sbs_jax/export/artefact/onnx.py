"""The student as an ONNX model: greedy answers to so many rows of so many tokens, the whole search in one graph.

`generate` needs onnxruntime and numpy.
"""

import functools
from pathlib import Path

import numpy as np
import onnxruntime

TASKS = ("answer",)


@functools.cache
def session() -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # without what it says of constants that it folds
    file = str(Path(__file__).resolve().parent / "model.onnx")
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def generate(rows: np.ndarray, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [N, T] (the end token included, 0 after it) and scores [N] of source rows [N, S], padded with 0."""
    (source,) = session().get_inputs()
    batch, length = source.shape
    found = []
    for start in range(0, len(rows), batch):
        now = rows[start : start + batch]
        padded = np.zeros((batch, length), np.int32)
        padded[: len(now), : rows.shape[1]] = now
        tokens, scores = session().run(None, {source.name: padded})
        found.append((tokens[: len(now)], scores[: len(now)]))
    tokens, scores = zip(*found)  # noqa: B905
    return np.concatenate(tokens), np.concatenate(scores)
