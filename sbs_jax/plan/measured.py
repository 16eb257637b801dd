"""The steps that a run has made, to put beside the estimates of a plan."""

import statistics
from pathlib import Path
from typing import Any

from sbs_jax.run import directory
from sbs_jax.training.config import TrainConfig

# Settings on which the time of a step depends.
_SAME = ("batch_size", "pack", "tuning")


def read(run: str | Path, config: TrainConfig) -> dict[str, Any]:
    """Returns the run's devices and the medians of its speeds, without the first line of metrics, which has compiling.

    ValueError if its updates are not those of `config`, or if it has no second line yet.
    """
    manifest = directory.read_manifest(run)
    mine = {name: getattr(config, name) for name in _SAME} | {"lengths": dict(config.task_feature_lengths)}
    theirs = {name: manifest["settings"].get(name) for name in _SAME} | {
        "lengths": manifest["run"]["task_feature_lengths"]
    }
    if different := [name for name in mine if mine[name] != theirs[name]]:
        name = different[0]
        raise ValueError(
            f"The updates of {run} are others: its {name} is {theirs[name]!r}, here it is {mine[name]!r}. Plan its own "
            f"configuration: --gin_file={run}/config.gin."
        )
    lines = [line for line in directory.read_metrics(run) if line["kind"] == "train"][1:]
    if not lines:
        raise ValueError(
            f"{run} has measured no step yet; its second line of metrics comes after 2 x LOG_PERIOD steps."
        )
    names = ("seconds_per_step", "utilisation", "tokens_per_second_per_device", "device_memory_gib")
    found = {
        name: statistics.median(line[name] for line in lines) for name in names if all(name in line for line in lines)
    }
    return {"run": str(run), "devices": manifest["devices"], "goodput": lines[-1].get("goodput"), **found}
