"""Runs that are alike in dataset, size, method, share of the data and seed, told apart by the settings that differ."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sbs_jax.stats.results import Result

# What differs between runs without making them another method.
_NO_VARIANT = {"model_dir", "seed", "data.seed", "data.fraction", "data.label_source", "data.rationales"}
_LONGEST = 40  # characters of a value in a method's name


def told_apart(results: Sequence[Result], *, size: Callable[[Result], str]) -> list[Result]:
    """The same results, with settings in the names of methods where nothing else distinguishes their runs.

    Two runs of step-by-step with seed 0, with "alpha": 0.3 and 0.5 in the settings of their manifests, are of
    "step-by-step (alpha 0.3)" and "step-by-step (alpha 0.5)". Runs that differ in nothing stay alike, which is an
    error of who named them (`summarize` says so).
    """

    def key(result: Result) -> tuple[Any, ...]:
        return size(result), result.run.method, result.run.fraction, result.run.seed

    alike: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        alike.setdefault(key(result), []).append(result)
    settings = {id(result): _flat(result.manifest.get("settings")) for result in results}
    names: list[str] = []
    for same in alike.values():
        of_same = [settings[id(result)] for result in same]
        every = dict.fromkeys(name for flat in of_same for name in flat)
        names += [name for name in every if len({repr(flat.get(name)) for flat in of_same}) > 1]
    if not names:
        return list(results)
    affected = {result.run.method for same in alike.values() if len(same) > 1 for result in same}
    found = []
    for result in results:
        run = result.run
        if run.method in affected:
            flat = settings[id(result)]
            told = ", ".join(f"{name.rpartition('.')[2]} {_shown(flat.get(name))}" for name in dict.fromkeys(names))
            before, _, remarks = run.method.partition(" (")
            method = f"{before} ({remarks.removesuffix(')')}, {told})" if remarks else f"{before} ({told})"
            result = dataclasses.replace(result, run=dataclasses.replace(run, method=method))
        found.append(result)
    return found


def _flat(settings: Any, *, within: str = "") -> dict[str, Any]:
    """{"data": {"seed": 0}} is {"data.seed": 0}; nothing of what makes no variant."""
    if not isinstance(settings, Mapping):
        return {}
    found: dict[str, Any] = {}
    for name, value in settings.items():
        place = f"{within}{name}"
        if isinstance(value, Mapping):
            found |= _flat(value, within=f"{place}.")
        elif place not in _NO_VARIANT:
            found[place] = value
    return found


def _shown(value: Any) -> str:
    text = Path(value).name if isinstance(value, str) and "/" in value else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
