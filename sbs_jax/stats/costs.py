"""Cost of training and of an answer, computed from the manifests and metrics of runs alone."""

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

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
    """

    devices: str
    device_hours: float
    training_flops: int | None
    parameters: int | None


def cost(group: Group) -> Cost:
    """Computes the cost of training one run of a group."""
    first = group.results[0]
    flops = {_training_flops(result) for result in group.results}
    parameters = {result.manifest.get("parameter_count") for result in group.results}
    kinds = {_devices(result) for result in group.results}
    return Cost(
        devices=" or ".join(sorted(kinds)),
        device_hours=float(np.mean([r.train_seconds * max(1, len(_names(r))) / 3600 for r in group.results])),
        training_flops=next(iter(flops)) if len(flops) == 1 else None,
        parameters=first.manifest.get("parameter_count") if len(parameters) == 1 else None,
    )


def _names(result: Result) -> list[str]:
    return [str(name) for name in result.manifest.get("devices", [])]


def _devices(result: Result) -> str:
    """Counts devices by kind: ["TPU_0(process=0,(0,0,0,0))", ..] of 8 devices is "8 x TPU"."""
    kinds = Counter((re.match(r"[A-Za-z]+", name) or [name])[0][:20] for name in _names(result))
    return ", ".join(f"{count} x {kind.upper()}" for kind, count in sorted(kinds.items())) or "not known"


def _training_flops(result: Result) -> int | None:
    settings, lengths = result.manifest.get("settings"), result.manifest["run"].get("task_feature_lengths")
    model = result.manifest.get("model")
    if not isinstance(settings, dict) or settings.get("tuning") is not None or not isinstance(model, dict):
        return None
    from sbs_jax.student import families, flops  # a second to import

    try:
        of_one = flops.training_flops(
            families.config_of(model), rows=settings["batch_size"], inputs=lengths["inputs"], targets=lengths["targets"]
        )
    except (TypeError, ValueError, KeyError):  # a manifest of another version
        return None
    return of_one * result.updates
