"""`sbs convert`: a checkpoint in another form."""

import argparse
import json
import re
from typing import Any

from sbs_jax.training.gin_files import UsageError

_READ = ("hf", "t5x", "sbs", "peft")
_WRITTEN = ("stablehlo", "onnx")
_SHAPE = re.compile(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})")


def add(command: Any) -> None:
    convert = command(
        "convert",
        run,
        "Convert a checkpoint: Hugging Face, T5X, or a run of ours, to any of them, to StableHLO or to ONNX; adapters "
        "to PEFT's form and back.",
        epilog="examples:\n  sbs convert --to hf runs/svamp svamp-student\n"
        "  sbs convert --to stablehlo --dtype int8 --shapes 1x88,32x88 runs/svamp svamp-int8\n"
        "  sbs convert --to peft runs/svamp-lora svamp-lora\n"
        "  sbs convert --to sbs svamp-lora runs/svamp-again --base t5-v1_1-base\n\n"
        "A run that trained adapters becomes one whole student: they are merged into their base. Those that no plain\n"
        "T5 has a place for go to stablehlo alone. PEFT has LoRA and IA3 alone; what else was trained is named.\n"
        "See docs/checkpoints.md and docs/export.md.",
    )
    convert.add_argument("--from", dest="from_form", choices=_READ, help="form of the source (default: as it looks)")
    convert.add_argument("--to", dest="to_form", choices=(*_READ, *_WRITTEN), required=True, help="form to write")
    convert.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "int8"),
        default="float32",
        help="type of the weights of hf (float32, bfloat16) and stablehlo (also int8)",
    )
    convert.add_argument("--shard_gb", type=float, default=5.0, metavar="GB", help="largest file of hf weights")
    convert.add_argument(
        "--base",
        metavar="PATH",
        help="of adapters of PEFT, their base; of a run's, where its base lies, if it has moved",
    )
    convert.add_argument("--vocabulary", metavar="FILE", help="where the run's vocabulary lies, if it has moved")
    convert.add_argument(
        "--platforms",
        default="",
        metavar="NAMES",
        help="of stablehlo, what it runs on: cpu, tpu, cuda, rocm (default: cpu,tpu,cuda)",
    )
    convert.add_argument(
        "--shapes",
        default="",
        metavar="SHAPES",
        help="of stablehlo and onnx, rows x tokens of a call, such as 1x88,32x88; one of onnx",
    )
    convert.add_argument(
        "--samples",
        metavar="FILE",
        help='lines of {"input": text} to answer with what was written (default: what the run was graded on)',
    )
    convert.add_argument(
        "--check", type=int, default=32, metavar="ROWS", help="how many samples to answer at most; 0 for none"
    )
    convert.add_argument("source", metavar="SRC", help="directory, .npz, or gs:// path of T5X")
    convert.add_argument("target", metavar="DST", help="directory to make")


def run(arguments: argparse.Namespace) -> int:
    platforms, shapes = _listed(arguments.platforms), _shapes(arguments.shapes)
    if arguments.check < 0:
        raise UsageError(f"--check is {arguments.check}; expected a number of samples, 0 for none.")
    from sbs_jax.export import convert

    summary = convert.convert(
        arguments.source,
        arguments.target,
        from_form=arguments.from_form,
        to_form=arguments.to_form,
        dtype=arguments.dtype,
        shard_bytes=int(arguments.shard_gb * 1e9),
        base=arguments.base,
        vocabulary=arguments.vocabulary,
        platforms=platforms,
        shapes=shapes,
        samples=arguments.samples,
        check=arguments.check,
    )
    print(json.dumps(summary))
    return 0


def _listed(flag: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in flag.split(",")) if flag else ()


def _shapes(flag: str) -> tuple[tuple[int, int], ...]:
    """`1x88,32x88` as pairs."""
    found = []
    for part in _listed(flag):
        match = _SHAPE.fullmatch(part)
        if match is None:
            raise UsageError(f"got --shapes {flag!r}: {part!r} is no ROWSxTOKENS, such as 32x88.")
        found.append((int(match[1]), int(match[2])))
    return tuple(found)
