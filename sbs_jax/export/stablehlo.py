"""A student as StableHLO, through `jax.export`: programs for some shapes, their weights, and a script to run them.

    run.py  model.py             answer lines of JSON without this package
    answer_32x88.jax_export      the program: (weights, tokens [32, 88]) to (tokens, scores); serialized jax.export
    model.safetensors            the weights, an argument of every program
    sentencepiece.model          with the sentinels; or tokenizer.json
    sbs_student.json  README.md  the card

Shapes are static: a TPU needs that, and attention chooses its algorithm by them. `jax.export` refuses operations that
have no guarantee of compatibility.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from safetensors.flax import load_file

from sbs_jax import checks
from sbs_jax.export import card as cards
from sbs_jax.export import weights
from sbs_jax.export.student import ANSWER, Student, agreed, check, check_shapes, warn_of_difference, write_runner
from sbs_jax.weights import tensor_files

PLATFORMS = ("cpu", "tpu", "cuda", "rocm")
DEFAULT_PLATFORMS = ("cpu", "tpu", "cuda")
WEIGHTS, SUFFIX = "model.safetensors", ".jax_export"


def check_platforms(platforms: Sequence[str]) -> None:
    """Requires known platforms, each once."""
    for name in platforms:
        checks.choice("--platforms", name, PLATFORMS)
    if not platforms or len(set(platforms)) < len(platforms):
        raise ValueError(f"--platforms is {', '.join(platforms) or 'empty'}; expected at least one, and each once.")


def write(
    folder: Path,
    student: Student,
    *,
    form: str,
    platforms: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    samples: Sequence[str],
) -> dict[str, Any]:
    """Writes the artefact into an existing folder; returns its facts for the summary and the card.

    `form` is how weights are stored (weights.py); `shapes` are (rows, tokens) of the programs, () for the defaults.
    With `samples` (texts with their prefix), the artefact is read back and its answers are compared with the student's.
    """
    longest = student.card["input"]["max_tokens"]
    shapes, platforms = shapes or ((1, longest), (32, longest)), platforms or DEFAULT_PLATFORMS
    check_shapes(shapes, longest=longest)
    stored = weights.stored(student.arrays, form=form)
    tensor_files.write_safetensors(folder / WEIGHTS, stored, dtype=None)
    like = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in stored.items()}
    for task, length in student.tasks.items():
        for rows, tokens in shapes:
            program = functools.partial(_program, student=student, form=form, length=length)
            exported = export.export(jax.jit(program), platforms=tuple(platforms))(
                like, jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
            )
            (folder / f"{task}_{rows}x{tokens}{SUFFIX}").write_bytes(exported.serialize())
    write_runner(folder, student, model="stablehlo.py")
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    programs = [size for name, size in sizes.items() if name.endswith(SUFFIX)]
    facts: dict[str, Any] = {
        "weights": f"{form}, {cards.megabytes(sizes[WEIGHTS])}",
        "programs": f"{len(programs)}, {cards.megabytes(sum(programs))}",
        "platforms": list(platforms),
        "shapes": [f"{rows}x{tokens}" for rows, tokens in shapes],
        "jax": jax.__version__,
    }
    if form == weights.INT8:
        facts["int8_error"] = weights.error(student.arrays)
    rows, tokens = max(shapes, key=lambda shape: (shape[1], shape[0]))
    program = export.deserialize(bytearray((folder / f"{ANSWER}_{rows}x{tokens}{SUFFIX}").read_bytes()))
    arrays = load_file(folder / WEIGHTS)
    facts["check"] = check(student, lambda batch: program.call(arrays, batch)[0], shape=(rows, tokens), samples=samples)
    if form == weights.FLOAT32:
        warn_of_difference(facts["check"])
    cards.write(
        folder,
        student.card,
        usage=_usage(facts, student.packages("jax", "numpy", "safetensors")),
        runtime="jax",
        **facts,
    )
    return facts


def _program(
    stored: dict[str, jax.Array], rows: jax.Array, *, student: Student, form: str, length: int
) -> tuple[jax.Array, jax.Array]:
    return student.greedy(weights.parameters(stored, student.shapes, form=form), rows, length=length)


def _usage(facts: dict[str, Any], packages: Sequence[str]) -> str:
    return (
        f"```\npip install 'jax=={facts['jax']}' {' '.join(packages[1:])}\n"
        "python run.py < questions.jsonl > answers.jsonl\n```\n\n"
        f"`run.py` needs only {', '.join(packages)}, and answers lines of "
        f'`{{"id", "input"}}`. Each `*{SUFFIX}` is a program of `jax.export` ({", ".join(facts["platforms"])}) for as '
        "many rows of as many tokens as its name says; `model.py` calls them. They were written by jax "
        f"{facts['jax']}: later versions read them for at least six months, and so do versions that are up to three "
        f"weeks older.\n{agreed(facts['check'])}"
    )
