"""Run directories of untrained students: weights from numpy, so their answers are random."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import parity_cases as cases
import toy

from sbs_jax.data import registry, tokens
from sbs_jax.prediction import engine
from sbs_jax.run import checkpoints, directory
from sbs_jax.student import adapters, families, partitioning
from sbs_jax.training import students
from sbs_jax.weights import frozen

LENGTHS = {"inputs": 20, "targets": 16}
TEXTS = (
    "g c a",
    "a",
    "d e f and more words than there is room for, so that it is cut",
    "A dog</s>It barks",
    "Füße, 漢字 and 🙂",
    " b  b ",
)


def write(
    folder: Path,
    *,
    vocabulary: str = "byte",
    task: str = "toy_step_by_step",
    inputs: int = LENGTHS["inputs"],
    **changes: Any,
) -> Path:
    """Writes a run of the toy's shape, with `changes` to its architecture; `inputs` is its longest input."""
    rows = 384 if vocabulary == tokens.BYTE_VOCABULARY else 32_128
    config = dataclasses.replace(toy.MODEL, **{"vocab_size": rows, **changes})
    values = cases.parameters(config)
    values["logits_dense/kernel"][:, 259 if rows == 384 else 32_000 :] = 0  # rows without a token, and sentinels
    parameters = {name: jnp.asarray(each) for name, each in values.items()}
    return write_model(folder, config, parameters, vocabulary=vocabulary, task=task, inputs=inputs)


def write_model(
    folder: Path,
    config: families.ModelConfig,
    parameters: families.Parameters,
    *,
    vocabulary: str,
    task: str,
    inputs: int = LENGTHS["inputs"],
) -> Path:
    """Writes a run of any family."""
    registry.add(toy.DATASET)
    checkpoints.save_parameters(folder, parameters, config=config, step=7)
    _write_manifest(folder, vocabulary=vocabulary, task=task, tuning=None, inputs=inputs)
    return folder


def write_adapters(folder: Path, tuning: adapters.Tuning, *, base: Path) -> Path:
    """Writes a run that trained adapters on a `base` of `write`; trained parameters are random."""
    config = toy.MODEL
    adapted = adapters.abstract(config, tuning)
    partitioner = partitioning.DATA_PARALLEL.partitioner(jax.devices()[:1])
    like = partitioner.with_shardings(adapted.shapes, parameters=adapted.shapes, axes=adapted.axes)
    found = frozen.load(config, tuning, path=str(base), seed=None, like=like, partitioner=partitioner)
    random = np.random.default_rng(0)
    trained = {
        name: jnp.asarray(random.normal(size=leaf.shape) * 0.3, leaf.dtype)
        for name, leaf in adapted.split(adapted.shapes)[0].items()
    }
    checkpoints.save_parameters(folder, trained, config=config, step=3, tuning=tuning, base=found.identity)
    _write_manifest(folder, vocabulary="byte", task="toy_label", tuning=tuning)
    return folder


def _write_manifest(
    folder: Path, *, vocabulary: str, task: str, tuning: adapters.Tuning | None, inputs: int = LENGTHS["inputs"]
) -> None:
    data = {"options": dataclasses.asdict(toy.options(folder / "records")) | {"vocabulary": vocabulary}}
    data |= {"dataset": "toy", "vocabulary_sha256": tokens.vocabulary_sha256(vocabulary), "splits": {}}
    run = {"mixture_or_task_name": task, "task_feature_lengths": LENGTHS | {"inputs": inputs}, "max_decode_length": 6}
    settings = {"tuning": None if tuning is None else dataclasses.asdict(tuning)}
    contents = {"data": data, "run": run | {"primary_metric": "accuracy"}, "settings": settings}
    (folder / directory.MANIFEST).write_text(json.dumps(contents))


def questions(folder: Path) -> Path:
    """Writes a file of `TEXTS`."""
    rows = [json.dumps({"id": str(number), "input": text}) for number, text in enumerate(TEXTS)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "questions.jsonl").write_text("\n".join(rows) + "\n")
    return folder / "questions.jsonl"


def answers(run: Path, *, objective: str = "label") -> list[engine.Answer]:
    """Answers `TEXTS` as `sbs predict --too_long cut` does."""
    settings = engine.Settings(batch_size=4, objective=objective, too_long="cut")
    asked = [engine.Question(id=str(number), input=text) for number, text in enumerate(TEXTS)]
    found = engine.Predictor.load(run, settings=settings).answer(asked)
    assert all(answer.error is None for answer in found)
    return found


def parameters(run: Path) -> tuple[families.Structure, families.Parameters]:
    student = students.load_student(run, layout=partitioning.DATA_PARALLEL)
    return student.structure, {name: jnp.asarray(np.asarray(x)) for name, x in student.parameters.items()}
