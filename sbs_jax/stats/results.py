"""Read run directories for a report: method, fraction and seed of each run, and everything it left behind."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbs_jax.checks import nearest
from sbs_jax.run import directory
from sbs_jax.stats.quality import Quality
from sbs_jax.stats.quality import read as read_quality
from sbs_jax.storage import json_files

FINE_TUNING = "standard fine-tuning"
DISTILLATION = "standard distillation"
STEP_BY_STEP = "step-by-step"
SINGLE_TASK = "single-task rationale"
TEACHER_LABELS = "teacher labels"
METHODS = (FINE_TUNING, DISTILLATION, STEP_BY_STEP, SINGLE_TASK)
_SINGLE_TASK_KIND = "rationale_then_label"
_METHOD_OF_KIND = {"label": FINE_TUNING, "step_by_step": STEP_BY_STEP, _SINGLE_TASK_KIND: SINGLE_TASK}


@dataclass(frozen=True)
class Run:
    """One run directory, with its method, fraction and seed in a comparison."""

    path: str | Path
    method: str  # "standard fine-tuning", "step-by-step", ..
    fraction: float  # of the training rows, 0 to 1
    seed: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished run."""

    run: Run
    manifest: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]  # lines of metrics.jsonl
    metric: str  # "accuracy", "equation_accuracy", ..
    test_step: int  # of the checkpoint that was tested
    test_rows: Mapping[str, Mapping[str, Any]]  # id to row of the predictions file
    examples_per_update: int | None  # None if config.gin does not say
    quality: Quality | None  # of its rationales, if measured

    @property
    def accuracy(self) -> float:
        """Accuracy on the test rows, in percent."""
        return 100.0 * sum(row["correct"] for row in self.test_rows.values()) / len(self.test_rows)

    @property
    def updates(self) -> int:
        """Number of updates that were made."""
        return max(line["step"] for line in self.metrics)

    @property
    def label_rows(self) -> int:
        """Distinct training rows whose label was trained on."""
        counts = self.manifest["data"]["splits"]["train"]["counts"]
        return counts[self.kind if self.kind == _SINGLE_TASK_KIND else "label"]

    @property
    def kind(self) -> str:
        """Kind of task: "label", "step_by_step" or "rationale_then_label"."""
        return _kind(self.manifest)

    @property
    def train_seconds(self) -> float:
        """Time of the training steps, with compilation (it is in the first log window) and without evaluation."""
        seconds, previous = 0.0, 0
        for step, per_step in self.curve("train", "seconds_per_step"):
            seconds, previous = seconds + per_step * (step - previous), step
        return seconds

    def curve(self, kind: str, name: str) -> list[tuple[int, float]]:
        """Lists (step, value) of the lines of this kind ("train", "validation") that have the value."""
        return [(line["step"], float(line[name])) for line in self.metrics if line["kind"] == kind and name in line]


def identify(path: str | Path) -> Run:
    """Reads the method, fraction and seed of a run directory from its manifest.

    {"label_source": "teacher"} with `svamp_label` is standard distillation, with `svamp_step_by_step` it is
    "step-by-step (teacher labels)".
    """
    manifest = _manifest(Path(path))
    options, kind = manifest["data"]["options"], _kind(manifest)
    if kind not in _METHOD_OF_KIND:
        raise ValueError(
            f"{path} trained on {manifest['run']['mixture_or_task_name']}, which is none of the known methods "
            f"({', '.join(_METHOD_OF_KIND)}). Name it yourself: sbs_jax.pages.report.write_page with "
            "Run(path, method, fraction, seed)."
        )
    method, remarks = _METHOD_OF_KIND[kind], []
    if options["label_source"] == "teacher":
        if method == FINE_TUNING:
            method = DISTILLATION
        else:
            remarks.append(TEACHER_LABELS)
    if options["rationales"] != "all" and kind != "label":
        remarks.append(f"{options['rationales']} rationales")
    if remarks:
        method += f" ({', '.join(remarks)})"
    return Run(path, method, float(options["fraction"]), options["seed"])


def is_tested(path: str | Path) -> bool:
    """Tells whether a run has reached its test, the last thing that `sbs train` does."""
    return any(line["kind"] == "test" for line in directory.read_metrics(path))


def load(run: Run) -> Result:
    """Reads a run directory. ValueError and FileNotFoundError name the file, its fault and the remedy."""
    path = Path(run.path)
    manifest = _manifest(path)
    metrics = directory.read_metrics(path)
    if not metrics:
        raise ValueError(
            f"{path} has no metrics: metrics.jsonl is missing or empty, so the run stopped before its first log line. "
            "Repeat its `sbs train` command."
        )
    tests = [line for line in metrics if line["kind"] == "test"]
    if not tests:
        raise ValueError(
            f"{path} has no test metrics; its last line is of step {metrics[-1]['step']}. Repeat its `sbs train` "
            "command with evaluate_test on; it goes on from the last checkpoint."
        )
    test, step = tests[-1], tests[-1]["step"]
    names = [name for name in test if name.rpartition("_")[2] == "accuracy"]
    if not names:
        raise ValueError(f"{path}: the test line has {json_files.part(', '.join(test))}; expected an accuracy.")
    metric = "accuracy" if "accuracy" in names else names[0]
    result = Result(
        run=run,
        manifest=manifest,
        metrics=metrics,
        metric=metric,
        test_step=step,
        test_rows=_test_rows(path, step=step),
        examples_per_update=_examples_per_update(path),
        quality=read_quality(path),
    )
    if abs(result.accuracy - test[metric]) > 0.01:
        raise ValueError(
            f"{path}: metrics.jsonl gives {metric} {test[metric]:.2f} on test, the predictions of step {step} give "
            f"{result.accuracy:.2f}; expected the same. Train this run again."
        )
    return result


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
    manifest = json_files.read_json(file)
    problem = _manifest_problem(manifest)
    if problem:
        raise ValueError(f"{file}: {problem}. It is not as `sbs train` wrote it; train this run again.")
    return manifest


# Fields of a manifest that a report uses, by the type that they must have. Parents come first.
_REQUIRED = {
    "an object": "data data.options data.splits data.splits.train data.splits.train.counts data.splits.test run",
    "text": "data.dataset data.options.label_source data.options.rationales data.options.records_dir "
    "data.splits.train.sha256 data.splits.test.sha256 run.mixture_or_task_name",
    "a number": "data.options.fraction",
    "a whole number": "data.options.seed",
}
_OPTIONAL = {"text": "data.options.label_prefix git_revision", "an object": "versions"}
_OPTIONAL |= {"a list": "devices", "a whole number": "parameter_count"}
_TYPES = {"an object": dict, "text": str, "a number": (int, float), "a whole number": int, "a list": list}


def _manifest_problem(manifest: Any) -> str | None:
    """Describes the first field that a report cannot use; None if there is none."""
    brief = json_files.brief
    if not isinstance(manifest, dict):
        return f"got {brief(manifest)}; expected a JSON object"
    for fields, required in ((_REQUIRED, True), (_OPTIONAL, False)):
        for kind, places in fields.items():
            for place in places.split():
                *parents, name = place.split(".")
                holder = manifest
                for parent in parents:
                    holder = holder[parent]
                if name not in holder and required:
                    return f"it has no {place}"
                value = holder.get(name)
                if name in holder and (not isinstance(value, _TYPES[kind]) or isinstance(value, bool)):
                    return f"{place} is {brief(value)}; expected {kind}"
    data = manifest["data"]
    for name, choices in (("label_source", ("human", "teacher")), ("rationales", ("all", "agreeing"))):
        if data["options"][name] not in choices:
            return f"data.options.{name} is {brief(data['options'][name])}; expected {' or '.join(map(repr, choices))}"
    if not 0 < data["options"]["fraction"] <= 1:
        return f"data.options.fraction is {brief(data['options']['fraction'])}; expected more than 0 and at most 1"
    for split, facts in data["splits"].items():
        if not isinstance(facts, dict) or not isinstance(facts.get("sha256"), str):
            return f"data.splits has {brief(split)}: {brief(facts)}; expected an object with its sha256"
    needed = _SINGLE_TASK_KIND if _kind(manifest) == _SINGLE_TASK_KIND else "label"
    if type(data["splits"]["train"]["counts"].get(needed)) is not int:
        counts = brief(data["splits"]["train"]["counts"])
        return f"data.splits.train.counts is {counts}; expected the number of rows of {needed!r}"
    return None


def _test_rows(path: Path, *, step: int) -> dict[str, dict[str, Any]]:
    files = sorted((path / "predictions").glob(f"*-test-{step}.jsonl"))
    if len(files) != 1:
        held = ", ".join(file.name for file in files) or "none"
        raise ValueError(
            f"{path} was tested at step {step}; expected one file predictions/<task>-test-{step}.jsonl, found {held}. "
            "Delete the test line of metrics.jsonl and repeat the `sbs train` command to test it again."
        )
    rows: dict[str, dict[str, Any]] = {}
    for line, row in json_files.read_json_lines(files[0]):
        texts = [row.get(name, "") for name in ("id", "input", "target", "prediction")]
        if "id" not in row or not all(isinstance(text, str) for text in texts) or type(row.get("correct")) is not bool:
            shown = json_files.brief(row)
            raise ValueError(f'{files[0]}:{line}: expected {{"id": text, "correct": true or false, ..}}, got {shown}.')
        rows[row["id"]] = row
    return rows


def _examples_per_update(path: Path) -> int | None:
    """Reads EXAMPLES from the configuration, if rows per update follow from it (not with packing)."""
    config = path / "config.gin"
    text = json_files.decoded(config.read_bytes(), str(config)) if config.is_file() else ""
    found = re.search(r"^EXAMPLES = ([0-9]{1,12})$", text, flags=re.MULTILINE)
    derived = re.search(r"^BATCH_SIZE = @(\w+\.)?rows_per_update\(\)$", text, flags=re.MULTILINE)
    packed = re.search(r"^PACK = True$", text, flags=re.MULTILINE)
    return int(found[1]) if found and derived and not packed else None
