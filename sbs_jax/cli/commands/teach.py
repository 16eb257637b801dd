"""`sbs teach`: ask a hosted model for rationales and labels."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from sbs_jax.cli import folders
from sbs_jax.cli.commands.records import add_unusable
from sbs_jax.data import summary


def add(command: Any) -> None:
    teach = command(
        "teach",
        run,
        check=check,
        tensorflow=False,
        epilog="example:\n  sbs teach --dataset svamp --inputs_dir dss --provider openai --model gpt-4o-mini \\\n"
        "      --store svamp.sqlite --records_dir records --dry_run\n\n"
        "Credentials come from the environment (OPENAI_API_KEY, GEMINI_API_KEY, or Google's default credentials).\n"
        "Replies stay in the store and are never paid for twice; repeat the command to continue. See docs/teacher.md.\n"
        "Prints the manifest, then a summary of the replies to standard error; its last three lines are the usable\n"
        "replies, the right ones, and the next command.\n\n"
        "Exit status: 0 written; 1 error; 2 wrong flags; "
        f"{summary.SOME_UNUSABLE} ended before the last row (a limit, an interruption,\n"
        "cancelled jobs), or in some split more than --unusable of the replies have no usable label.",
    )
    rows = teach.add_argument_group("rows")
    rows.add_argument(
        "--dataset", required=True, help="name of a dataset, or a folder of sbs init, which implies all places"
    )
    rows.add_argument("--inputs_dir", metavar="DIR", help="folder of the inputs")
    rows.add_argument(
        "--inputs",
        choices=("release", "records", "tfds"),
        help="form of the inputs: the official release (default), records (id, input, label), or TFDS",
    )
    rows.add_argument("--tfds_data_dir", metavar="DIR", help="folder of TensorFlow Datasets, with --inputs tfds")
    rows.add_argument(
        "--split", action="append", metavar="NAME", help="train, validation or test; repeatable (default: all)"
    )
    rows.add_argument("--limit", type=int, metavar="N", help="ask about the first N rows of each split")
    ask = teach.add_argument_group("the teacher")
    ask.add_argument("--provider", required=True, metavar="NAME", help="openai (any compatible server), gemini, vertex")
    ask.add_argument("--model", required=True, help="the provider's name of the model")
    ask.add_argument("--base_url", metavar="URL", help="address of an OpenAI-compatible server, such as vLLM")
    ask.add_argument("--prompt", metavar="FILE", help="prompt file (default: tasks/prompts/<dataset>.json)")
    ask.add_argument(
        "--form", choices=("chat", "completion"), default="chat", help="chat messages, or one text to continue"
    )
    ask.add_argument("--temperature", type=float, default=0.0, help="sampling temperature")
    ask.add_argument(
        "--max_tokens",
        type=int,
        default=256,
        help="maximum reply tokens; truncated replies are retried with 2x and 4x",
    )
    ask.add_argument(
        "--parameters",
        metavar="JSON",
        default="",
        help='more parameters of each request, such as \'{"reasoning_effort": "low"}\'; null leaves one out',
    )
    ask.add_argument("--samples", type=int, default=1, help="replies per row; the most frequent label wins")
    ask.add_argument(
        "--hint", action="store_true", help="ask again with the human label as a hint if the reply differs"
    )
    pace = teach.add_argument_group("pace and money")
    pace.add_argument("--concurrency", type=int, default=64, help="maximum requests in flight")
    pace.add_argument("--requests_per_minute", type=float, metavar="N", help="rate limit (default: none)")
    pace.add_argument("--tokens_per_minute", type=float, metavar="N", help="rate limit, sent and received")
    pace.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="time for a whole reply")
    pace.add_argument("--retries", type=int, default=6, help="retries of a request after temporary errors")
    pace.add_argument("--max_requests", type=int, metavar="N", help="maximum requests of this run")
    pace.add_argument("--max_cost", type=float, metavar="USD", help="maximum cost of this run")
    pace.add_argument("--price", metavar="IN,OUT", help="USD per million tokens, if the model's is unknown or outdated")
    add_unusable(pace, "end the run (after 50 replies), or exit with status 3,")
    pace.add_argument("--batch", action="store_true", help="batch jobs: half the price, within a day")
    pace.add_argument("--batch_size", type=int, default=20_000, metavar="N", help="requests in one job")
    pace.add_argument("--batch_folder", metavar="GS", help="gs:// folder for the files of Vertex AI's batch jobs")
    pace.add_argument("--cancel_batches", action="store_true", help="cancel unfinished jobs and keep their answers")
    out = teach.add_argument_group("results")
    out.add_argument("--store", metavar="FILE", help="SQLite file of replies")
    out.add_argument("--records_dir", metavar="DIR", help="folder for <dataset>/*.jsonl")
    out.add_argument("--parser", choices=("strict", "official"), default="strict", help="how to read replies")
    out.add_argument("--page", metavar="FILE", help="HTML page of the replies (default: beside the store)")
    out.add_argument("--overwrite", action="store_true", help="replace existing records")
    out.add_argument("--retry_failed", action="store_true", help="ask again where a failure was recorded")
    out.add_argument("--dry_run", action="store_true", help="show a prompt, tokens, cost and time; ask nothing")
    out.add_argument("--export_only", action="store_true", help="write records of the stored replies; ask nothing")


def check(arguments: argparse.Namespace) -> None:
    from sbs_jax.data import catalogue
    from sbs_jax.teacher import prompts, providers

    dataset = catalogue.get(arguments.dataset)
    folders.fill_in(arguments)
    arguments.inputs = arguments.inputs or "release"
    providers.check(
        arguments.provider,
        base_url=arguments.base_url,
        batch=arguments.batch or arguments.cancel_batches,
        ask=not arguments.dry_run and not arguments.export_only,
    )
    prompts.read(arguments.prompt or dataset.name)


def run(arguments: argparse.Namespace) -> int:
    from sbs_jax.teacher import clients, command, prompts, sampler

    def fields(kind: Any, *others: str) -> dict[str, Any]:
        """Picks the fields of a dataclass from the arguments of the same names."""
        names = (field.name for field in dataclasses.fields(kind) if field.name not in others)
        return {name: getattr(arguments, name) for name in names}

    parameters = clients.Parameters(
        temperature=arguments.temperature, max_tokens=arguments.max_tokens, more=arguments.parameters
    )
    options = command.Options(
        settings=sampler.Settings(parameters=parameters, **fields(sampler.Settings, "parameters")),
        template=prompts.read(arguments.prompt or arguments.dataset),
        splits=tuple(arguments.split) if arguments.split else None,
        page=arguments.page or str(Path(arguments.store).with_suffix(".html")),
        **fields(command.Options, "settings", "template", "splits", "page"),
    )
    if arguments.inputs == "tfds":  # which imports TensorFlow; nothing else here does
        from sbs_jax.cli import main

        main.import_tensorflow()
    told = summary.Summary(unusable=arguments.unusable)
    try:
        manifest = command.teach(options, tell=told)
    except sampler.UnusableRepliesError as error:
        told.show()
        print(f"sbs teach: {error}", file=sys.stderr)
        return summary.SOME_UNUSABLE
    if manifest is None:
        return 0 if arguments.dry_run else summary.SOME_UNUSABLE
    print(json.dumps(manifest, indent=1), flush=True)
    return told.show(command=command.next_command(options, manifest))
