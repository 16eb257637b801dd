"""The card of a student, beside its weights: `sbs_student.json` for programs, `README.md` for people.

An export can be used with nothing but the card: the prefix and length of inputs, how to read the answer from the text,
the labels, how answers are graded, and the test result.
"""

import contextlib
import dataclasses
import functools
import inspect
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from sbs_jax.data import corpus, grading, registry, selection, slots, tokens, vocabularies
from sbs_jax.data.dataset import JOINT, MIXTURES, Dataset, answers_in_two_steps
from sbs_jax.run import checkpoints
from sbs_jax.run.manifest import last_name, parts
from sbs_jax.stats import intervals, results
from sbs_jax.storage import json_files
from sbs_jax.student import adapters
from sbs_jax.weights import hugging_face, names, opening
from sbs_jax.weights.arrays import Opened

log = logging.getLogger(__name__)

FILE, README, GRADING = "sbs_student.json", "README.md", "metrics.py"
SLOTS = "slots.py"  # data/slots.py, for students trained with number slots
FORMAT = 1
# What a student writes, by the kind of its task; else a label.
_ANSWERS = {
    selection.RATIONALE: "rationale",
    selection.RATIONALE_THEN_LABEL: "rationale, then label",
    corpus.SPAN_CORRUPTION: "masked spans",
}
# Folder of a run's answers; every row has its input.
_PREDICTIONS = "predictions"


def of(source: str, opened: Opened, *, form: str) -> dict[str, Any] | None:
    """Returns the card of a checkpoint: built from what a run left, or read from an export.

    None for published weights, whose task is unknown, and for a student of several datasets, which has one for each.
    ValueError for a damaged card.
    """
    if parts(opened.origin or {}):
        return None
    if form == opening.SBS:
        directory, step = checkpoints.locate(source)
        if opened.origin is not None and (directory / "metrics.jsonl").exists():
            return _of_run(directory, opened, step=step)
        beside = directory / FILE
    else:
        beside = Path(source) / FILE
    if "://" not in source and beside.is_file():
        return read(beside)
    return None if opened.origin is None else _of_settings(opened)


def read(path: Path) -> dict[str, Any]:
    """Reads a card. ValueError for one that this version cannot use."""
    found = json_files.read_json(path)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        what = found.get("format") if isinstance(found, dict) else found
        raise ValueError(
            f"{path}: got format {json_files.brief(what)}; expected the card of an export, format {FORMAT}. Remove it: "
            "sbs_run.json beside it will do."
        )
    for place, kinds in _FIELDS.items():
        value: Any = found
        for name in place.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if type(value) not in kinds or (type(value) is int and value < 1):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{path}: {place!r} is {json_files.brief(value)}; expected {expected}. {_DAMAGED}")
    try:
        _readme(found, usage="", more={})
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        jinja2.TemplateError,
    ) as error:  # in fields that are only shown
        raise ValueError(f"{path}: {type(error).__name__}: {json_files.part(str(error))}. {_DAMAGED}") from None
    return found


_DAMAGED = "The card is damaged: restore it, or remove it."
_NONE = type(None)
# Fields that an export uses, and their types.
_FIELDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("dataset", "task", "input.prefix", "input.joint", "answer.is", "training.method"), (str,)),
    **dict.fromkeys(("input.max_tokens", "answer.max_new_tokens", "parameters"), (int,)),
    "answer.labels": (list, _NONE),
    **dict.fromkeys(("answer.parser.after_last", "input.rationale_after"), (str, _NONE)),
    "rationale": (dict, _NONE),
    **dict.fromkeys(("grading.metric", "grading.file", "training.base", "training.adapters"), (str, _NONE)),
    **dict.fromkeys(("grading.functions", "grading.meaning"), (list,)),
    "test": (dict, _NONE),
    "test.interval_95": (list, _NONE),
    **dict.fromkeys(("input", "answer", "answer.parser", "grading", "training", "training.rows", "tokenizer"), (dict,)),
}


def write(folder: Path, card: Mapping[str, Any], *, usage: str, **more: Any) -> None:
    """Writes `sbs_student.json`, `README.md`, and the functions that grade (`metrics.py`) if they need nothing else.

    `usage` is Markdown on how this form is used; `more` is added to the JSON.
    """
    hugging_face.write_json(folder / FILE, {**card, **more})
    (folder / README).write_text(_readme(card, usage=usage, more=more), "utf-8")
    if card["grading"]["file"] is not None:
        shutil.copyfile(grading.__file__, folder / GRADING)
    if card["input"].get("number_slots"):
        shutil.copyfile(slots.__file__, folder / SLOTS)


def sample_inputs(source: str, card: Mapping[str, Any], *, form: str, rows: int) -> list[str]:
    """Reads the first `rows` inputs that the run was graded on, with the prefix; [] if it has none."""
    if form != opening.SBS:
        return []
    files = (checkpoints.locate(source)[0] / _PREDICTIONS).glob("*.jsonl")
    file = min(files, key=lambda file: ("-test-" not in file.name, file.name), default=None)
    return [] if file is None else read_samples(file, card, rows=rows)


def read_samples(path: str | Path, card: Mapping[str, Any], *, rows: int) -> list[str]:
    """Reads the texts "input" of a JSONL file, with the prefix (added if it is missing) and slots for numbers.

    For a student that answers in two steps, the row's "rationale" follows, if it has one.
    """
    texts: list[str] = []
    prefix, marker = card["input"]["prefix"], card["input"].get("rationale_after")
    for number, row in json_files.read_json_lines(path):
        if len(texts) == rows:
            break
        text = row.get("input")
        if not isinstance(text, str):
            raise ValueError(f'{path}:{number}: expected {{"input": text}}, got {json_files.brief(row)}.')
        text = text.removeprefix(prefix)
        numbers = slots.Numbers.of(text) if card["input"].get("number_slots") else slots.NO_NUMBERS
        rationale = row.get("rationale")
        if marker is not None and isinstance(rationale, str):
            text = selection.with_rationale(text, rationale)
        texts.append(prefix + numbers.hide(text))
    return texts


# ------------------------------------------------------------------------------------ contents


def _of_run(directory: Path, opened: Opened, *, step: int) -> dict[str, Any]:
    card = _of_settings(opened)
    with contextlib.suppress(ValueError):  # no known method, such as for a task of rationales alone
        card["training"]["method"] = results.identify(directory, dataset=card["dataset"]).method
    return card | {"test": _tested(directory, step=step, dataset=card["dataset"])}


def _of_settings(opened: Opened) -> dict[str, Any]:
    """Builds a card from the manifest of a run."""
    manifest = opened.origin
    assert manifest is not None
    run, options = manifest["run"], manifest["data"]["options"]
    task, name = run["mixture_or_task_name"], manifest["data"]["dataset"]
    kind = task.removeprefix(f"{name}_")
    dataset = registry.get(name) if name in (*registry.names(), corpus.DATASET.name) else None
    if dataset is None:
        log.warning("The dataset %r is not known here: the card lacks its labels and how it is graded.", name)
    lengths = run["task_feature_lengths"]
    rationale = {"prefix": options["rationale_prefix"], "max_new_tokens": lengths["targets"]}
    label = {"prefix": options["label_prefix"], "max_new_tokens": run["max_decode_length"]}
    asked = rationale if kind in (selection.RATIONALE, corpus.SPAN_CORRUPTION) else label
    marker = selection.ANSWER_MARKER if kind == selection.RATIONALE_THEN_LABEL else None
    two_steps = answers_in_two_steps(kind)
    return {
        "format": FORMAT,
        "dataset": name,
        "task": task,
        "input": {
            "prefix": asked["prefix"],
            "max_tokens": lengths["inputs"],
            "longer": "cut to max_tokens, of which the last is EOS",
            "joint": JOINT,
            "number_slots": options.get("number_slots", False),
            # Two steps: the student writes a rationale (below) and reads it after the text and this marker.
            "rationale_after": selection.RATIONALE_MARKER if two_steps else None,
        },
        "answer": {
            "is": _ANSWERS.get(kind, "label"),
            "max_new_tokens": asked["max_new_tokens"],
            "decoding": "greedy",
            "labels": list(dataset.labels) if dataset is not None and dataset.labels is not None else None,
            "parser": {"after_last": marker, "strip": True},
        },
        "rationale": rationale if kind in MIXTURES or two_steps else None,
        "grading": _grading(dataset, metric=run.get("primary_metric")),
        "test": None,
        "training": _training(manifest, opened),
        "model": dataclasses.asdict(opened.config),
        "parameters": names.size(names.parameters(opened.config)),
        "tokenizer": _tokenizer(manifest, opened),
    }


def _tokenizer(manifest: Mapping[str, Any], opened: Opened) -> dict[str, Any]:
    name = opened.vocabulary or manifest["data"]["options"]["vocabulary"]
    kind = vocabularies.kind_of(vocabularies.kind_of(name).file or name)  # that of its file in an export
    return {
        "kind": kind.name,
        "sha256": manifest["data"].get("vocabulary_sha256"),
        "extra_ids": kind.extra_ids,
        "pad_id": tokens.PAD_ID,
        "eos_id": tokens.EOS_ID if kind.extra_ids else registry.vocabulary(name).eos_id,
    }


def _grading(dataset: Dataset | None, *, metric: str | None) -> dict[str, Any]:
    """Describes how answers are graded; `file` if the functions need the standard library only."""
    known = () if dataset is None else dataset.metric_fns
    plain = [getattr(function, "func", function) for function in known]  # of one with tolerances
    functions = [function for function in plain if function.__module__ == grading.__name__]
    return {
        "metric": metric,
        "file": GRADING if functions else None,
        "functions": [function.__name__ for function in functions],
        "meaning": [(inspect.getdoc(function) or "").partition("\n")[0] for function in functions],
    }


def _training(manifest: Mapping[str, Any], opened: Opened) -> dict[str, Any]:
    """Describes the training; names instead of paths of this machine."""
    options, settings = manifest["data"]["options"], manifest.get("settings", {})
    counts = manifest["data"].get("splits", {}).get("train", {}).get("counts", {})
    base = settings.get("initial_checkpoint_path")
    known = ("label_source", "rationales", "fraction", "seed")
    return {
        "method": manifest["run"]["mixture_or_task_name"].removeprefix(f"{manifest['data']['dataset']}_"),
        "base": None if base is None else last_name(base),
        "adapters": None if settings.get("tuning") is None else _adapters(settings["tuning"]),
        "step": opened.step,
        **{name: options[name] for name in known if name in options},
        "rows": {name: count for name, count in counts.items() if isinstance(count, int)},
        **{name: settings[name] for name in ("alpha", "batch_size", "seed") if name in settings},
        "versions": dict(manifest.get("versions", {})),
        "git_revision": manifest.get("git_revision"),
    }


def _adapters(tuning: Mapping[str, Any]) -> str:
    found = adapters.Tuning.of(tuning)
    assert found is not None
    return adapters.title(found)


def _tested(run: Path, *, step: int, dataset: str) -> dict[str, Any] | None:
    """Returns the test metric of this step with its 95 % interval; None if this step was not tested."""
    lines = [
        line for line in results.metrics_of(run, dataset=dataset) if line["kind"] == "test" and line["step"] == step
    ]
    if not lines:
        return None
    found = {name: value for name, value in lines[-1].items() if name not in ("kind", "step")}
    facts: dict[str, Any] = {"step": step, **found, "interval_95": None, "rows": None}
    try:
        result = results.load(results.identify(run, dataset=dataset))
    except (ValueError, OSError) as error:
        log.warning("The card has no interval of the test metric: %s", error)
        return facts
    correct, rows = sum(row["correct"] for row in result.test_rows.values()), len(result.test_rows)
    low, high = intervals.wilson_interval(correct / rows, rows)
    return facts | {"interval_95": [round(100 * low, 2), round(100 * high, 2)], "rows": rows}


# ------------------------------------------------------------------------------------ README


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"json": json.dumps, "code": "`{}`".format, "cell": _cell}
    return environment.from_string(Path(__file__).with_name("readme.md.jinja").read_text("utf-8"))


def _readme(card: Mapping[str, Any], *, usage: str, more: Mapping[str, Any]) -> str:
    runtime, files = more.get("runtime", "transformers"), {"card": FILE, "grading": GRADING}
    return _template().render(card=card, usage=usage, runtime=runtime, weights=more.get("weights"), files=files)


def _cell(value: Any) -> str:
    """Escapes characters that would end a cell of a table."""
    return str(value).replace("|", "\\|").replace("\n", " ")


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
