"""A student as ONNX, through jax2onnx: greedy search as one graph, its loop included, and a program that runs it.

    run.py  model.py             answer lines of JSON with onnxruntime and numpy, without this package, JAX or PyTorch
    model.onnx  model.onnx.data  tokens [8, 88] to (tokens, scores); large weights are in the second file
    sentencepiece.model or tokenizer.json  sbs_student.json  README.md

Needs the extra `onnx` (jax2onnx, onnxruntime).
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbs_jax.export import card as cards
from sbs_jax.export.student import ANSWER, Student, agreed, check, check_shapes, warn_of_difference, write_runner

MODEL = "model.onnx"


def _check_installed() -> None:
    """Requires the exporter and the runtime. ModuleNotFoundError says what to install."""
    for name in ("jax2onnx", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"--to onnx needs {name}, which is not installed: pip install 'sbs-jax[onnx]'.")


def write(
    folder: Path, student: Student, *, shapes: Sequence[tuple[int, int]], samples: Sequence[str]
) -> dict[str, Any]:
    """Writes the artefact into an existing folder in float32; returns its facts, as `stablehlo.write` does.

    There is one shape, since each file holds all weights: 8 rows of the longest input unless another is given.
    ValueError for a student that answers in two steps, which are two programs.
    """
    if student.card["input"].get("rationale_after") is not None:
        raise ValueError(
            f"A student of {student.card['task']} answers in two steps, a rationale and then the label, but an ONNX "
            "model is one program. Use --to stablehlo, which has a program for each."
        )
    longest = student.card["input"]["max_tokens"]
    shapes = shapes or ((8, longest),)
    if len(shapes) != 1:
        raise ValueError(f"An ONNX model has one shape; got {len(shapes)}. Convert again for another.")
    check_shapes(shapes, longest=longest)
    _check_installed()  # last: nobody installs it to learn that this student cannot be written
    (shape,) = shapes
    parameters, length = student.on_device(), student.tasks[ANSWER]

    def greedy(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        return student.greedy(parameters, rows, length=length)

    for name in ("jax2onnx", "onnx_ir"):  # they log unused plugins, and every constant
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with _for_cpu():
        jax2onnx: Any = importlib.import_module("jax2onnx")
        jax2onnx.to_onnx(
            greedy,
            [jax.ShapeDtypeStruct(shape, jnp.int32)],
            model_name="greedy",
            return_mode="file",
            output_path=folder / MODEL,
        )
    write_runner(folder, student, model="onnx.py")
    size = sum(file.stat().st_size for file in folder.glob(f"{MODEL}*"))
    facts: dict[str, Any] = {
        "weights": f"float32, {cards.megabytes(size)}",
        "shapes": ["{}x{}".format(*shape)],
        "jax2onnx": importlib.metadata.version("jax2onnx"),
    }
    facts["check"] = check(student, _answering(folder), shape=shape, samples=samples)
    warn_of_difference(facts["check"])
    cards.write(
        folder, student.card, usage=_usage(facts, student.packages("onnxruntime", "numpy")), runtime="onnx", **facts
    )
    return facts


def _answering(folder: Path) -> Any:
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(folder / MODEL), options, providers=["CPUExecutionProvider"])
    return lambda rows: np.asarray(session.run(None, {session.get_inputs()[0].name: rows})[0])


@contextlib.contextmanager
def _for_cpu() -> Iterator[None]:
    """Traces the CPU branch of code that differs by platform: ONNX has no platforms."""

    def chosen(*arguments: Any, default: Any = None, **forms: Any) -> Any:
        return forms.get("cpu", default)(*arguments)

    general = jax.lax.platform_dependent
    jax.clear_caches()  # forget programs traced for all platforms
    jax.lax.platform_dependent = chosen
    try:
        yield
    finally:
        jax.lax.platform_dependent = general
        jax.clear_caches()


def _usage(facts: dict[str, Any], packages: Sequence[str]) -> str:
    return (
        f"```\npip install {' '.join(packages)}\npython run.py < questions.jsonl > answers.jsonl\n```\n\n"
        f"`run.py` needs only {', '.join(packages)}, and answers lines of "
        f'`{{"id", "input"}}`. `{MODEL}` takes source rows of {facts["shapes"][0]} tokens, padded with 0, and gives '
        f"tokens and their log probabilities: the search is part of the graph.\n{agreed(facts['check'])}"
    )
