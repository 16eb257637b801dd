"""`sbs teach`: asks a hosted model about every row of a dataset, and writes records.

    rows -> prompts -> [store] <- replies <- teacher        (sampler, or jobs in batch mode)
                          |
                          +-> records, and a page to look at them

A run that ended, however it did, goes on where it was: what is in the store is not asked again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import itertools
import logging
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tqdm

from sbs_jax.data import registry, release
from sbs_jax.data.dataset import Dataset
from sbs_jax.data.records import Manifest
from sbs_jax.teacher import batches, clients, export, jobs, money, page, prompts, providers, sampler
from sbs_jax.teacher.store import Store

log = logging.getLogger(__name__)

# Prompts that a dry run shows.
_SHOWN = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What `sbs teach` is told; see `sbs teach --help`."""

    dataset: str
    inputs_dir: str | None
    inputs: str = "release"
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


def teach(options: Options) -> Manifest | None:
    """Asks what is missing, then writes records and page; returns the records' manifest, None after a dry run.

    Whatever ends the asking, the replies that came are stored. Records are written when every row has a reply or a
    reason; `export_only` writes them at any time.
    """
    dataset = registry.get(options.dataset)
    template = options.template
    splits = _splits(dataset, options)
    price = money.price(options.settings.model, override=options.price)
    if options.dry_run:
        _show_plan(dataset, splits, template, options, price)
        return None
    with Store(options.store) as store:
        if options.retry_failed:
            log.info("%d failures forgotten.", store.forget_failures())
        if not options.export_only:
            _show_plan(dataset, splits, template, options, price, prompt=False)
            questions = _questions(dataset, splits, options)
            total = sum(len(source.rows) for source in splits.values())
            asking = (
                _in_batches(questions, options, store, price)
                if options.batch or options.cancel_batches
                else _one_by_one(questions, options, store, price, total=total)
            )
            try:
                finished = asyncio.run(asking)
            except (clients.Fatal, clients.Again, ImportError) as error:
                raise ValueError(f"{options.provider} {options.settings.model}: {error}") from error
            if not finished:
                return None
        manifest = export.write(
            dataset,
            splits,
            template=template,
            parser=options.parser,
            settings=options.settings,
            store=store,
            records_dir=options.records_dir,
            inputs=options.inputs,
            overwrite=options.overwrite,
        )
        if options.page is not None:
            _write_page(options.page, dataset, splits, template, options, store, manifest, price)
    return manifest


def _splits(dataset: Dataset, options: Options) -> dict[str, release.Source]:
    found = release.read_unanswered(dataset, inputs_dir=options.inputs_dir, inputs=options.inputs)
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


def _questions(
    dataset: Dataset, splits: Mapping[str, release.Source], options: Options
) -> Iterator[export.Question]:
    rows = itertools.chain.from_iterable(source.rows for source in splits.values())
    return (export.Question(dataset, options.template, options.parser, row) for row in rows)


async def _one_by_one(
    questions: Iterable[export.Question], options: Options, store: Store, price: money.Price | None, *, total: int
) -> bool:
    """Whether every row has a reply or a reason now."""
    client = providers.make(
        options.provider,
        base_url=options.base_url,
        timeout=options.timeout,
        connections=options.settings.concurrency,
    )
    with tqdm.tqdm(total=total, unit="row", desc=options.dataset, smoothing=0.05) as progress:
        run = sampler.Sampler(
            settings=options.settings,
            client=client,
            store=store,
            price=price,
            on_progress=_Progress(progress, price=price),
        )
        loop = asyncio.get_running_loop()
        # The first interruption ends the asking and keeps what is in flight; a second one is Python's own.
        loop.add_signal_handler(signal.SIGINT, _interrupted, run, loop)
        loop.add_signal_handler(signal.SIGTERM, _interrupted, run, loop)
        totals = run.totals
        # What is there now stays, and is most of what the collector would look at again and again (docs/speed.md).
        gc.collect()
        gc.freeze()
        try:
            await run.run(questions)
        finally:
            loop.remove_signal_handler(signal.SIGINT)
            loop.remove_signal_handler(signal.SIGTERM)
            await client.close()
            progress.close()
            log.info("%s", _account(totals, price))
    if totals.stopped is not None:
        log.warning("Ended before the last row: %s. Repeat the command to go on.", totals.stopped)
        return False
    if totals.failures[sampler.GAVE_UP]:
        log.warning(
            "%d requests failed %d times and were given up; repeat the command to ask them again.",
            totals.failures[sampler.GAVE_UP],
            options.settings.retries + 1,
        )
    return True


def _interrupted(run: sampler.Sampler, loop: asyncio.AbstractEventLoop) -> None:
    print("\nEnding: waiting for what is in flight (interrupt again to drop it).", file=sys.stderr)
    run.stop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.remove_signal_handler(number)


async def _in_batches(
    questions: Iterable[export.Question], options: Options, store: Store, price: money.Price | None
) -> bool:
    client = batches.make_batch(
        options.provider, base_url=options.base_url, timeout=options.timeout, folder=options.batch_folder
    )
    try:
        if options.cancel_batches:
            log.info("%d jobs cancelled; what they answered is kept.", await jobs.cancel(client, store))
            return False
        return await jobs.run(
            questions,
            settings=options.settings,
            client=client,
            store=store,
            price=price,
            size=options.batch_size,
        )
    finally:
        await client.close()


class _Progress:
    """The progress bar: rows, failures, tokens per second, cost."""

    def __init__(self, bar: Any, *, price: money.Price | None) -> None:
        self._bar, self._price = bar, price

    def __call__(self, totals: sampler.Totals) -> None:
        self._bar.update(totals.rows - self._bar.n)
        failed = sum(totals.failures.values())
        elapsed = max(self._bar.format_dict["elapsed"], 1e-9)
        parts = [f"{failed} failed", f"{totals.output_tokens / elapsed:.0f} tokens/s"]
        if self._price is not None:
            parts.append(f"${totals.spent:.2f}")
        self._bar.set_postfix_str(", ".join(parts), refresh=False)


def _account(totals: sampler.Totals, price: money.Price | None) -> str:
    cost = "price not known" if price is None else f"${totals.spent:.4f}"
    failures = ", ".join(f"{count} {reason}" for reason, count in sorted(totals.failures.items())) or "none"
    return (
        f"{totals.rows} rows; {totals.found} replies were stored before, {totals.asked} requests gave {totals.replies} "
        f"({totals.retried} repeated); failures: {failures}; {totals.input_tokens} + {totals.output_tokens} tokens, "
        f"{cost}."
    )


def _show_plan(
    dataset: Dataset,
    splits: Mapping[str, release.Source],
    template: prompts.Template,
    options: Options,
    price: money.Price | None,
    *,
    prompt: bool = True,
) -> None:
    """Prints what would be asked, and what it would cost; an estimate, and called one."""
    settings = options.settings
    rows = [row for source in splits.values() for row in source.rows]
    if not rows:
        raise ValueError(f"{dataset.name} has no rows to ask about here.")
    # A sample of the rows: their lengths differ little beside the exemplars, which all prompts share.
    some = rows[:: max(1, len(rows) // 200)]
    lengths = [money.estimate_tokens(prompts.render(template, row.input).sent(settings.form)) for row in some]
    count = len(rows) * settings.samples
    sent = count * sum(lengths) // len(lengths)
    # Replies are short: about as long as the exemplars' answers.
    answers = [money.estimate_tokens(exemplar.rationale + exemplar.label) for exemplar in template.exemplars]
    got = count * min(settings.parameters.max_tokens, 10 + sum(answers) // max(1, len(answers)))
    if prompt:
        for row in rows[:_SHOWN]:
            rendered = prompts.render(template, row.input)
            if settings.form == "completion":
                print(rendered.text)
            else:
                for message in rendered.messages:
                    print(f"[{message.role}]\n{message.content}\n")
    print(f"{dataset.name}: " + ", ".join(f"{len(source.rows)} {split}" for split, source in splits.items()) + " rows")
    print(f"teacher: {options.provider} {settings.model}, {settings.form}, prompt {template.hash}")
    print(f"requests: {count} at most, fewer where replies are stored already ({options.store})")
    print(f"tokens (estimated): {sent:,} sent, {got:,} received")
    if price is None:
        print(f"cost: the price of {settings.model!r} is not known; --price IN,OUT in USD per million tokens")
    else:
        cost = money.cost(price, input_tokens=sent, output_tokens=got, batch=options.batch)
        print(f"cost (estimated): ${cost:,.2f}" + (" in batch mode" if options.batch else ""))
    print(f"time (estimated): {_time(settings, count=count, tokens=sent + got, options=options)}")


def _time(settings: sampler.Settings, *, count: int, tokens: int, options: Options) -> str:
    if options.batch:
        return "up to 24 hours, as batch jobs are"
    # Two seconds for a reply is usual; the limits may say more.
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
    if parameters.stops:
        parts.append(f"ended by {', '.join(map(repr, parameters.stops))}")
    return ", ".join(parts)


def _write_page(
    path: str,
    dataset: Dataset,
    splits: Mapping[str, release.Source],
    template: prompts.Template,
    options: Options,
    store: Store,
    manifest: Manifest,
    price: money.Price | None,
) -> None:
    counts = store.counts()
    facts = {
        "Dataset": f"{dataset.name}: " + ", ".join(f"{s['rows']:,} {name}" for name, s in manifest["splits"].items()),
        "Teacher": f"{options.settings.model} ({options.provider}), {options.settings.form}",
        "Replies": _drawn(options.settings.parameters),
        "Samples per row": str(options.settings.samples),
        "Prompt": f"{template.hash}, version {template.version}",
        "Replies in the store": f"{counts['replies']:,}",
        "Tokens in the store": f"{counts['input_tokens']:,} sent, {counts['output_tokens']:,} received",
    }
    if price is not None:
        spent = money.cost(
            price, input_tokens=counts["input_tokens"], output_tokens=counts["output_tokens"], batch=options.batch
        )
        facts["Cost of the store"] = f"${spent:,.2f} at today's price"

    def shown() -> Iterator[page.Example]:
        for source in splits.values():
            found = export.answers(
                dataset,
                source.rows,
                template=template,
                parser=options.parser,
                settings=options.settings,
                store=store,
            )
            for answered in found:
                record = answered.record
                right = None
                if record.label is not None and record.teacher_label is not None:
                    right = dataset.same_label(record.label, record.teacher_label)
                rendered = prompts.render(template, record.input)
                yield page.Example(
                    id=record.id,
                    input=record.input,
                    label=record.label,
                    prompt=rendered.text,
                    replies=answered.replies,
                    rationale=record.rationale,
                    teacher_label=record.teacher_label,
                    outcome=record.outcome,
                    hinted=record.hinted,
                    right=right,
                    votes=record.votes,
                )

    page.write_page(path, title=f"Teacher: {dataset.name}", facts=facts, rows=shown())
    log.info("Page: %s", path)
