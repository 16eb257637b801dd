"""`sbs init`: make a dataset of a table of your own."""

import argparse
from pathlib import Path
from typing import Any


def add(command: Any) -> None:
    init = command(
        "init",
        run,
        module=False,
        tensorflow=False,
        epilog="example:\n  sbs init tickets.csv\n"
        "  sbs teach --dataset tickets --provider openai --model gpt-4o-mini\n"
        "  sbs train --gin_file=tickets/laptop.gin --gin.MODEL_DIR=runs/tickets\n"
        "  sbs report runs/tickets --output report.html\n"
        "  sbs serve runs/tickets\n\n"
        "Says every decision. Edit dataset.json and prompt.json before the teacher is asked.\n"
        "Exit status: 0 written; 1 error, nothing written; 2 wrong flags.",
    )
    init.add_argument(
        "file",
        help="table (.csv, .tsv, .jsonl, .parquet, also .gz), folder with one per split, or Hugging Face dataset",
    )
    init.add_argument("--input", metavar="COLUMN", help="column of the questions (default: the first usual name)")
    init.add_argument("--label", metavar="COLUMN", help="column of the answers (default: the first usual name)")
    init.add_argument(
        "--rationale", metavar="COLUMN", help="column of rationales, if rows have some (default: the first usual name)"
    )
    init.add_argument("--unlabelled", action="store_true", help="there are no labels; take the teacher's")
    init.add_argument("--name", help="name of the dataset (default: the file's)")
    init.add_argument(
        "--labels",
        choices=("auto", "closed", "free"),
        default="auto",
        help="closed: the column has all possible answers; free: any text",
    )
    init.add_argument(
        "--metric",
        metavar="NAME",
        help="how answers are graded, by a name of docs/howto/dataset.md (default: accuracy of labels, "
        "normalized_accuracy of free answers)",
    )
    init.add_argument("--output", metavar="DIR", help="folder to make (default: the dataset's name)")


def run(arguments: argparse.Namespace) -> int:
    from sbs_jax.data import catalogue, own_data, own_experiments

    plan = own_data.plan(
        arguments.file,
        name=arguments.name,
        unlabelled=arguments.unlabelled,
        input_column=arguments.input,
        label_column=arguments.label,
        rationale_column=arguments.rationale,
        labels=arguments.labels,
        metric=arguments.metric,
    )
    name = plan.dataset.name
    if name in catalogue.names():
        raise ValueError(f"{name!r} is a dataset of sbs_jax already; give another with --name.")
    folder = Path(arguments.output or name)
    if arguments.output is None and folder.resolve() == Path(arguments.file).resolve():  # the table is a folder
        folder = Path(f"{name}_dataset")
    own_data.write(plan, folder, gin=own_experiments.of(plan, folder))
    print("\n".join(f"  {line}" for line in plan.lines))
    print(f"Wrote {folder}. Next:")
    if not plan.rationales:
        print(
            f"  sbs teach --dataset {folder} --provider openai --model gpt-4o-mini"
            "   # with OPENAI_API_KEY; --dry_run tells the cost"
        )
    print(
        f"  sbs train --gin_file={folder}/laptop.gin --gin.MODEL_DIR=runs/{name}\n"
        f"  sbs report runs/{name} --output report.html\n"
        f"  sbs serve runs/{name}"
    )
    return 0
