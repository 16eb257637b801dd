"""`sbs teach`: ask a hosted model about every row of a dataset, and write records.

    rows -> prompts -> [store] <- replies <- teacher        (sampler, or jobs in batch mode)
                          |
                          +-> records, and a page that shows them

A repeated run continues where the last one ended: requests with stored replies are not sent again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import itertools
import json
import logging
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import tqdm

from sbs_jax.data import catalogue, own_experiments, parsing, release, summary
from sbs_jax.data.dataset import Dataset
from sbs_jax.data.records import Manifest, file_of, read_records
from sbs_jax.data.summary import Summary
from sbs_jax.pages import rendering
from sbs_jax.storage import user_files
from sbs_jax.teacher import clients, export, jobs, money, page, prompts, providers, sampler
from sbs_jax.teacher.store import Store

log = logging.getLogger(__name__)
_ROOT = Path(__file__).parents[2]  # holds gin_configs/


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `sbs teach`; see `sbs teach --help`."""

    dataset: str
    inputs_dir: str | None
    inputs: str = "release"
    tfds_data_dir: str | None = None
    splits: tuple[str, ...] | None = None
    limit: int | None = None
    provider: str
    base_url: str | None = None
    template: prompts.Template
    parser: str = "strict"
    settings: sampler.Settings
    price: str | None = None
    timeout: float = 120.0
    batch: bool = False
    batch_size: int = 20_000
    batch_folder: str | None = None
    cancel_batches: bool = False
    retry_failed: bool = False
    store: str
    records_dir: str
    page: str | None = None
    overwrite: bool = False
    dry_run: bool = False
    export_only: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """Options, and everything read from disk before the teacher is asked."""

    options: Options
    dataset: Dataset
    splits: Mapping[str, release.Source]
    price: money.Price | None

    @property
    def settings(self) -> sampler.Settings:
        return self.options.settings

    def questions(self, *splits: str) -> Iterator[export.Question]:
        """Yields the rows of these splits one at a time, because there may be very many."""
        rows = (row for split in splits for row in self.splits[split].rows)
        return (export.Question(self.dataset, self.options.template, self.options.parser, row) for row in rows)

    def answers(self, split: str, store: Store) -> Iterator[export.Answered]:
        return export.answers(self.questions(split), settings=self.settings, store=store)


def teach(options: Options, *, tell: Summary | None = None) -> Manifest | None:
    """Sends missing requests, then writes records and page; returns the manifest, None after a dry run or early end.

    Received replies are stored, whatever ends the run. Records are written when every row has a reply or a failure
    reason, so not if requests were given up; `export_only` writes them at any time. `tell` gets every split that was
    written, or after UnusableRepliesError the first answers.
    """
    dataset = catalogue.get(options.dataset)
    if options.settings.hint and options.template.hint is None:
        raise ValueError(
            "The prompt has no field 'hint', which --hint needs; add one with {label}, or leave out --hint."
        )
    _check_outputs(dataset, options)
    plan = _Plan(
        options=options,
        dataset=dataset,
        splits=_splits(dataset, options),
        price=money.price(options.settings.model, override=options.price),
    )
    if options.dry_run:
        _show_plan(plan, prompt=True)
        return None
    with Store(options.store) as store:
        if options.retry_failed:
            log.info("Cleared %d recorded failures.", store.forget_failures())
        if not options.export_only:
            _show_plan(plan, prompt=False)
            in_batches = options.batch or options.cancel_batches
            try:
                finished = asyncio.run(_in_batches(plan, store) if in_batches else _one_by_one(plan, store))
            except (clients.Fatal, clients.Again, ImportError) as error:
                raise ValueError(f"{options.provider} {options.settings.model}: {error}") from error
            except sampler.UnusableRepliesError:
                if tell is not None:
                    _tell_first(tell, plan, store)
                raise
            if not finished:
                return None
        manifest = release.write_directory(
            dataset,
            {split: [answered.record for answered in plan.answers(split, store)] for split in plan.splits},
            sources={split: source.sources for split, source in plan.splits.items()},
            records_dir=options.records_dir,
            parser=options.parser,
            inputs=options.inputs,
            skipped={},
            overwrite=options.overwrite,
            teacher=export.described(options.template, options.settings),
            tell=tell,
        )
        if options.page is not None:
            _write_page(options.page, plan, store, manifest)
    return manifest


def _tell_first(tell: Summary, plan: _Plan, store: Store) -> None:
    """Summarizes the answers among the first rows of each split: rows are asked in order."""
    for split in plan.splits:
        first = (answered.record for answered in itertools.islice(plan.answers(split, store), 1000))
        if rows := [record for record in first if record.outcome != parsing.NOT_ASKED]:
            counts = summary.count(plan.dataset, rows)
            tell.add(plan.dataset, split, rows, counts, parser=plan.options.parser)


def _check_outputs(dataset: Dataset, options: Options) -> None:
    """Refuses outputs that are inputs, or that would replace a file of others, before anything is asked."""
    store = Path(options.store)
    if store.exists():
        user_files.check(store)
    if options.page is not None:
        page = Path(options.page)
        if page.resolve() in {Path(f"{store}{ending}").resolve() for ending in ("", "-wal", "-shm", ".lock")}:
            raise ValueError(f"The page {page} would be written over the store {store}; choose another --page.")
        rendering.check_place(page)
    if options.inputs_dir is not None:
        release.check_target(Path(options.inputs_dir) / dataset.name, Path(options.records_dir) / dataset.name)


def _splits(dataset: Dataset, options: Options) -> dict[str, release.Source]:
    found = release.read_unanswered(
        dataset, inputs_dir=options.inputs_dir, inputs=options.inputs, tfds_data_dir=options.tfds_data_dir
    )
    if options.splits is not None:
        missing = [split for split in options.splits if split not in found]
        if missing:
            raise ValueError(f"{dataset.name} has no split {missing[0]!r} here; it has {', '.join(found)}.")
        found = {split: found[split] for split in options.splits}
    if options.limit is not None:
        found = {
            split: dataclasses.replace(source, rows=source.rows[: options.limit]) for split, source in found.items()
        }
    return found


async def _one_by_one(plan: _Plan, store: Store) -> bool:
    """Asks row by row; returns whether every row now has a reply or a failure reason."""
    options, settings, price = plan.options, plan.settings, plan.price
    client = providers.make(
        options.provider, base_url=options.base_url, timeout=options.timeout, connections=settings.concurrency
    )
    total = sum(len(source.rows) for source in plan.splits.values())
    with tqdm.tqdm(total=total, unit="row", desc=options.dataset, smoothing=0.05) as bar:

        def show(totals: sampler.Totals) -> None:
            elapsed = max(bar.format_dict["elapsed"], 1e-9)
            parts = [f"{totals.failures.total()} failed", f"{totals.output_tokens / elapsed:.0f} tokens/s"]
            if price is not None:
                parts.append(f"${totals.spent:.2f}")
            bar.update(totals.rows - bar.n)
            bar.set_postfix_str(", ".join(parts), refresh=False)

        run = sampler.Sampler(settings=settings, client=client, store=store, price=price, on_progress=show)
        loop = asyncio.get_running_loop()

        # The first interruption waits for requests in flight; the second has Python's default effect.
        def interrupted() -> None:
            count, most = run.in_flight
            cost = "" if price is None else f", which may cost ${most:.4f},"
            print(
                f"\nEnding: waiting for {count} requests in flight{cost} (interrupt again to drop them).",
                file=sys.stderr,
            )
            run.stop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, interrupted)
        # Existing objects live on; freezing them saves the collector from scanning them repeatedly (docs/speed.md).
        gc.collect()
        gc.freeze()
        try:
            await run.run(plan.questions(*plan.splits))
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
            await client.close()
            bar.close()
            log.info("%s", _account(run.totals, price))
    totals = run.totals
    if totals.given_up:
        reason, count = totals.given_up.most_common(1)[0]
        log.warning(
            "%d requests were given up, %d of them because: %s Repeat the command to ask them again, or write records "
            "without them (--export_only).",
            totals.given_up.total(),
            count,
            reason,
        )
    if totals.stopped is not None:
        log.warning("Ended before the last row: %s. Repeat the command to continue.", totals.stopped)
    return totals.stopped is None and not totals.given_up


async def _in_batches(plan: _Plan, store: Store) -> bool:
    """Asks by batch jobs, or cancels them; returns whether every row now has a reply or a failure reason."""
    options = plan.options
    client = providers.make_batch(
        options.provider, base_url=options.base_url, timeout=options.timeout, folder=options.batch_folder
    )
    try:
        if options.cancel_batches:
            log.info("%d jobs cancelled; their replies are kept.", await jobs.cancel(client, store))
            return False
        return await jobs.run(
            plan.questions(*plan.splits),
            settings=plan.settings,
            client=client,
            store=store,
            price=plan.price,
            size=options.batch_size,
        )
    finally:
        await client.close()


def _account(totals: sampler.Totals, price: money.Price | None) -> str:
    cost = "price unknown" if price is None else f"${totals.spent:.4f}"
    if totals.presumed:
        cost += f" (${totals.presumed:.4f} of it for requests without an answer, at most)"
    failures = ", ".join(f"{count} {reason}" for reason, count in sorted(totals.failures.items())) or "none"
    return (
        f"{totals.rows} rows; {totals.found} replies were stored before, {totals.asked} requests gave {totals.replies} "
        f"({totals.retried} repeated); failures: {failures}; {totals.input_tokens} + {totals.output_tokens} tokens, "
        f"{cost}."
    )


def _show_plan(plan: _Plan, *, prompt: bool) -> None:
    """Prints the planned requests and their estimated cost; with `prompt`, the first row's prompt too."""
    options, settings, template = plan.options, plan.settings, plan.options.template
    rows = [row for source in plan.splits.values() for row in source.rows]
    if not rows:
        raise ValueError(f"{plan.dataset.name} has no rows to ask about; check --inputs_dir and --split.")
    # A sample of the rows is enough: all prompts share the exemplars, and inputs differ little in length.
    some = rows[:: max(1, len(rows) // 200)]
    lengths = [money.estimate_tokens(prompts.render(template, row.input).sent(settings.form)) for row in some]
    count = len(rows) * settings.samples
    sent = count * sum(lengths) // len(lengths)
    # Replies are short: about as long as the exemplars' answers.
    answers = [money.estimate_tokens(exemplar.rationale + exemplar.label) for exemplar in template.exemplars]
    got = count * min(settings.parameters.max_tokens, 10 + sum(answers) // max(1, len(answers)))
    if prompt:
        rendered = prompts.render(template, rows[0].input)
        if settings.form == clients.COMPLETION:
            print(rendered.text)
        else:
            for message in rendered.messages:
                print(f"[{message.role}]\n{message.content}\n")
    sizes = ", ".join(f"{len(source.rows)} {split}" for split, source in plan.splits.items())
    print(f"{plan.dataset.name}: {sizes} rows")
    print(f"teacher: {options.provider} {settings.model}, {settings.form}, prompt {template.hash}")
    print(f"requests: {count} at most, fewer where replies are stored already ({options.store})")
    print(f"tokens (estimated): {sent:,} sent, {got:,} received")
    if plan.price is None:
        print(f"cost: the price of {settings.model!r} is not known; --price IN,OUT in USD per million tokens")
    else:
        cost = money.cost(plan.price, input_tokens=sent, output_tokens=got, batch=options.batch)
        print(f"cost (estimated): ${cost:,.2f}" + (" in batch mode" if options.batch else ""))
    print(f"time (estimated): {_time(plan, count=count, tokens=sent + got)}")


def _time(plan: _Plan, *, count: int, tokens: int) -> str:
    if plan.options.batch:
        return "up to 24 hours, as for all batch jobs"
    # A reply usually takes two seconds; the rate limits may take longer.
    settings = plan.settings
    minutes = [count * 2.0 / settings.concurrency / 60]
    if settings.requests_per_minute:
        minutes.append(count / settings.requests_per_minute)
    if settings.tokens_per_minute:
        minutes.append(tokens / settings.tokens_per_minute)
    longest = max(minutes)
    return f"{longest:.0f} minutes" if longest < 120 else f"{longest / 60:.1f} hours"


def _drawn(parameters: clients.Parameters) -> str:
    parts = [f"temperature {parameters.temperature:g}", f"at most {parameters.max_tokens} tokens"]
    if parameters.top_p is not None:
        parts.append(f"top p {parameters.top_p:g}")
    if parameters.more:
        parts.append(parameters.more)
    if parameters.stops:
        parts.append(f"ended by {', '.join(map(repr, parameters.stops))}")
    return ", ".join(parts)


def next_command(options: Options, manifest: Manifest) -> str:
    """Returns the `sbs train` command for the records, with the dataset's smallest configuration if there is one."""
    name, folder = catalogue.get(options.dataset).name, Path(options.dataset)
    run = f"--gin.MODEL_DIR={shlex.quote(f'runs/{name}')}"
    if not any(split["labelled"] for split in manifest["splits"].values()):
        run += " --gin.LABEL_SOURCE=teacher"
    if (folder / "laptop.gin").is_file():  # by sbs init; it names the records, whose lengths were not known then
        directory = Path(options.records_dir) / name
        found = [row for split in manifest["splits"] for row in read_records(file_of(directory, split))]
        lengths = own_experiments.lengths_of(found).items()
        flags = " ".join(f"--gin.{macro}={shlex.quote(json.dumps(value))}" for macro, value in lengths)
        return f"sbs train --gin_file={shlex.quote(str(folder / 'laptop.gin'))} {flags} {run}"
    found = [file for file in ("cpu.gin", "demo.gin") if (_ROOT / f"gin_configs/experiments/{name}/{file}").is_file()]
    experiment = f"gin_configs/experiments/{name}/{found[0]}" if found else "EXPERIMENT.gin"
    method = "" if found == ["cpu.gin"] else " --gin_file=gin_configs/methods/step_by_step.gin"
    records = f"--gin.RECORDS_DIR={shlex.quote(options.records_dir)}"
    return f"sbs train --gin_file={experiment}{method} {records} {run}"


def _write_page(path: str, plan: _Plan, store: Store, manifest: Manifest) -> None:
    options, settings, template = plan.options, plan.settings, plan.options.template
    counts = store.counts()
    sizes = ", ".join(f"{split['rows']:,} {name}" for name, split in manifest["splits"].items())
    facts = {
        "Dataset": f"{plan.dataset.name}: {sizes}",
        "Teacher": f"{settings.model} ({options.provider}), {settings.form}",
        "Replies": _drawn(settings.parameters),
        "Samples per row": str(settings.samples),
        "Prompt": f"{template.hash}, version {template.version}",
        "Replies in the store": f"{counts['replies']:,}",
        "Tokens in the store": f"{counts['input_tokens']:,} sent, {counts['output_tokens']:,} received",
    }
    if plan.price is not None:
        tokens = {name: counts[name] for name in ("input_tokens", "output_tokens")}
        facts["Cost of the store"] = f"${money.cost(plan.price, **tokens, batch=options.batch):,.2f} at today's price"

    def example(answered: export.Answered) -> page.Example:
        record = answered.record
        right = None
        if record.label is not None and record.teacher_label is not None:
            right = plan.dataset.same_label(record.label, record.teacher_label)
        return page.Example(
            id=record.id,
            input=record.input,
            label=record.label,
            prompt=prompts.render(template, record.input).text,
            replies=answered.replies,
            rationale=record.rationale,
            teacher_label=record.teacher_label,
            outcome=record.outcome,
            hinted=record.hinted,
            right=right,
            votes=record.votes,
        )

    rows = (example(answered) for split in plan.splits for answered in plan.answers(split, store))
    following = [("Train a student on these records:", next_command(options, manifest))]
    page.write_page(path, title=f"Teacher: {plan.dataset.name}", facts=facts, rows=rows, next_commands=following)
    log.info("Page: %s", path)
