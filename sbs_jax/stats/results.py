"""Run directories as a report reads them: what each stands for, and everything it left behind."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbs_jax.run import directory
from sbs_jax.stats.quality import Quality
from sbs_jax.stats.quality import read as read_quality
from sbs_jax.storage import json_files

FINE_TUNING = "standard fine-tuning"
DISTILLATION = "standard distillation"
STEP_BY_STEP = "step-by-step"
SINGLE_TASK = "single-task rationale"
TEACHER_LABELS = "teacher labels"
_METHOD_OF_KIND = {"label": FINE_TUNING, "step_by_step": STEP_BY_STEP, "rationale_then_label": SINGLE_TASK}
METHODS = (FINE_TUNING, DISTILLATION, STEP_BY_STEP, SINGLE_TASK)


@dataclass(frozen=True)
class Run:
    """One run directory, and what it stands for in a comparison."""

    path: str | Path
    method: str  # "standard fine-tuning", "step-by-step", ..
    fraction: float  # of the training rows, 0 to 1
    seed: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a finished run left behind."""

    run: Run
    manifest: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]  # lines of metrics.jsonl
    metric: str  # "accuracy", "equation_accuracy", ..
    test_step: int  # of the checkpoint that was tested
    test_rows: Mapping[str, Mapping[str, Any]]  # id to row of the predictions file
    examples_per_update: int | None  # None where config.gin does not tell
    quality: Quality | None  # of its rationales, where they were looked at

    @property
    def accuracy(self) -> float:
        return 100.0 * sum(row["correct"] for row in self.test_rows.values()) / len(self.test_rows)

    @property
    def updates(self) -> int:
        return max(line["step"] for line in self.metrics)

    @property
    def label_rows(self) -> int:
        """Distinct training rows whose label was trained on."""
        counts = self.manifest["data"]["splits"]["train"]["counts"]
        return counts["rationale_then_label" if self.kind == "rationale_then_label" else "label"]

    @property
    def kind(self) -> str:
        """What the run trained on: "label", "step_by_step" or "rationale_then_label"."""
        name, dataset = self.manifest["run"]["mixture_or_task_name"], self.manifest["data"]["dataset"]
        return name.removeprefix(f"{dataset}_")

    @property
    def train_seconds(self) -> float:
        """Time of the training steps, with compilation (it is in the first log window) and without evaluation."""
        seconds, previous = 0.0, 0
        for line in self.curve("train", "seconds_per_step"):
            seconds, previous = seconds + line[1] * (line[0] - previous), line[0]
        return seconds

    def curve(self, kind: str, name: str) -> list[tuple[int, float]]:
        """(step, value) of each line of this kind ("train", "validation") that has the value."""
        return [(line["step"], float(line[name])) for line in self.metrics if line["kind"] == kind and name in line]


def identify(path: str | Path) -> Run:
    """A run directory with the method, fraction and seed that its manifest tells.

    {"label_source": "teacher"} with `svamp_label` is standard distillation, with `svamp_step_by_step` it is
    "step-by-step (teacher labels)".
    """
    manifest = _manifest(Path(path))
    options, name = manifest["data"]["options"], manifest["run"]["mixture_or_task_name"]
    kind = name.removeprefix(f"{manifest['data']['dataset']}_")
    if kind not in _METHOD_OF_KIND:
        raise ValueError(
            f"{path} trained on {name}, which is none of the known methods ({', '.join(_METHOD_OF_KIND)}); call "
            "sbs_jax.pages.report.write_page with Run(path, method, fraction, seed) to name it yourself."
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
    """Whether a run has come to its test: the last thing that `sbs train` does."""
    return any(line["kind"] == "test" for line in directory.read_metrics(path))


def load(run: Run) -> Result:
    """Reads a run directory; says which run lacks what, and what to do about it."""
    path = Path(run.path)
    manifest = _manifest(path)
    metrics = directory.read_metrics(path)
    if not metrics:
        raise ValueError(
            f"{path} has no metrics: metrics.jsonl is missing or empty. The run stopped before its first log line; "
            "repeat its `sbs train` command."
        )
    tests = [line for line in metrics if line["kind"] == "test"]
    if not tests:
        raise ValueError(
            f"{path} has no test metrics; its last line is of step {metrics[-1]['step']}. Repeat its `sbs train` "
            "command (it goes on from the last checkpoint), with evaluate_test on."
        )
    step = tests[-1]["step"]
    names = [name for name in tests[-1] if name.rpartition("_")[2] == "accuracy"]
    if not names:
        raise ValueError(
            f"{path}: the test line has no accuracy, only {json_files.part(', '.join(tests[-1]))}; a report compares "
            "accuracies."
        )
    metric = "accuracy" if "accuracy" in names else names[0]
    rows = _test_rows(path, step=step)
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
    if abs(result.accuracy - tests[-1][metric]) > 0.01:
        raise ValueError(
            f"{path}: metrics.jsonl gives {metric} {tests[-1][metric]:.2f} on test, the predictions of step {step} "
            f"give {result.accuracy:.2f}; they are not of one evaluation. Train this run again."
        )
    return result


def _manifest(path: Path) -> dict[str, Any]:
    if not (path / "manifest.json").is_file():
        around = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        near = [] if path.is_dir() else difflib.get_close_matches(path.name, around, n=3)
        hint = f" Did you mean {' or '.join(str(path.parent / name) for name in near)}?" if near else ""
        what = "has no manifest.json" if path.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"{path} {what}; expected a run directory as `sbs train` writes it (its MODEL_DIR).{hint}"
        )
    file = path / directory.MANIFEST
    manifest = json_files.read_json(file)
    problem = _manifest_problem(manifest)
    if problem:
        raise ValueError(f"{file}: {problem}. It is not as `sbs train` wrote it; train this run again.")
    return manifest


_NUMBER = (int, float)
# What a report takes from a manifest: where it is, what it is, and whether it has to be there.
_FIELDS: tuple[tuple[str, type | tuple[type, ...], bool], ...] = (
    ("data", dict, True),
    ("data.dataset", str, True),
    ("data.options", dict, True),
    ("data.options.label_source", str, True),
    ("data.options.rationales", str, True),
    ("data.options.fraction", _NUMBER, True),
    ("data.options.seed", int, True),
    ("data.options.records_dir", str, True),
    ("data.options.label_prefix", str, False),
    ("data.splits", dict, True),
    ("data.splits.train", dict, True),
    ("data.splits.train.sha256", str, True),
    ("data.splits.train.counts", dict, True),
    ("data.splits.test", dict, True),
    ("data.splits.test.sha256", str, True),
    ("run", dict, True),
    ("run.mixture_or_task_name", str, True),
    ("git_revision", str, False),
    ("versions", dict, False),
    ("devices", list, False),
    ("parameter_count", int, False),
)


def _manifest_problem(manifest: Any) -> str | None:
    """What a report could not use of a manifest; None where it can use all."""
    if not isinstance(manifest, dict):
        return f"got {json_files.brief(manifest)}; expected a JSON object"
    for place, kind, required in _FIELDS:
        *parents, name = place.split(".")
        holder = manifest
        for parent in parents:
            holder = holder[parent]
        if name not in holder:
            if required:
                return f"it has no {place}"
            continue
        value = holder[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            return f"{place} is {json_files.brief(value)}; expected {' or '.join(_names_of(kind))}"
    for name, choices in (("label_source", ("human", "teacher")), ("rationales", ("all", "agreeing"))):
        value = manifest["data"]["options"][name]
        if value not in choices:
            return f"data.options.{name} is {json_files.brief(value)}; expected {' or '.join(map(repr, choices))}"
    fraction = manifest["data"]["options"]["fraction"]
    if not 0 < fraction <= 1:
        return f"data.options.fraction is {json_files.brief(fraction)}; expected more than 0 and at most 1"
    for split, facts in manifest["data"]["splits"].items():
        if not isinstance(facts, dict) or not isinstance(facts.get("sha256"), str):
            got = f"{json_files.brief(split)}: {json_files.brief(facts)}"
            return f"data.splits has {got}; expected an object with its sha256"
    counts = manifest["data"]["splits"]["train"]["counts"]
    single = manifest["run"]["mixture_or_task_name"] == f"{manifest['data']['dataset']}_rationale_then_label"
    needed = "rationale_then_label" if single else "label"
    if type(counts.get(needed)) is not int:
        return f"data.splits.train.counts is {json_files.brief(counts)}; expected the number of rows of {needed!r}"
    return None


def _names_of(kind: type | tuple[type, ...]) -> list[str]:
    told = {str: "text", int: "a whole number", float: "a number", dict: "an object", list: "a list"}
    return [told[each] for each in (kind if isinstance(kind, tuple) else (kind,))]


def _test_rows(path: Path, *, step: int) -> dict[str, dict[str, Any]]:
    files = sorted((path / "predictions").glob(f"*-test-{step}.jsonl"))
    if len(files) != 1:
        held = ", ".join(file.name for file in files) or "none"
        raise ValueError(
            f"{path} was tested at step {step}; expected one file predictions/<task>-test-{step}.jsonl, found {held}. "
            "Delete the test line of metrics.jsonl and repeat the `sbs train` command to test it again."
        )
    rows: dict[str, dict[str, Any]] = {}
    for number, data in enumerate(files[0].read_bytes().removesuffix(b"\n").split(b"\n"), start=1):
        where = f"{files[0]}:{number}"
        row = json_files.parse_json(json_files.decoded(data, where), where)
        texts = (
            [row.get(name, "") for name in ("id", "input", "target", "prediction")] if isinstance(row, dict) else [0]
        )
        if (
            not all(isinstance(text, str) for text in texts)
            or "id" not in row
            or not isinstance(row.get("correct"), bool)
        ):
            raise ValueError(f'{where}: expected {{"id": .., "correct": ..}}, got {json_files.brief(row)}.')
        rows[row["id"]] = row
    return rows


def _examples_per_update(path: Path) -> int | None:
    """EXAMPLES of the configuration, where rows per update follow from it (not with packing)."""
    config = path / "config.gin"
    text = json_files.decoded(config.read_bytes(), str(config)) if config.is_file() else ""
    found = re.search(r"^EXAMPLES = ([0-9]{1,12})$", text, flags=re.MULTILINE)
    derived = re.search(r"^BATCH_SIZE = @(\w+\.)?rows_per_update\(\)$", text, flags=re.MULTILINE)
    packed = re.search(r"^PACK = True$", text, flags=re.MULTILINE)
    return int(found[1]) if found and derived and not packed else None
