"""A dataset small enough to train on in a test: the label is the last of three letters, the rationale says so."""

import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from sbs_jax.data import records, registry, selection
from sbs_jax.data.dataset import Dataset
from sbs_jax.data.grading import accuracy, same_text
from sbs_jax.run import checkpoints
from sbs_jax.student import families, partitioning, stacks, t5
from sbs_jax.training import gin_files
from sbs_jax.training.config import TrainConfig
from sbs_jax.weights import npz

LETTERS = "abcdefgh"

DATASET = Dataset(
    name="toy",
    labels=tuple(LETTERS),
    read_release=None,
    parsers={},
    metric_fns=(accuracy,),
    primary_metric="accuracy",
    same_label=same_text,
    feature_lengths={"inputs": 20, "targets": 16},
)
registry.add(DATASET)  # a configuration's objectives follow from its name
# `sbs` in a process of its own (processes.py) that knows the dataset; by itself it knows those of tasks/ alone.
SBS = ("-c", "import sys, toy; from sbs_jax.cli import main; sys.exit(main.main())")

MODEL = t5.T5Config(
    vocab_size=384,
    emb_dim=32,
    num_heads=2,
    head_dim=16,
    mlp_dim=64,
    num_encoder_layers=1,
    num_decoder_layers=1,
    mlp_activations=("gelu", "linear"),
    logits_via_embedding=False,
    dropout_rate=0.1,
)


def write_records(directory: Path, *, train_rows: int = 48, other_rows: int = 16) -> Path:
    """Records of all three splits; returns the records directory."""
    registry.add(DATASET)
    rows = [
        records.Record(
            id=f"toy-{number}",
            input=f"{a} {b} {c}",
            label=c,
            teacher_text=f"last is {c}. {c}",
            rationale=f"last is {c}.",
            teacher_label=c,
            outcome=records.OK,
        )
        for number, (a, b, c) in enumerate(itertools.product(LETTERS, repeat=3))
    ]
    # Every eighth row has the same last letter; 19 and 512 share no factor, so rows are well mixed.
    rows = [rows[i * 19 % len(rows)] for i in range(len(rows))]
    folder = directory / DATASET.name
    folder.mkdir(parents=True)
    cuts = {"train": train_rows, "validation": other_rows, "test": other_rows}
    start = 0
    for split, count in cuts.items():
        records.write_records(folder / f"{split}.jsonl", rows[start : start + count])
        start += count
    return directory


UNTRAINED_LIMIT = 48  # tokens of an input


def write_untrained(folder: Path, *, task: str = "toy_step_by_step") -> Path:
    """A run of one checkpoint with random parameters, whose answers differ; returns its directory."""
    registry.add(DATASET)
    model = dataclasses.replace(MODEL, dropout_rate=0.0)
    parameters = families.init(model, seed=0)[1]
    # Logits far enough apart that rounding does not decide between tokens, and EOS often among the first.
    kernel = np.random.default_rng(0).normal(size=(model.emb_dim, model.vocab_size)).astype(np.float32)
    kernel[:, 1] *= 2.0
    kernel[:, 259:] = 0.0  # sentinels, which have no text
    parameters["logits_dense/kernel"] = jnp.asarray(kernel)
    checkpoints.save_parameters(folder / "run", parameters, config=model, step=1)
    run = {
        "mixture_or_task_name": task,
        "task_feature_lengths": {"inputs": UNTRAINED_LIMIT, "targets": 9},
        "max_decode_length": 6,
    }
    manifest = {"data": {"options": dataclasses.asdict(options(folder / "records"))}, "run": run}
    (folder / "run" / "manifest.json").write_text(json.dumps(manifest))
    return folder / "run"


POISON = 3 + ord("!")  # a token of no example


def poison(records_dir: Path, start: Path) -> tuple[Path, set[str]]:
    """Gives two training inputs a token whose parameters in `start` are infinite; returns their ids."""
    file = records_dir / DATASET.name / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for number in (11, 30):
        rows[number]["input"] += f" {chr(POISON - 3)}"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parameters, name = dict(families.init(MODEL, seed=0)[1]), "token_embedder/embedding"
    parameters[name] = parameters[name].at[POISON].set(np.inf)
    npz.save_npz(start, parameters, dtype="float32")
    return start, {rows[number]["id"] for number in (11, 30)}


def options(records_dir: Path, **changes) -> selection.DataOptions:
    """Data options with the byte vocabulary."""
    return selection.DataOptions(records_dir=str(records_dir), vocabulary="byte", **changes)


def config(model_dir: Path, records_dir: Path, **changes) -> TrainConfig:
    """A run of a few steps; `changes` replace its fields."""
    defaults = {
        "model_dir": str(model_dir),
        "model": MODEL,
        "data": options(records_dir),
        "mixture_or_task_name": "toy_step_by_step",
        "task_feature_lengths": DATASET.feature_lengths,
        "batch_size": 8,
        "train_steps": 6,
        "alpha": 0.5,
        "optimizer": optax.adamw,
        "learning_rate": optax.constant_schedule(1e-3),
        "execution": stacks.UNROLLED,
        "layout": partitioning.DATA_PARALLEL,
        "log_period": 2,
        "eval_period": 3,
        "checkpoint_period": 3,
        "keep_checkpoints": 1,
        "save_patience": 0.0,
        "eval_batch_size": 8,
        "max_decode_length": 4,
    }
    return TrainConfig(**{**defaults, **changes})


def write_command(folder: Path, **macros: Any) -> Path:
    """Writes the files that `sbs train` needs: records/, toy.gin, and the module that registers the dataset."""
    write_records(folder / "records")
    (folder / "toy.gin").write_text(_gin_text(macros))
    (folder / "toy_task.py").write_text("from toy import DATASET as DATASET\n")
    return folder


def _gin_text(changes: Mapping[str, Any]) -> str:
    """The toy's training. The model's defaults are bound too: jaxtyping's hook hides them from gin in this process."""
    lines = ["from __gin__ import dynamic_registration", "import toy_task"]
    lines += [gin_files.import_line("t5")]
    for field in dataclasses.fields(t5.T5Config):
        if field.default is not dataclasses.MISSING:
            lines.append(f"t5.T5Config.{field.name} = {field.default!r}")
    lines += [f'include "gin_configs/{file}.gin"' for file in ("runs/train", "methods/step_by_step")]
    for name, value in dataclasses.asdict(MODEL).items():
        lines.append(f"t5.T5Config.{name} = {'%DROPOUT_RATE' if name == 'dropout_rate' else repr(value)}")
    macros = {
        "DATASET": "toy",
        "TASK_FEATURE_LENGTHS": {"inputs": 40, "targets": 32},
        "PACK": True,
        "EXAMPLES": 8,
        "EXAMPLES_PER_ROW": 2,
        "LEARNING_RATE": 3e-3,
        "VOCABULARY": "byte",
        "EVAL_BATCH_SIZE": 8,
        "MAX_DECODE_LENGTH": 4,
        **changes,
    }
    lines += [f"{name} = {value!r}" for name, value in macros.items()]
    return "\n".join([*lines, "MODEL = @t5.T5Config()", ""])


def train_flags(folder: Path, run: Path, *bindings: str, mesh: str = "data_parallel") -> list[str]:
    """The command line that trains into `run`."""
    files = [f"--gin_file={folder / 'toy.gin'}", f"--gin_file=gin_configs/meshes/{mesh}.gin"]
    paths = [f"--gin.RECORDS_DIR={folder / 'records'}", f"--gin.MODEL_DIR={run}"]
    return ["train", *files, *paths, *(f"--gin.{binding}" for binding in bindings)]
