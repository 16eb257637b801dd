"""Progress of a sweep's cells.

A cell is finished when its run directory has test metrics and its manifest matches the present configuration and
records (run/manifest.py). A begun run is resumed; one of another configuration or other data is refused with the
difference.
"""

import dataclasses
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from sbs_jax.run import directory
from sbs_jax.storage import places, user_files
from sbs_jax.sweep.cells import Cell
from sbs_jax.training.gin_files import UsageError

log = logging.getLogger(__name__)

FINISHED, BEGUN, NEW, CHANGED = "finished", "begun", "new", "changed"
_SHOWN = 20  # lines of a difference in an error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standing:
    """State of a cell: "finished", "begun", "new", or "changed" with the difference."""

    cell: Cell
    state: str
    step: int = 0  # of the last metrics line
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # on test
    difference: tuple[str, ...] = ()


def standings(cells: Sequence[Cell]) -> list[Standing]:
    """Returns the state of each cell; configures begun cells and hashes their records."""
    return [standing(cell) for cell in cells]


def standing(cell: Cell) -> Standing:
    if not (cell.model_dir / directory.MANIFEST).exists():
        return Standing(cell=cell, state=NEW)
    try:
        lines = directory.read_metrics(cell.model_dir) if (cell.model_dir / "metrics.jsonl").exists() else []
        changed = _changes(cell)
    except ValueError as error:  # damaged
        return Standing(cell=cell, state=CHANGED, difference=(str(error),))
    step = max((line["step"] for line in lines), default=0)
    if changed:
        return Standing(cell=cell, state=CHANGED, step=step, difference=tuple(changed))
    tests = [line for line in lines if line["kind"] == "test"]
    return Standing(cell=cell, state=FINISHED if tests else BEGUN, step=step, metrics=tests[-1] if tests else {})


def _changes(cell: Cell) -> list[str]:
    """Diffs an existing run against a run of this cell that would start now.

    Facts derived from configuration, records and vocabulary (counts, lengths, parameter shapes) are not recomputed:
    they differ only if their sources do.
    """
    from sbs_jax.data import registry
    from sbs_jax.run import manifest, settings
    from sbs_jax.training import contents

    config, text = cell.configured()
    old = manifest.read(cell.model_dir)
    registry.configure(config.data)
    name, lengths = config.mixture_or_task_name, config.task_feature_lengths
    data = registry.manifest(name, lengths=lengths, counted=False)
    _take_counts(data, old["data"])
    new = {**old, "data": data, "run": contents.of_run(config), "settings": settings.describe(config)}
    kept = user_files.whole(cell.model_dir / "config.gin").decode("utf-8", "replace")
    return manifest.changes(old, json.loads(json.dumps(new)), old_config=kept, new_config=text)[0]


def _take_counts(data: dict[str, Any], old: Mapping[str, Any]) -> None:
    for split, facts in data["splits"].items():
        facts["counts"] = old.get("splits", {}).get(split, {}).get("counts")
    for name, part in data.get("parts", {}).items():
        _take_counts(part, old.get("parts", {}).get(name, {}))


def overview(found: Sequence[Standing]) -> str:
    """Formats a line per cell, and counts by state."""
    width = max(len(each.cell.name) for each in found)
    numbers = len(str(len(found) - 1))
    lines = [f"{i:{numbers}}  {each.cell.name:{width}}  {_described(each)}" for i, each in enumerate(found)]
    counts = {state: sum(each.state == state for each in found) for state in (FINISHED, BEGUN, NEW, CHANGED)}
    totals = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return "\n".join([*lines, f"{len(found)} cells: {totals}."])


def _described(each: Standing) -> str:
    if each.state == FINISHED:
        return f"finished: {graded(each.metrics)}"
    return f"begun, step {each.step}" if each.state == BEGUN else each.state


def graded(metrics: Mapping[str, Any]) -> str:
    """Returns "equation_accuracy 12.5" from a line of test metrics."""
    return ", ".join(f"{name} {value:.1f}" for name, value in metrics.items() if name.endswith("accuracy"))


def unfinished(cells: Sequence[Cell], *, redo_changed: bool = False) -> list[Cell]:
    """Returns the cells left to train and prints the state of all.

    UsageError with the differences if runs are of another configuration, unless `redo_changed`.
    """
    found = standings(cells)
    found = [_redone(each) if redo_changed and each.state == CHANGED else each for each in found]
    _refuse_changed(found)
    print(overview(found), flush=True)
    return [each.cell for each in found if each.state != FINISHED]


def _redone(each: Standing) -> Standing:
    """Moves the cell's run aside and returns it as new."""
    old = each.cell.model_dir
    if places.in_bucket(old):
        raise UsageError(
            f"{old} cannot be moved aside: a bucket has no renames. Remove it, or choose another SWEEP_DIR."
        )
    aside = next(path for n in itertools.count(1) if not (path := old.with_name(f"{old.name}~{n}")).exists())
    old.rename(aside)
    log.warning("%s is of another configuration or other data; moved it to %s.", old, aside)
    return Standing(cell=each.cell, state=NEW)


def _refuse_changed(found: Sequence[Standing]) -> None:
    changed = [each for each in found if each.state == CHANGED]
    if not changed:
        return
    parts = []
    for each in changed[:5]:
        more = [f"({len(each.difference) - _SHOWN} more lines)"] if len(each.difference) > _SHOWN else []
        parts.append("\n  ".join([f"{each.cell.name}:", *each.difference[:_SHOWN], *more]))
    if len(changed) > 5:
        parts.append(f"and {len(changed) - 5} more: {', '.join(each.cell.name for each in changed[5:])}")
    raise UsageError(
        f"{len(changed)} cells of {changed[0].cell.sweep_dir} are runs of another configuration, other data or other "
        "defaults of the code:\n"
        + "\n".join(parts)
        + "\nChoose another SWEEP_DIR, restore the configuration, or train them again with --redo_changed, which moves "
        "the existing runs aside."
    )
