"""`sbs baseline`: measure the answers of models that need no student."""

import argparse
from typing import Any

from sbs_jax.cli import folders
from sbs_jax.data.selection import TRAIN, VALIDATION


def add(command: Any) -> None:
    baseline = command(
        "baseline",
        run,
        check=check,
        epilog="example:\n  sbs baseline --dataset svamp --records_dir records\n\n"
        "Writes baselines.json beside the records, where sbs train and sbs report find it: a student below a baseline\n"
        "is said to be so. The models: docs/report.md.",
    )
    baseline.add_argument("--dataset", required=True, help="dataset name, or a folder of sbs init")
    baseline.add_argument(
        "--records_dir", metavar="DIR", help="records of the dataset (default for a folder: its records)"
    )
    baseline.add_argument(
        "--train",
        nargs="+",
        choices=(TRAIN, VALIDATION),
        default=[TRAIN],
        help="splits to learn from",
    )
    baseline.add_argument(
        "--folds", type=int, default=0, metavar="N", help="cross-validate in N folds; 0: the files' own splits"
    )
    baseline.add_argument("--augmentation", metavar="FILE", help="records to learn from too, as a run's AUGMENTATION")


def check(arguments: argparse.Namespace) -> None:
    from sbs_jax.cli import early
    from sbs_jax.data import catalogue, records

    folders.fill_in(arguments)
    records.check_exist(arguments.records_dir, catalogue.get(arguments.dataset).name)
    if arguments.augmentation is not None:
        early.existing("--augmentation", arguments.augmentation, "write it with `sbs records --augmentation`")


def run(arguments: argparse.Namespace) -> int:
    from sbs_jax.data import registry, selection, tokens
    from sbs_jax.stats import baselines, linear

    dataset = registry.get(arguments.dataset).name
    train_split = arguments.train[0]
    registry.configure(
        selection.DataOptions(
            records_dir=arguments.records_dir,
            vocabulary=tokens.BYTE_VOCABULARY,
            train_split=train_split,
            folds=arguments.folds,
            augmentation=arguments.augmentation,
        )
    )
    found = linear.measure(dataset, train=arguments.train)
    path = baselines.write(arguments.records_dir, dataset, found)
    in_folds = f" in {arguments.folds} folds" if arguments.folds else ""
    print(f"{dataset}: {found['train_rows']:,} rows to learn from, {found['test_rows']:,} test rows{in_folds}")
    for name, model in found["models"].items():
        print(f"{baselines.TITLES[name]:40} {model['accuracy']:5.1f} %  [{model['low']:.1f}, {model['high']:.1f}]")
    print(f"Baselines: {path}")
    return 0
