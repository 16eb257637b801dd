"""`sbs convert`: write a checkpoint in another form."""

import argparse
import json
import re
from typing import Any

from sbs_jax.cli import runs
from sbs_jax.training.gin_files import UsageError

_BOTH_WAYS = ("hf", "t5x", "sbs", "peft")
_READ = (*_BOTH_WAYS, "gguf", "flax")
_WRITTEN = (*_BOTH_WAYS, "stablehlo", "onnx")
_SHAPE = re.compile(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})")


def add(command: Any) -> None:
    convert = command(
        "convert",
        run,
        check=check,
        epilog="examples:\n  sbs convert --to hf runs/svamp svamp-student\n"
        "  sbs convert --to stablehlo --dtype int8 --shapes 1x88,32x88 runs/svamp svamp-int8\n"
        "  sbs convert --to peft runs/svamp-lora svamp-lora\n"
        "  sbs convert --to sbs svamp-lora runs/svamp-again --base t5-v1_1-base\n\n"
        "Adapters are merged into their base; those that cannot be merged go to stablehlo only. PEFT's form has LoRA\n"
        "and IA3 only; an error names anything else that was trained.\n"
        "See docs/checkpoints.md and docs/export.md.",
    )
    convert.add_argument("--from", dest="from_form", choices=_READ, help="form of the source (default: detected)")
    convert.add_argument("--to", dest="to_form", choices=_WRITTEN, required=True, help="form to write")
    convert.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "int8"),
        default="float32",
        help="type of the weights: float32 or bfloat16 for hf; also int8 for stablehlo",
    )
    convert.add_argument(
        "--shard_gb", type=float, default=5.0, metavar="GB", help="maximum size of a file of hf weights"
    )
    convert.add_argument(
        "--base", metavar="PATH", help="base of PEFT adapters; or of a run's adapters, if their base has moved"
    )
    convert.add_argument("--vocabulary", metavar="FILE", help="the run's vocabulary, if it has moved")
    convert.add_argument("--cut", metavar="DIR", help="cut the tables to this vocabulary, which sbs vocabulary made")
    convert.add_argument(
        "--platforms",
        default="",
        metavar="NAMES",
        help="platforms of stablehlo programs: cpu, tpu, cuda, rocm (default: cpu,tpu,cuda)",
    )
    convert.add_argument(
        "--shapes",
        default="",
        metavar="SHAPES",
        help="rows x tokens of stablehlo and onnx programs, such as 1x88,32x88; one for onnx",
    )
    convert.add_argument(
        "--samples",
        metavar="FILE",
        help='lines of {"input": text} to check the programs with (default: the inputs that the run was graded on)',
    )
    convert.add_argument(
        "--check",
        type=int,
        default=32,
        dest="rows_to_check",
        metavar="ROWS",
        help="maximum number of samples to check with; 0: no check",
    )
    runs.add_dataset(convert)
    runs.add(
        convert,
        what="run directory or another checkpoint; then the directory to make",
        then=("TARGET",),
        dest="source",  # may be on a bucket
    )


def check(arguments: argparse.Namespace) -> None:
    from sbs_jax.cli import early

    _shapes(arguments.shapes)
    if arguments.rows_to_check < 0:
        raise UsageError(f"--check is {arguments.rows_to_check}; expected a number of samples, 0 for none.")
    early.weights("RUN", arguments.run_dir, "give a run directory, or a checkpoint (docs/checkpoints.md)")
    for flag in ("base", "vocabulary", "cut", "samples"):
        if (path := getattr(arguments, flag)) is not None and path != "byte":
            early.weights(f"--{flag}", path, "give its path")


def run(arguments: argparse.Namespace) -> int:
    platforms, shapes = _listed(arguments.platforms), _shapes(arguments.shapes)
    from sbs_jax.export import convert

    options = convert.Options(
        to_form=arguments.to_form,
        from_form=arguments.from_form,
        dtype=arguments.dtype,
        shard_bytes=int(arguments.shard_gb * 1e9),
        base=arguments.base,
        vocabulary=arguments.vocabulary,
        cut=arguments.cut,
        platforms=platforms,
        shapes=shapes,
        samples=arguments.samples,
        check=arguments.rows_to_check,
        dataset=arguments.dataset,
    )
    print(json.dumps(convert.convert(arguments.run_dir, arguments.further[0], options)))
    return 0


def _listed(flag: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in flag.split(",")) if flag else ()


def _shapes(flag: str) -> tuple[tuple[int, int], ...]:
    """Parses `1x88,32x88` into pairs."""
    matches = {part: _SHAPE.fullmatch(part) for part in _listed(flag)}
    for part, match in matches.items():
        if match is None:
            raise UsageError(f"--shapes is {flag!r}, and {part!r} is not ROWSxTOKENS, such as 32x88.")
    return tuple((int(match[1]), int(match[2])) for match in matches.values() if match is not None)
