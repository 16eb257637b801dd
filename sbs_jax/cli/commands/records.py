"""`sbs records`: import existing teacher outputs as records."""

import argparse
import json
from typing import Any

from sbs_jax.data import summary
from sbs_jax.training.gin_files import UsageError


def add(command: Any) -> None:
    records = command(
        "records",
        run,
        tensorflow=False,
        epilog="examples:\n  sbs records --dataset svamp --release dss --records_dir records\n"
        "  sbs records --dataset svamp --augmentation ASDiv.xml.gz --records_dir records --output asdiv.jsonl\n\n"
        "The second writes further training rows for --gin.AUGMENTATION (docs/data.md).\n"
        "Prints the manifest, then a summary of the replies to standard error.\n"
        "Exit status: 0 written; 1 error, nothing written; 2 wrong flags;\n"
        f"{summary.SOME_UNUSABLE} written, but in some split more than --unusable of the replies have no usable label.",
    )
    records.add_argument("--dataset", required=True, help="dataset name: esnli, anli1, cqa, svamp")
    source = records.add_mutually_exclusive_group(required=True)
    source.add_argument("--release", metavar="DIR", help="folder of the release (has <dataset>/)")
    source.add_argument(
        "--augmentation",
        metavar="FILE",
        help="further training rows: JSON lines with input and label or rationale; svamp also takes its repository's "
        ".csv and ASDiv.xml; with --output",
    )
    records.add_argument("--output", metavar="FILE", help="with --augmentation: .jsonl to write")
    records.add_argument("--records_dir", required=True, metavar="DIR", help="where to write <dataset>/*.jsonl")
    records.add_argument("--parser", choices=("strict", "official"), default="strict", help="parser of the replies")
    records.add_argument("--inputs", choices=("release", "tfds"), default="release", help="source of the inputs")
    add_unusable(records, "exit with status 3")
    records.add_argument("--tfds_data_dir", metavar="DIR", help="folder of TensorFlow Datasets, with --inputs tfds")
    records.add_argument("--overwrite", action="store_true", help="replace records of another parser or source")


def add_unusable(parser: Any, consequence: str) -> None:
    """Adds the flag --unusable."""
    parser.add_argument(
        "--unusable",
        type=float,
        default=summary.UNUSABLE,
        metavar="SHARE",
        help=f"{consequence} if a larger share of the replies has no usable label",
    )


def run(arguments: argparse.Namespace) -> int:
    from sbs_jax.data import augmentation, catalogue, release

    if (arguments.augmentation is None) != (arguments.output is None):
        raise UsageError("--augmentation and --output go together.")
    if arguments.augmentation is not None:
        given = {"records_dir": arguments.records_dir, "output": arguments.output}
        counts = augmentation.write(catalogue.get(arguments.dataset), arguments.augmentation, **given)
        print(augmentation.shown(counts.items()))
        return 0
    if arguments.inputs == "tfds":  # which imports TensorFlow; nothing else here does
        from sbs_jax.cli import main

        main.import_tensorflow()
    told = summary.Summary(unusable=arguments.unusable)
    manifest = release.import_release(
        catalogue.get(arguments.dataset),
        release_dir=arguments.release,
        records_dir=arguments.records_dir,
        parser=arguments.parser,
        inputs=arguments.inputs,
        overwrite=arguments.overwrite,
        tell=told,
        tfds_data_dir=arguments.tfds_data_dir,
    )
    print(json.dumps(manifest, indent=1, default=str), flush=True)
    return told.show()
