"""Manifest of a run (manifest.json): the facts that it began with, compared when it is resumed.

Facts that decide the numbers must not change: configuration, records, vocabulary, lengths, defaults of the code. Facts
about where and how they are computed may: directories, mesh, layers, devices, versions, retention of checkpoints.
"""

import functools
import importlib.metadata
import json
import platform
import re
import subprocess
import types
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from sbs_jax import checks
from sbs_jax.storage import atomic, hub, json_files, places

NAME = "manifest.json"
CHECKPOINTED = "checkpointed"  # true once the run's first checkpoint is on disk
_REPORTED = (
    *("sbs-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "seqio", "tensorflow", "tensorflow-text"),
    *("tensorflow-datasets", "sentencepiece", "numpy"),
)
# Fields of TrainConfig that set where and how a run is computed.
_WHERE_AND_HOW = (
    *("model_dir", "layout", "execution", "vocabulary_chunks", "checkpoint_period", "keep_checkpoints", "keep_best"),
    *("keep_period", "stall_seconds", "save_patience", "trackers", "profile_steps"),
    "skip_non_finite",  # decides only where the run would have stopped
    "soft_targets",  # compared by its hash
    "teacher",  # compared by its identity
)
# If no best checkpoint is kept, these decide which one is tested.
_KEEPING = ("checkpoint_period", "keep_checkpoints", "keep_best", "keep_period")
_UNCOMPARED = (
    *(f"train.TrainConfig.{field}" for field in _WHERE_AND_HOW),
    # The files of records and corpora are compared by their hashes.
    *(f"datasets.DataOptions.{name}" for name in ("records_dir", "corpus", "augmentation")),
    *("partitioning.Layout.", "t5.Execution."),
)
_MACRO = re.compile(r"%([A-Za-z_]\w*)")
# Settings that are paths, absolute or not.
_PATHS = (
    *("records_dir", "model_dir", "initial_checkpoint_path", "vocabulary", "corpus", "augmentation", "soft_targets"),
    "teacher",
)
_STEADY = 1e-6  # share of the highest rate: tolerance for a schedule's rounding on another device


def read(run_dir: str | Path) -> dict[str, Any]:
    """Reads the manifest of a run. FileNotFoundError if there is none, ValueError if it is damaged."""
    path = places.of(run_dir) / NAME
    if not path.exists():
        raise FileNotFoundError(f"{run_dir} is not a run directory: it has no {NAME}.")
    try:
        found = json_files.read_json(path)
        if not isinstance(found, dict) or not isinstance(found.get("data"), dict):
            raise ValueError("not a manifest of `sbs train`")
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}). Restore it from a copy, or repeat the run's `sbs train` command with "
            "--accept_changes, which writes a new one without comparing."
        ) from None
    return found


def parts(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Returns dataset and part of each dataset that a run trains together; {} if it is one."""
    return {data["dataset"]: part for part, data in manifest.get("data", {}).get("parts", {}).items()}


def data_of_parts(data: Mapping[str, Any], *, whole: str = "") -> dict[str, Mapping[str, Any]]:
    """Returns "data" of each part of a run by its name; of a run of one dataset, all of it under `whole`."""
    return data.get("parts") or {whole: data}


def of_part(manifest: Mapping[str, Any], dataset: str) -> dict[str, Any]:
    """Returns the manifest of a run of several datasets as if it had been trained on this one.

    ValueError if there is no such dataset. A manifest of one dataset is returned unchanged.
    """
    known = parts(manifest)
    if not known:
        return dict(manifest)
    if dataset not in known:
        raise ValueError(
            f"the student was trained on {', '.join(known)}, not on {dataset!r}; choose one of them."
            f"{checks.nearest(dataset, known)}"
        )
    run, part = dict(manifest["run"]), known[dataset]
    mine = run.pop("parts")[part]
    run |= {"mixture_or_task_name": part, "primary_metric": mine["primary_metric"]}
    return {**manifest, "data": manifest["data"]["parts"][part], "labels": mine["labels"], "run": run}


def one(manifest: Mapping[str, Any], dataset: str | None, *, where: str) -> dict[str, Any]:
    """Returns the manifest as of the chosen dataset; unchanged without a choice. ValueError if the run has no such."""
    if dataset is None:
        return dict(manifest)
    try:
        if not parts(manifest) and dataset != (own := manifest["data"]["dataset"]):
            raise ValueError(f"the student was trained on {own}, not on {dataset!r}; choose a run of that dataset.")
        return of_part(manifest, dataset)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def write(run_dir: str | Path, contents: Mapping[str, Any]) -> None:
    """Writes the manifest of a run."""
    atomic.replace(places.of(run_dir) / NAME, encoded(contents))


def encoded(contents: Mapping[str, Any]) -> bytes:
    """Encodes a manifest as its file holds it."""
    return (json.dumps(contents, indent=1, sort_keys=True) + "\n").encode()


def note_checkpoint(run_dir: str | Path) -> None:
    """Writes into the manifest, if there is one, that the run has a checkpoint."""
    if (places.of(run_dir) / NAME).exists() and not (found := read(run_dir)).get(CHECKPOINTED):
        write(run_dir, {**found, CHECKPOINTED: True})


def had_checkpoint(found: Mapping[str, Any]) -> bool | None:
    """Tells whether a run ever had a checkpoint; None if an earlier version began it, which did not note this."""
    if any(start.get("step") for start in found.get("starts", [])):
        return True
    return found.get(CHECKPOINTED)


# Options that a run of an earlier version lacks: (name in config.gin, name in the manifest) -> what that version did.
_LATER = {
    (f"datasets.DataOptions.{name}", f"data.options.{name}"): value
    for name, value in {
        "number_slots": False,
        "noise_density": 0.15,
        "mean_span": 3.0,
        "folds": 0,
        "fold": 0,
        "augmentation": None,
        "dataset_prefix": "",
        "rates": None,
        "temperature": 1.0,
        "rate_maximum": None,
        "read_rows": None,
        "pairs": False,
        "rationales_per_example": 1,
    }.items()
} | {
    (f"train.TrainConfig.{name}", f"settings.{name}"): value
    for name, value in {
        "patience": None,
        "loss_weights": None,
        "label_smoothing": 0.0,
        "mutual_information": None,
        "mutual_information_weight": 0.1,
        "soft_share": 0.5,
        "on_policy": 0.5,
        "jsd_beta": 0.5,
        "jsd_share": 0.5,
        "sampling_temperature": 1.0,
        "rewards": None,
        "own_reward": None,
        "samples": 4,
        "kl_weight": 0.05,
        "advantage": "rloo",
    }.items()
}

# Counts of a kind of task that earlier versions did not have; they follow from those of the other tasks.
_LATER_COUNTS = "label_given_rationale"


@functools.cache
def git_revision() -> str:
    """Returns the revision of this code's checkout, with `-dirty` if it is changed; or why there is none."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({error})"
    return done.stdout.strip() if done.returncode == 0 else "unknown (not a git checkout)"


@functools.cache
def versions() -> Mapping[str, str]:
    """Returns the versions of Python and of the packages that affect the numbers."""
    found = {"python": platform.python_version()}
    for name in _REPORTED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return types.MappingProxyType(found)


def without_paths(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a manifest for publication, with only the last component of local paths."""

    def named(value: Any, *, is_path: bool = False) -> Any:
        if isinstance(value, Mapping):
            return {name: named(each, is_path=name in _PATHS) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return [named(each, is_path=is_path) for each in value]
        return last_name(value) if isinstance(value, str) and (is_path or value.startswith("/")) else value

    return named(manifest)


def last_name(path: str) -> str:
    """Returns the last component of a local path; addresses valid everywhere are kept (bucket, pinned model)."""
    name = hub.parse(path)
    if "://" in path or not path.strip("/") or (name is not None and name.is_pinned):
        return path
    parts = places.of(path).parts
    return "/".join(parts[-2:]) if parts[-1].startswith("checkpoint_") else parts[-1]


def changes(
    old: Mapping[str, Any] | None, new: Mapping[str, Any], *, old_config: str, new_config: str
) -> tuple[list[str], list[str]]:
    """Lists forbidden changes, as lines of two unified diffs; and notes about files that are gone.

    `old` is None if there is no manifest to compare with. Both hold JSON values (no tuples).
    """
    same_vocabulary = (
        old is not None and _vocabulary_hash(old) is not None and _vocabulary_hash(old) == _vocabulary_hash(new)
    )
    later = {name: repr(value) for (name, _), value in _LATER.items()}
    found = _config_changes(
        later | _bindings(old_config), later | _bindings(new_config), same_vocabulary=same_vocabulary
    )
    if old is None:
        return found, []
    later = {name: value for (_, name), value in _LATER.items()}
    before, after = (later | dict(_flat(_decisive(one, same_vocabulary=same_vocabulary))) for one in (old, new))
    _settle_schedule(before, after)
    texts = ({name: json.dumps(value) for name, value in one.items()} for one in (before, after))
    return [*found, *_diff(*texts, name=NAME)], _gone(old, new)


def allowed_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lists allowed changes of versions, revision, devices and mesh, as "jax 0.9.0 -> 0.9.1"."""
    parts = ("git_revision", "versions", "mesh", "devices")
    before, after = (dict(_flat({name: of.get(name) for name in parts})) for of in (old, new))
    return [
        f"{name.removeprefix('versions.')} {_brief(before.get(name))} -> {_brief(after.get(name))}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _diff(old: Mapping[str, str], new: Mapping[str, str], *, name: str) -> list[str]:
    """Lists the values that differ in the form of a unified diff, old above new; empty if none does."""
    lines = []
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            lines += [f"{sign}{key} = {values[key]}" for sign, values in (("-", old), ("+", new)) if key in values]
    return [f"--- {name} of the run", f"+++ {name} as requested", *lines] if lines else []


def _bindings(text: str) -> dict[str, str]:
    """Reads the bindings of an operative configuration. Import lines are left out: modules may move."""
    found: dict[str, str] = {}
    name = ""
    for line in map(str.rstrip, text.splitlines()):
        if line.startswith(" "):  # a continued value; gin ends an empty first line with a backslash
            found[name] = f"{found.get(name, '')} {line.strip()}".removeprefix("\\").strip()
        elif line and not line.startswith(("#", "import ", "from ")):
            name, _, found[name] = line.partition(" = ")
    return found


def _config_changes(old: Mapping[str, str], new: Mapping[str, str], *, same_vocabulary: bool) -> list[str]:
    """Compares the values of bindings, whether set by a macro, directly or by default.

    A difference that comes from a macro alone is shown as that macro's.
    """
    uncompared = (*_UNCOMPARED, *(("datasets.DataOptions.vocabulary",) if same_vocabulary else ()))
    shown: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for name in {*old, *new}:
        if "." not in name or name.startswith(uncompared):  # a macro counts where it is used
            continue
        before, after = (_resolved(name, of) for of in (old, new))
        if before == after:
            continue
        macros = [macro for macro in _MACRO.findall(old.get(name, "")) if macro in old and macro in new]
        by_macro = macros if old.get(name) == new.get(name) else []
        for lines, bindings, value in ((shown[0], old, before), (shown[1], new, after)):
            if by_macro:
                lines.update({macro: _resolved(macro, bindings) or "" for macro in by_macro})
            elif value is not None:
                lines[name] = value
    return _diff(*shown, name="config.gin")


def _resolved(name: str, bindings: Mapping[str, str]) -> str | None:
    """Returns the value of a binding, its macros replaced by their values; None if it is not bound."""
    if name not in bindings:
        return None
    others = {other: value for other, value in bindings.items() if other != name}  # a macro must not expand itself
    return _MACRO.sub(lambda match: _resolved(match[1], others) or match[0], bindings[name])


def _decisive(manifest: Mapping[str, Any], *, same_vocabulary: bool) -> dict[str, Any]:
    """Returns the part of a manifest that may not change, each fact once."""
    paths = {"records_dir", "corpus", "augmentation", *(("vocabulary",) if same_vocabulary else ())}
    run, settings = manifest.get("run", {}), manifest.get("settings", {})
    dropped = {*run, *_WHERE_AND_HOW, "data"}
    if settings.get("keep_best", 1) == 0:
        dropped -= set(_KEEPING)
    return {
        "data": _decisive_data(manifest.get("data", {}), paths),
        "lengths": manifest.get("lengths"),
        "run": run,
        "settings": {name: value for name, value in settings.items() if name not in dropped},
        "parameters": {
            name: f"{leaf.get('dtype')} {leaf.get('shape')}" for name, leaf in manifest.get("parameters", {}).items()
        },
    }


def _decisive_data(data: Mapping[str, Any], paths: Collection[str]) -> dict[str, Any]:
    parts = {name: _decisive_data(part, paths) for name, part in data.get("parts", {}).items()}
    for part in parts.values():  # each other option is the whole's
        part["options"] = {name: value for name, value in part["options"].items() if name.endswith("_prefix")}
    splits = {
        split: {**facts, "counts": {name: n for name, n in counts.items() if not name.startswith(_LATER_COUNTS)}}
        for split, facts in data.get("splits", {}).items()
        if isinstance(counts := facts.get("counts"), Mapping)
    }
    return {
        **{name: value for name, value in data.items() if name != "module"},
        **({"splits": {**data["splits"], **splits}} if splits else {}),
        "options": {name: value for name, value in data.get("options", {}).items() if name not in paths},
        **({"parts": parts} if parts else {}),
    }


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Flattens settings: {"model": {"emb_dim": 8}} is {"model.emb_dim": 8}."""
    return dict(_flat(tree))


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Flattens {"a": {"b": 1}} to ("a.b", 1)."""
    if isinstance(tree, Mapping) and tree:
        for name, value in tree.items():
            yield from _flat(value, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, tree


def _settle_schedule(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Replaces new values of the schedule by the old ones where they differ by rounding alone."""
    names = [name for name in old if name.startswith("settings.learning_rate.")]
    numbers = [old[name] for name in names if isinstance(old[name], float)]
    for name in names:
        both = isinstance(old[name], float) and isinstance(new.get(name), float)
        if both and abs(old[name] - new[name]) <= _STEADY * max(map(abs, numbers)):
            new[name] = old[name]


def _vocabulary_hash(manifest: Mapping[str, Any]) -> str | None:
    return manifest.get("data", {}).get("vocabulary_sha256")


def _gone(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Describes each file of records that the run was begun with and that is gone."""
    if new["data"]["options"].get("corpus"):  # read already, wherever it is now
        return []
    lines = []
    for part in data_of_parts(old["data"]).values():
        folder = places.of(new["data"]["options"]["records_dir"]) / part.get("dataset", new["data"]["dataset"])
        files = {
            file: sha256
            for split in part.get("splits", {}).values()
            for file, sha256 in zip(split.get("file", "").split(), split.get("sha256", "").split(), strict=False)
            if file.startswith(("train.", "validation.", "test."))  # not of the augmentation, which was read already
        }
        lines += [
            f"{folder / file} is gone (SHA-256 {sha256}); restore it, or write it again with `sbs records`."
            for file, sha256 in files.items()
            if not (folder / file).exists()
        ]
    return lines
