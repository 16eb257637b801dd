"""The demo: the whole method on the built-in dataset, from questions to a page of results.

The demo generates problems, asks the scripted teacher, parses its replies into records, trains the embedded student
with both methods on several fractions of the data, and reports test accuracies. It uses the ordinary commands: `sbs
teach --provider scripted`, and `sbs sweep` with gin_configs/experiments/builtin/demo.gin.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sbs_jax import sweep
from sbs_jax.pages import rendering
from sbs_jax.stats import quality

ROWS: Mapping[str, int] = {"train": 800, "validation": 300, "test": 1000}
DATA_SEED = 20261122
METHODS = ("standard_finetuning", "step_by_step")
FRACTIONS = (0.25, 0.5)
SEEDS = tuple(range(10))
BINDINGS: Mapping[str, Any] = {}  # tests shorten the demo with these
JOBS = 2


def plan(folder: Path) -> sweep.Sweep:
    """Lists the runs of the table."""
    return sweep.Sweep(
        sweep_dir=str(folder),
        records_dir=str(folder / "records"),
        datasets=("builtin",),
        sizes=("demo",),
        methods=METHODS,
        fractions=FRACTIONS,
        seeds=SEEDS,
        bindings=BINDINGS,
    )


def main(output: str | Path, *, entry: Callable[[list[str]], int]) -> int:
    """Runs the demo below `output`, prints the table, writes `<output>/index.html`, and returns the exit status.

    Called again with the same `output`, it resumes with the missing runs. `entry` runs `sbs` commands in worker
    processes (cli.main.main).
    """
    begin = time.monotonic()
    folder = Path(output).absolute()
    for page in ("index.html", "teacher.html"):
        rendering.check_place(folder / page)
    folder.mkdir(parents=True, exist_ok=True)
    with sweep.Workers(entry=entry, one_thread=True) as started:
        accuracy = make_records(folder)
        cells = plan(folder).cells()
        print(f"\nTraining {len(cells)} students, {JOBS} at a time ..", flush=True)
        parts = sweep.groups(sweep.unfinished(cells), jobs=JOBS, together=None)
        for ended in sweep.run(parts, started, jobs=JOBS):
            print(
                f"  [{ended.number:2}/{len(cells)}] {_name(ended.cell)}: {ended.result} ({ended.seconds:.0f} s)",
                flush=True,
            )
            if ended.status:
                raise OSError(f"{_name(ended.cell)}: {ended.last_words()}")
        explaining = max((cell for cell in cells if cell.method == METHODS[1]), key=lambda cell: cell.fraction)
        explain(explaining, started, log=folder / "logs" / "rationales.log")
    _report(folder, cells, teacher_accuracy=accuracy)
    print(f"Finished in {(time.monotonic() - begin) / 60:.1f} minutes.")
    return 0


def explain(cell: sweep.Cell, started: sweep.Workers, *, log: Path) -> None:
    """Writes the rationales of one student on the test rows (`sbs rationales`), unless an earlier call has."""
    if (Path(cell.model_dir) / quality.NAME).exists():
        return
    print(f"  Asking one student for its rationales ({_name(cell)}) ..", flush=True)
    started.start("rationales", ["rationales", str(cell.model_dir)], log=log)
    status = None
    while status is None:
        status = dict(started.ended(timeout=0.2)).get("rationales")
    if status:
        raise OSError(f"sbs rationales {cell.model_dir} failed with status {status}; its output is in {log}.")


def _name(cell: sweep.Cell) -> str:
    """Returns a readable name: "step by step, 50 % of the data, seed 1"."""
    return f"{cell.method.replace('_', ' ')}, {100 * cell.fraction:g} % of the data, seed {cell.seed}"


def make_records(folder: Path) -> float:
    """Writes problems, replies and records, prints an example, and returns the teacher's test accuracy in percent."""
    from sbs_jax.data import records
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
    assert accuracy is not None  # every row has a label and a reply
    return accuracy


def _report(folder: Path, cells: Sequence[sweep.Cell], *, teacher_accuracy: float) -> None:
    from sbs_jax.pages import report
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
        [report.identify(cell.model_dir) for cell in cells],
        title="Distilling step-by-step on the built-in dataset",
        notes=notes,
        command="sbs demo",
        next_commands=[
            (
                "The same with a table of yours, whose columns you name (docs/howto/dataset.md has the commands after "
                "it):",
                "sbs init questions.csv --input question --label answer",
            )
        ],
        teacher_accuracy=teacher_accuracy,
    )
    summary = study.summaries[0]
    print(f"\n{report.headline(summary)}.\n\n{report.table(summary)}\n\nPage: {page}")
