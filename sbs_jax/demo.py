"""The demo: the whole method on the built-in dataset, from questions to a page of results.

Generates problems, asks the scripted teacher about them, parses its replies into records, trains the embedded student
with both methods on several shares of the data, and reports test accuracies. Every part is the ordinary one: the asking
is `sbs teach --provider scripted`, and each run is `sbs train` with gin_configs/experiments/builtin/demo.gin.
"""

import contextlib
import dataclasses
import itertools
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TextIO

from sbs_jax import configuration
from sbs_jax import main as command_line

ROWS: Mapping[str, int] = {"train": 800, "validation": 300, "test": 1000}
DATA_SEED = 20261122
METHODS = ("standard_finetuning", "step_by_step")
FRACTIONS = (0.25, 0.5, 1.0)
SEEDS = (0, 1, 2)
EXTRA_BINDINGS: Sequence[str] = ()  # for tests: a shorter demo
# Each worker computes on one core: arrays this small gain nothing from several threads.
WORKERS = 2
_ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One run of the matrix."""

    method: str
    fraction: float
    seed: int
    folder: Path

    @property
    def model_dir(self) -> Path:
        return self.folder / "runs" / f"{self.method}-{self.fraction:g}-{self.seed}"

    @property
    def name(self) -> str:
        """For people: "step by step, 50 % of the data, seed 1"."""
        return f"{self.method.replace('_', ' ')}, {100 * self.fraction:g} % of the data, seed {self.seed}"

    def gin_files(self) -> list[str]:
        """What `sbs train` would be given."""
        return ["gin_configs/experiments/builtin/demo.gin", f"gin_configs/methods/{self.method}.gin"]

    def bindings(self) -> list[str]:
        """What the run sets beyond its gin files."""
        return [
            f"RECORDS_DIR={self.folder / 'records'}",
            f"MODEL_DIR={self.model_dir}",
            f"FRACTION={self.fraction}",
            f"SEED={self.seed}",
            *EXTRA_BINDINGS,
        ]


def main(output: str | Path) -> int:
    """Runs everything below `output`, prints the table, writes `<output>/index.html`; returns the exit status.

    Called again with the same `output`, it goes on with what is missing.
    """
    begin = time.monotonic()
    folder = Path(output).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    accuracy = _make_records(folder)
    plans = [
        Plan(method=method, fraction=fraction, seed=seed, folder=folder)
        for fraction, seed, method in itertools.product(sorted(FRACTIONS, reverse=True), SEEDS, METHODS)
    ]
    print(f"\nTraining {len(plans)} students, {WORKERS} at a time ..", flush=True)
    for number, (plan, metrics, seconds) in enumerate(train_all(plans), start=1):
        test = metrics["test"]["accuracy"]
        print(f"  [{number:2}/{len(plans)}] {plan.name}: test accuracy {test:.1f} % ({seconds:.0f} s)", flush=True)
    _report(folder, plans, teacher_accuracy=accuracy)
    print(f"Finished in {(time.monotonic() - begin) / 60:.1f} minutes.")
    return 0


def _make_records(folder: Path) -> float:
    """Problems, replies and records; prints what they look like; returns the teacher's accuracy on test."""
    from sbs_jax import records
    from sbs_jax.teacher import clients, command, prompts, sampler
    from tasks import builtin

    builtin.write_release(folder / "release", rows=ROWS, seed=DATA_SEED)
    print("Asking the scripted teacher ..", flush=True)
    manifest = command.teach(
        command.Options(
            dataset=builtin.NAME,
            inputs_dir=str(folder / "release"),
            provider="scripted",
            template=prompts.read(builtin.NAME),
            settings=sampler.Settings(
                model="scripted", form="chat", parameters=clients.Parameters(temperature=0.0, max_tokens=256)
            ),
            price="0,0",
            store=str(folder / "teacher.sqlite"),
            records_dir=str(folder / "records"),
            page=str(folder / "teacher.html"),
            overwrite=True,
        )
    )
    if manifest is None:  # interrupted
        raise KeyboardInterrupt
    first = records.read_records(folder / "records" / builtin.NAME / "train.jsonl")[0]
    print(f"Question:  {first.input}")
    print(f"Label:     {first.label}")
    print(f"Teacher:   {first.teacher_text!r}")
    print(f"Rationale: {first.rationale}")
    for split, summary in manifest["splits"].items():
        accuracy = summary["teacher_accuracy"]
        print(f"{split}: {summary['rows']} rows; teacher right on {accuracy:.1f} %; replies: {summary['outcomes']}")
    accuracy = manifest["splits"]["test"]["teacher_accuracy"]
    assert accuracy is not None  # every row is labelled and answered
    return accuracy


def train_all(plans: list[Plan]) -> Iterator[tuple[Plan, dict[str, Any], float]]:
    """Each plan with its last metrics and its seconds, as they finish."""
    context = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
    with ProcessPoolExecutor(WORKERS, mp_context=context, initializer=_start_worker) as pool:
        running = {pool.submit(train_one, plan): plan for plan in plans}
        try:
            for done in as_completed(running):
                yield running[done], *done.result()
        finally:
            for future in running:
                future.cancel()


def _start_worker() -> None:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_ONE_THREAD}".strip()
    command_line.import_tensorflow()


def train_one(plan: Plan) -> tuple[dict[str, Any], float]:
    """One run, in a worker; what it says goes to a file beside the run."""
    begin = time.monotonic()
    log = plan.folder / "logs" / f"{plan.model_dir.name}.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("a", encoding="utf-8") as file, _output_to(file):
        from sbs_jax import train

        config, text = configuration.configure(
            "train.TrainConfig",
            gin_files=plan.gin_files(),
            bindings=plan.bindings(),
        )
        metrics = train.train(config, config_text=text)
    return metrics, time.monotonic() - begin


@contextlib.contextmanager
def _output_to(file: TextIO) -> Iterator[None]:
    with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
        yield


def _report(folder: Path, plans: list[Plan], *, teacher_accuracy: float) -> None:
    from sbs_jax import report
    from tasks import builtin

    wrong, unusable = 100 * builtin.WRONG, 100 * builtin.UNUSABLE
    notes = (
        f"Questions about lost things, {ROWS['train']:,} for training, and a scripted teacher that argues for the "
        f"wrong answer on {wrong:g} % of them and gives an unusable reply on {unusable:g} %.",
        "Both methods start from the same pre-trained student of 0.22 million parameters and see the same label "
        "examples for the same number of updates. How the problems were chosen: docs/experiments.md.",
    )
    page = folder / "index.html"
    study = report.write_page(
        page,
        [report.identify(plan.model_dir) for plan in plans],
        title="Distilling step-by-step on the built-in dataset",
        notes=notes,
        command="sbs demo",
        teacher_accuracy=teacher_accuracy,
    )
    print(f"\n{report.table(study.summaries[0])}\n\nPage: {page}")
