"""`sbs convert`: a checkpoint in another form."""

import argparse
import json
from typing import Any


def add(command: Any) -> None:
    convert = command(
        "convert",
        run,
        "Convert a checkpoint: Hugging Face, T5X, or a run of ours, to any of them; adapters to PEFT's form and back.",
        epilog="examples:\n  sbs convert --to hf runs/svamp svamp-student\n"
        "  sbs convert --to peft runs/svamp-lora svamp-lora\n"
        "  sbs convert --to sbs svamp-lora runs/svamp-again --base t5-v1_1-base\n\n"
        "A run that trained adapters becomes one whole student in hf, t5x and sbs: they are merged into their base.\n"
        "PEFT has LoRA and IA3 alone; what else was trained is named. See docs/checkpoints.md.",
    )
    forms = ("hf", "t5x", "sbs", "peft")
    convert.add_argument("--from", dest="from_form", choices=forms, help="form of the source (default: as it looks)")
    convert.add_argument("--to", dest="to_form", choices=forms, required=True, help="form to write")
    convert.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="type of hf weights")
    convert.add_argument("--shard_gb", type=float, default=5.0, metavar="GB", help="largest file of hf weights")
    convert.add_argument(
        "--base",
        metavar="PATH",
        help="of adapters of PEFT, their base; of a run's, where its base lies, if it has moved",
    )
    convert.add_argument("source", metavar="SRC", help="directory, .npz, or gs:// path of T5X")
    convert.add_argument("target", metavar="DST", help="directory to make")


def run(arguments: argparse.Namespace) -> int:
    from sbs_jax.convert import command

    summary = command.convert(
        arguments.source,
        arguments.target,
        from_form=arguments.from_form,
        to_form=arguments.to_form,
        dtype=arguments.dtype,
        shard_bytes=int(arguments.shard_gb * 1e9),
        base=arguments.base,
    )
    print(json.dumps(summary))
    return 0
