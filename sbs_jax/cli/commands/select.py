"""`sbs select`: choose among the rationales of each row."""

import argparse
import json
from typing import Any

from sbs_jax.cli import folders


def add(command: Any) -> None:
    select = command(
        "select",
        run,
        check=check,
        tensorflow=False,
        epilog="examples:\n"
        "  sbs select --dataset svamp --records_dir records --output chosen --by agreement diverse --keep 3\n"
        "  sbs select --dataset svamp --records_dir records --output chosen --by likely --model runs/svamp --keep 1\n\n"
        "Rules are applied in the order given: agreement drops rationales for another label than the row's, and the\n"
        "others order what is left: short, diverse, likely. Prints what was chosen. Records with several rationales\n"
        "per row come from sbs teach --samples; gin_configs/methods/several_rationales.gin trains on them.",
    )
    select.add_argument("--dataset", required=True, metavar="NAME", help="dataset name, or a folder of sbs init")
    select.add_argument(
        "--records_dir", metavar="DIR", help="records to choose from (default for a folder: its records)"
    )
    select.add_argument("--output", required=True, metavar="DIR", help="where to write <dataset>/*.jsonl")
    select.add_argument(
        "--by", required=True, nargs="+", metavar="RULE", help="agreement, short, diverse or likely; several in order"
    )
    select.add_argument("--keep", type=int, metavar="N", help="most rationales per row (default: all that are left)")
    select.add_argument(
        "--model", dest="checkpoint_path", metavar="RUN", help="run directory of the student, for --by likely"
    )
    select.add_argument("--base", metavar="PATH", help="base of that run's adapters, if it has moved")
    select.add_argument("--batch_size", type=int, default=64, metavar="N", help="texts to score at a time")
    select.add_argument("--overwrite", action="store_true", help="replace other records in --output")


def check(arguments: argparse.Namespace) -> None:
    from sbs_jax import checks
    from sbs_jax.cli import early
    from sbs_jax.data import catalogue, choice, records, release
    from sbs_jax.storage import places

    folders.fill_in(arguments)
    name = catalogue.get(arguments.dataset).name
    records.check_exist(arguments.records_dir, name)
    choice.check(arguments.by, keep=arguments.keep, scored=arguments.checkpoint_path is not None)
    release.check_target(*(places.of(folder) / name for folder in (arguments.records_dir, arguments.output)))
    checks.whole_number("--batch_size", arguments.batch_size, least=1)
    if arguments.checkpoint_path is not None:
        early.run(arguments.checkpoint_path, dataset=name)


def run(arguments: argparse.Namespace) -> int:
    from sbs_jax.data import catalogue, choice

    dataset, scorer = catalogue.get(arguments.dataset), None
    if arguments.checkpoint_path is not None:
        from sbs_jax.cli import main

        main.import_tensorflow()
        from sbs_jax.prediction import likelihood

        scorer = likelihood.Scorer.load(
            arguments.checkpoint_path, dataset=dataset.name, base=arguments.base, batch_size=arguments.batch_size
        )
    manifest = choice.write(
        dataset,
        records_dir=arguments.records_dir,
        output=arguments.output,
        rules=arguments.by,
        keep=arguments.keep,
        likelihoods=scorer,
        model=None if scorer is None else scorer.describe(),
        overwrite=arguments.overwrite,
    )
    print(json.dumps(manifest.get("selection"), indent=1))
    return 0
