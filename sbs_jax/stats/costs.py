"""Cost of training and of an answer, computed from the manifests and metrics of runs alone."""

import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sbs_jax.run.directory import TIME_PARTS
from sbs_jax.stats.results import Result
from sbs_jax.stats.summary import Group


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of a group, means over its seeds.

    Attributes:
      devices: kind and number, "8 x TPU"; "not known" if the manifest does not say.
      device_hours: seconds of the training steps (with compilation, without evaluation) times devices.
      training_flops: model FLOPs of one run: updates x FLOPs of an update by the model's definition, at the batch and
        lengths of the manifest, padding counted (`sbs_jax.student.flops`); None if adapters train only a part, or if
        the manifest is of an older version.
      parameters: read once for each token of an answer; None if the manifest does not say.
      utilisation: model FLOPs over the devices' bfloat16 peak, the median of the training; None if it is not known.
      tokens: trained tokens per second and device, without padding, the median; None in runs of an older version.
      goodput: share of the runs' wall time in steps that lasted; None in runs of an older version.
      rest: share of the wall time that each other part took ("compiling", "evaluation", ..).
    """

    devices: str
    device_hours: float
    training_flops: int | None
    parameters: int | None
    utilisation: float | None
    tokens: float | None
    goodput: float | None
    rest: Mapping[str, float]


def cost(group: Group) -> Cost:
    """Computes the cost of training one run of a group."""
    first, spent = group.results[0], _spent(group.results)
    flops = {_training_flops(result) for result in group.results}
    parameters = {result.manifest.get("parameter_count") for result in group.results}
    kinds = {_devices(result) for result in group.results}
    return Cost(
        devices=" or ".join(sorted(kinds)),
        device_hours=float(np.mean([r.train_seconds * max(1, len(_names(r))) / 3600 for r in group.results])),
        training_flops=next(iter(flops)) if len(flops) == 1 else None,
        parameters=first.manifest.get("parameter_count") if len(parameters) == 1 else None,
        utilisation=_median(group.results, "utilisation"),
        tokens=_median(group.results, "tokens_per_second_per_device"),
        goodput=spent.pop("steps", None),
        rest=spent,
    )


def _median(results: Sequence[Result], name: str) -> float | None:
    """Returns the median over the lines of all runs but the first of each, which has compiling in it."""
    values = [value for result in results for _, value in result.curve("train", name)[1:]]
    return statistics.median(values) if values else None


def _spent(results: Sequence[Result]) -> dict[str, float]:
    """Returns the share of all runs' wall time by part; {} if one does not tell."""
    curves = [{part: result.curve("train", f"seconds/{part}") for part in TIME_PARTS} for result in results]
    last = [{part: curve[-1][1] for part, curve in of_run.items() if curve} for of_run in curves]
    total = sum(sum(seconds.values()) for seconds in last)
    if not all(last) or not total:
        return {}
    return {name: sum(seconds.get(name, 0.0) for seconds in last) / total for name in TIME_PARTS}


def _names(result: Result) -> list[str]:
    return [str(name) for name in result.manifest.get("devices", [])]


def _devices(result: Result) -> str:
    """Counts devices by kind: ["TPU_0(process=0,(0,0,0,0))", ..] of 8 devices is "8 x TPU"."""
    kinds = Counter((re.match(r"[A-Za-z]+", name) or [name])[0][:20] for name in _names(result))
    return ", ".join(f"{count} x {kind.upper()}" for kind, count in sorted(kinds.items())) or "not known"


def _training_flops(result: Result) -> int | None:
    settings, lengths = result.manifest.get("settings"), result.manifest["run"].get("task_feature_lengths")
    model = result.manifest.get("model")
    if not isinstance(settings, dict) or not isinstance(model, dict):
        return None
    if settings.get("tuning") is not None or settings.get("teacher") is not None:  # counts of a plain step alone
        return None
    from sbs_jax.student import families, flops  # a second to import

    try:
        of_one = flops.training_flops(
            families.config_of(model), rows=settings["batch_size"], inputs=lengths["inputs"], targets=lengths["targets"]
        )
    except (TypeError, ValueError, KeyError):  # a manifest of another version
        return None
    return of_one * result.updates
