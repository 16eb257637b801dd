"""Names for runs that are alike in dataset, size, method, share of the data and seed, but differ in a setting."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sbs_jax.stats.results import Result

# Settings that differ between runs of one method.
_NO_VARIANT = {"model_dir", "seed", "data.seed", "data.fraction", "data.label_source", "data.rationales", "data.fold"}
_LONGEST = 40  # characters of a value in a method's name


def name_variants(results: Sequence[Result], *, size: Callable[[Result], str]) -> list[Result]:
    """Adds settings to the names of methods where nothing else distinguishes their runs.

    Two runs of step-by-step with seed 0, with "alpha": 0.3 and 0.5 in the settings of their manifests, become
    "step-by-step (alpha 0.3)" and "step-by-step (alpha 0.5)". Runs that differ in no setting keep the same name, which
    `summarize` refuses.
    """
    alike: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        key = (size(result), result.run.method, result.run.fraction, result.run.seed, result.fold)
        alike.setdefault(key, []).append(result)
    settings = {id(result): _flat(result.manifest.get("settings")) for result in results}
    names: dict[str, None] = {}
    for same in alike.values():
        flats = [settings[id(result)] for result in same]
        every = dict.fromkeys(name for flat in flats for name in flat)
        names |= {name: None for name in every if len({repr(flat.get(name)) for flat in flats}) > 1}
    affected = {same[0].run.method for same in alike.values() if len(same) > 1} if names else set()
    found = []
    for result in results:
        run = result.run
        if run.method in affected:
            flat = settings[id(result)]
            named = ", ".join(f"{name.rpartition('.')[2]} {_shown(flat.get(name))}" for name in names)
            base, _, remarks = run.method.partition(" (")
            method = f"{base} ({', '.join(filter(None, (remarks.removesuffix(')'), named)))})"
            result = dataclasses.replace(result, run=dataclasses.replace(run, method=method))
        found.append(result)
    return found


def _flat(settings: Any, *, within: str = "") -> dict[str, Any]:
    """Flattens settings, without those that do not make a variant: {"data": {"packed": 0}} is {"data.packed": 0}."""
    found: dict[str, Any] = {}
    for name, value in settings.items() if isinstance(settings, Mapping) else ():
        place = f"{within}{name}"
        if isinstance(value, Mapping):
            found |= _flat(value, within=f"{place}.")
        elif place not in _NO_VARIANT:
            found[place] = value
    return found


def _shown(value: Any) -> str:
    text = Path(value).name if isinstance(value, str) and "/" in value else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
