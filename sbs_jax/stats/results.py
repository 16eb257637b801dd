"""Run directories, read for a report: method, fraction and seed of each run, and its files."""

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

import numpy as np

from sbs_jax.checks import nearest, number, whole_number
from sbs_jax.data.dataset import tasks_of
from sbs_jax.run import directory
from sbs_jax.run import manifest as run_manifest
from sbs_jax.stats.intervals import accuracy_interval
from sbs_jax.stats.quality import Quality
from sbs_jax.stats.quality import read as read_quality
from sbs_jax.storage import json_files, places, user_files

FINE_TUNING = "standard fine-tuning"
DISTILLATION = "standard distillation"
STEP_BY_STEP = "step-by-step"
SINGLE_TASK = "single-task rationale"
CASCADE = "cascade"
POLICY = "policy optimization"
TEACHER_LABELS = "teacher labels"
ADDITIONS = (
    "several rationales",
    "mutual information",
    "alpha over time",
    "soft targets",
    "on-policy",
)  # how they begin
METHODS = (FINE_TUNING, DISTILLATION, STEP_BY_STEP, SINGLE_TASK, CASCADE)
_METHOD_OF_KIND = {
    "label": FINE_TUNING,
    "step_by_step": STEP_BY_STEP,
    "rationale_then_label": SINGLE_TASK,
    "cascade": CASCADE,
}


class _Options(TypedDict):
    label_source: Literal["human", "teacher"]
    rationales: Literal["all", "agreeing"]
    fraction: float
    seed: int
    records_dir: str
    label_prefix: NotRequired[str]
    folds: NotRequired[int]
    fold: NotRequired[int]


class _Split(TypedDict):
    sha256: str
    counts: NotRequired[dict[str, Any]]


class _Definition(TypedDict):
    labels: NotRequired[list[str] | None]


class _Data(TypedDict):
    dataset: str
    options: _Options
    splits: dict[str, _Split]
    definition: NotRequired[_Definition]


class _Task(TypedDict):
    mixture_or_task_name: str
    primary_metric: NotRequired[str]


class _Manifest(TypedDict):
    """Fields of a manifest that a report uses."""

    data: _Data
    run: _Task
    git_revision: NotRequired[str]
    versions: NotRequired[dict[str, Any]]
    devices: NotRequired[list[Any]]
    parameter_count: NotRequired[int]
    labels: NotRequired[list[str] | None]
    settings: NotRequired[dict[str, Any] | None]
    ended: NotRequired["Ended"]


class Ended(TypedDict):
    """End of a run, as its manifest has it."""

    step: int
    why: str
    memorized: NotRequired[str | None]


class _Row(TypedDict):
    """A row of a predictions file."""

    id: str
    correct: bool
    input: NotRequired[str]
    target: NotRequired[str]
    prediction: NotRequired[str]
    scores: NotRequired[dict[str, float]]


@dataclass(frozen=True)
class Run:
    """One run directory, with its method, fraction and seed in a comparison."""

    path: str | Path
    method: str  # "standard fine-tuning", "step-by-step", ..
    fraction: float  # of the training rows, 0 to 1
    seed: int
    dataset: str | None = None  # the one to report on, if it was trained on several


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished run, or those of all folds of a cross-validation, joined (`join_folds`)."""

    run: Run  # with folds, the first one
    manifest: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]  # lines of metrics.jsonl
    metric: str  # "accuracy", "equation_accuracy", ..
    test_step: int  # of the checkpoint that was tested
    test_rows: Mapping[str, Mapping[str, Any]]  # id to row of the predictions file
    examples_per_update: int | None  # None if config.gin does not say
    quality: Quality | None  # of its rationales, if measured
    folds: tuple["Result", ...] = ()  # the runs that were joined

    @property
    def runs(self) -> tuple["Result", ...]:
        """Single runs: those of the folds, or this one."""
        return self.folds or (self,)

    @property
    def fold(self) -> tuple[int, int] | None:
        """Number of a fold and how many there are; None if it has no folds, or they are joined."""
        options = self.manifest["data"]["options"]
        return (options["fold"], options["folds"]) if options.get("folds") and not self.folds else None

    @property
    def accuracy(self) -> float:
        """Accuracy on the test rows, in percent."""
        return 100.0 * sum(row["correct"] for row in self.test_rows.values()) / len(self.test_rows)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy, in percent; it covers the choice of test rows, not the seed."""
        _, low, high = accuracy_interval(np.array([[float(row["correct"]) for row in self.test_rows.values()]]))
        return low, high

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The closed set of labels; None if there is none, or the run is of a version that did not write it."""
        definition = self.manifest["data"].get("definition") or {}
        found = self.manifest.get("labels") or definition.get("labels")
        return tuple(found) if found else None

    @property
    def ended(self) -> Ended | None:
        """Why and where it ended; None in a run of a version that did not write it."""
        return self.manifest.get("ended")

    @property
    def patient(self) -> bool:
        """True if it may end early, by PATIENCE."""
        return (self.manifest.get("settings") or {}).get("patience") is not None

    @property
    def updates(self) -> int:
        """Number of updates that were made."""
        return max(line["step"] for line in self.metrics)

    @property
    def label_rows(self) -> int:
        """Distinct training rows whose label was trained on; a mean over folds."""
        if self.folds:
            return round(statistics.fmean(one.label_rows for one in self.folds))
        counts = self.manifest["data"]["splits"]["train"]["counts"]
        return counts[tasks_of(self.kind)[0]]

    @property
    def kind(self) -> str:
        """Kind of task or mixture: "label", "step_by_step", "rationale_then_label" or "cascade"."""
        return _kind(self.manifest)

    @property
    def train_seconds(self) -> float:
        """Time of the training steps, with compilation (it is in the first log window) and without evaluation.

        A mean over folds.
        """
        if self.folds:
            return statistics.fmean(one.train_seconds for one in self.folds)
        seconds, previous = 0.0, 0
        for step, per_step in self.curve("train", "seconds_per_step"):
            seconds, previous = seconds + per_step * (step - previous), step
        return seconds

    def curve(self, kind: str, name: str) -> list[tuple[int, float]]:
        """Lists (step, value) of the lines of this kind ("train", "validation") that have the value.

        With folds, means over the folds at the steps that all of them have.
        """
        if self.folds:
            first, *others = [dict(one.curve(kind, name)) for one in self.folds]
            steps = sorted(set(first).intersection(*others))
            return [(step, statistics.fmean(each[step] for each in (first, *others))) for step in steps]
        return [(line["step"], float(line[name])) for line in self.metrics if line["kind"] == kind and name in line]


def runs_of(path: str | Path) -> list[Run]:
    """Reads what `identify` reads for each dataset that a run directory was trained on."""
    whole = _manifest(places.of(path))
    return [_identified(path, whole, name) for name in run_manifest.parts(whole) or [None]]


def identify(path: str | Path, *, dataset: str | None = None) -> Run:
    """Reads the method, fraction and seed of a run directory from its manifest.

    {"label_source": "teacher"} with `svamp_label` is standard distillation, with `svamp_step_by_step` it is
    "step-by-step (teacher labels)". Of a run of several datasets, `dataset` names one: "step-by-step (4 datasets)".
    """
    return _identified(path, _manifest(places.of(path)), dataset)


def _identified(path: str | Path, whole: Mapping[str, Any], dataset: str | None) -> Run:
    manifest = _of_dataset(whole, dataset, path=places.of(path))
    options, kind = manifest["data"]["options"], _kind(manifest)
    if kind not in _METHOD_OF_KIND:
        name = json_files.brief(manifest["run"]["mixture_or_task_name"])
        raise ValueError(
            f"{path} trained on {name}, which is not a known method "
            f"({', '.join(_METHOD_OF_KIND)}). Name it yourself: sbs_jax.pages.report.write_page with "
            "Run(path, method, fraction, seed)."
        )
    method, remarks = _METHOD_OF_KIND[kind], []
    if together := run_manifest.parts(whole):
        remarks.append(f"{len(together)} datasets")
    else:
        dataset = None
    if options["label_source"] == "teacher":
        if method == FINE_TUNING:
            method = DISTILLATION
        else:
            remarks.append(TEACHER_LABELS)
    if (settings := manifest.get("settings") or {}).get("rewards") is not None:
        method = POLICY
        remarks.append(settings["advantage"])
    if kind != "label":
        if options["rationales"] != "all":
            remarks.append(f"{options['rationales']} rationales")
        remarks += _additions(settings, options)
    if remarks:
        method += f" ({', '.join(remarks)})"
    return Run(path, method, float(options["fraction"]), options["seed"], dataset)


def _additions(settings: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    """Names what a run adds to step-by-step, as files of gin_configs/methods/ do. A run of before has fewer keys."""
    form = settings.get("mutual_information")
    there = (
        options.get("rationales_per_example", 1) != 1,
        form is not None,
        isinstance(settings.get("alpha"), Mapping),
        settings.get("soft_targets") is not None,
        settings.get("teacher") is not None and settings.get("rewards") is None,
    )
    found = [name for name, is_there in zip(ADDITIONS, there, strict=True) if is_there]
    return [f"{name} {form.replace('_', ' ')}" if form and name == ADDITIONS[1] else name for name in found]


def is_tested(path: str | Path) -> bool:
    """Returns True if a run has reached its test, the last part of `sbs train`."""
    return any(line["kind"] == "test" for line in directory.read_metrics(path))


def load(run: Run) -> Result:
    """Reads a run directory. ValueError and FileNotFoundError name the file, its fault and the remedy."""
    path = places.of(run.path)
    manifest = _of_dataset(_manifest(path), run.dataset, path=path)
    metrics = metrics_of(path, dataset=run.dataset)
    if not metrics:
        raise ValueError(
            f"{path} has no metrics: metrics.jsonl is missing or empty, so the run stopped before its first log line. "
            "Repeat its `sbs train` command."
        )
    tests = [line for line in metrics if line["kind"] == "test"]
    if not tests:
        raise ValueError(
            f"{path} has no test metrics; its last line is of step {metrics[-1]['step']}. Repeat its `sbs train` "
            "command with evaluate_test on; it resumes from the last checkpoint."
        )
    test, step = tests[-1], tests[-1]["step"]
    names = [name for name in test if name.rpartition("_")[2] == "accuracy"]
    if not names:
        raise ValueError(f"{path}: the test line has {json_files.part(', '.join(test))}; expected an accuracy.")
    rows = _test_rows(path, step=step, dataset=run.dataset)
    metric = _graded_by(rows, {name: test[name] for name in names}, primary=manifest["run"].get("primary_metric"))
    result = Result(
        run=run,
        manifest=manifest,
        metrics=metrics,
        metric=metric,
        test_step=step,
        test_rows=rows,
        examples_per_update=_examples_per_update(path),
        quality=read_quality(path),
    )
    if abs(result.accuracy - test[metric]) > 0.01:
        raise ValueError(
            f"{path}: metrics.jsonl gives {metric} {test[metric]:.2f} on test, the predictions of step {step} give "
            f"{result.accuracy:.2f}; expected the same. Train this run again."
        )
    return result


def metrics_of(run: Path, *, dataset: str | None) -> list[dict[str, Any]]:
    """Reads the metrics lines of a run; those of one of its datasets by their own names.

    "svamp/accuracy" becomes "accuracy", and "loss/svamp/label" becomes "loss/label".
    """
    lines = directory.read_metrics(run)
    if dataset is None:
        return lines
    return [
        {f"/{name}".replace(f"/{dataset}/", "/", 1).removeprefix("/"): value for name, value in line.items()}
        for line in lines
    ]


def _graded_by(rows: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, float], *, primary: str | None) -> str:
    """Returns the accuracy that `correct` of the rows is; the first one if none agrees with them."""
    first = sorted(metrics, key=lambda name: (name != primary, name != "accuracy"))
    share = 100.0 * sum(row["correct"] for row in rows.values()) / max(1, len(rows))
    return next((name for name in first if abs(metrics[name] - share) <= 0.01), first[0])


def join_folds(
    results: Sequence[Result], *, size: Callable[[Result], str] = lambda _: ""
) -> tuple[list[Result], list[str]]:
    """Joins the folds of each method, fraction and seed to one result on all rows, each row graded once.

    Also returns a sentence for each that lacks folds; its other folds are left out. `size` tells students apart.
    """
    joined: list[Result] = []
    alike: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        if result.fold is None:
            joined.append(result)
        else:
            key = (size(result), result.run.method, result.run.fraction, result.run.seed, result.fold[1])
            alike.setdefault(key, []).append(result)
    left_out = []
    for (_, method, fraction, seed, count), of_seed in alike.items():
        parts = sorted(of_seed, key=lambda result: result.manifest["data"]["options"]["fold"])
        numbers = [part.manifest["data"]["options"]["fold"] for part in parts]
        missing = [str(number) for number in range(count) if number not in numbers]
        if missing:
            left_out.append(
                f"{method} at fraction {fraction:g} with seed {seed} lacks fold {', '.join(missing)} of {count}, so "
                "its other folds are not counted."
            )
            continue
        _check_folds(parts, count)
        rows = {row_id: row for part in parts for row_id, row in part.test_rows.items()}
        joined.append(replace(parts[0], test_rows=rows, quality=None, folds=tuple(parts)))
    return joined, left_out


def _check_folds(parts: Sequence[Result], count: int) -> None:
    """Raises ValueError unless the runs are the folds of one cross-validation, equally long."""
    paths = ", ".join(str(part.run.path) for part in parts)
    if len(parts) > count:
        raise ValueError(f"{paths} are {len(parts)} runs of {count} folds; give one run of each fold.")
    if len({part.manifest["data"]["splits"]["test"]["sha256"] for part in parts}) > 1:
        raise ValueError(f"{paths} are folds of different records; train them on the same files.")
    if len({part.updates for part in parts}) > 1 and not all(part.patient for part in parts):
        found = ", ".join(f"{part.updates} in {part.run.path}" for part in parts)
        raise ValueError(f"The folds differ in their number of updates ({found}). Finish or leave out the short ones.")


def _kind(manifest: Mapping[str, Any]) -> str:
    return manifest["run"]["mixture_or_task_name"].removeprefix(f"{manifest['data']['dataset']}_")


def _manifest(path: Path) -> dict[str, Any]:
    file = path / directory.MANIFEST
    if not file.is_file():
        folders = [] if path.is_dir() or not path.parent.is_dir() else [p for p in path.parent.iterdir() if p.is_dir()]
        problem = f"has no {directory.MANIFEST}" if path.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"{path} {problem}; expected a run directory of `sbs train` (its MODEL_DIR)."
            f"{nearest(str(path), map(str, folders))}"
        )
    value = json_files.read_json(file)
    try:
        return dict(json_files.typed(value, _Manifest, extra=True))
    except ValueError as error:
        raise ValueError(f"{file}: {error} Train this run again.") from None


def _of_dataset(whole: Mapping[str, Any], dataset: str | None, *, path: Path) -> dict[str, Any]:
    """Returns a manifest, checked, as if the run had been trained on this dataset alone if it had several."""
    if (several := run_manifest.parts(whole)) and dataset is None:
        raise ValueError(f"{path} was trained on {', '.join(several)}; choose one of these datasets.")
    found = run_manifest.of_part(whole, dataset or "")
    try:
        _check_values(json_files.typed(found, _Manifest, extra=True) if several else cast(_Manifest, found))
    except ValueError as error:
        raise ValueError(f"{path / directory.MANIFEST}: {error} Train this run again.") from None
    return found


def _check_values(manifest: _Manifest) -> None:
    """Raises ValueError for values that no run of `sbs train` has."""
    data = manifest["data"]
    if _kind(manifest) not in _METHOD_OF_KIND:  # such as pre-training, which has no test; `identify` says so
        return
    if not 0 < data["options"]["fraction"] <= 1:
        raise ValueError(f"data.options.fraction is {data['options']['fraction']}; expected more than 0, at most 1.")
    for name in ("train", "test"):
        if name not in data["splits"]:
            found = json_files.brief(sorted(data["splits"]))
            raise ValueError(f"data.splits has {found}; expected {name!r} too.")
    counts = data["splits"]["train"].get("counts", {})
    needed = tasks_of(_kind(manifest))[0]
    whole_number(f"data.splits.train.counts.{needed}", counts.get(needed), least=0)


def _test_rows(path: Path, *, step: int, dataset: str | None) -> dict[str, dict[str, Any]]:
    one = "*" if dataset is None else f"{dataset}_*"
    files = sorted((path / "predictions").glob(f"{one}-test-{step}.jsonl"))
    if len(files) != 1:
        held = ", ".join(file.name for file in files) or "none"
        raise ValueError(
            f"{path} was tested at step {step}; expected one file predictions/<task>-test-{step}.jsonl, found {held}. "
            "Delete the test line of metrics.jsonl and repeat the `sbs train` command to test it again."
        )
    rows: dict[str, dict[str, Any]] = {}
    for line, found in json_files.read_json_lines(files[0]):
        row = json_files.typed(found, _Row, where=f"{files[0]}:{line}", extra=True)
        for name, score in row.get("scores", {}).items():
            number(f"{files[0]}:{line}: scores.{name}", score, least=0, most=1)
        rows[row["id"]] = dict(row)
    return rows


def _examples_per_update(path: Path) -> int | None:
    """Reads EXAMPLES from the configuration, if rows per update follow from it (not with packing)."""
    config = path / "config.gin"
    text = json_files.decoded(user_files.whole(config), str(config)) if config.is_file() else ""
    found = re.search(r"^EXAMPLES = ([0-9]{1,12})$", text, flags=re.MULTILINE)
    derived = re.search(r"^BATCH_SIZE = @(\w+\.)?rows_per_update\(\)$", text, flags=re.MULTILINE)
    packed = re.search(r"^PACK = True$", text, flags=re.MULTILINE)
    return int(found[1]) if found and derived and not packed else None
