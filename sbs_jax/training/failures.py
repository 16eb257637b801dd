"""Steps whose loss or gradient is not finite: stop the run and keep what `sbs replay` needs.

<run>/failures/<step>/failure.json      metrics of the steps since the last log line, and the batch's examples
<run>/failures/<step>/checkpoints/..    the state before that step
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sbs_jax import hosts
from sbs_jax.data import batches
from sbs_jax.run import checkpoints
from sbs_jax.storage import atomic, json_files, places
from sbs_jax.training import contents, feed
from sbs_jax.training.config import TrainConfig
from sbs_jax.training.step import Trainer, TrainState

_STATE_ALONE = checkpoints.Retention(newest=1, best=0, period=None)


def check(
    config: TrainConfig,
    rows: Sequence[Mapping[str, float]],
    state: TrainState,
    *,
    trainer: Trainer,
    run: Path,
    base: dict[str, Any] | None,
) -> int:
    """Returns the number of updates skipped so far; FloatingPointError, with the evidence saved, if they are too many.

    `rows` are the metrics of the steps since the last log line, `base` the identity of the weights under adapters.
    """
    skipped = int(rows[-1]["skipped"]) if rows else 0
    if skipped <= config.skip_non_finite:
        return skipped
    step = int(state.step) + 1  # train_step leaves the state as it was before the bad step
    first = next(index for index, row in enumerate(rows) if row["skipped"] > config.skip_non_finite)
    path = folder(run, step)
    _write(path, step=step, rows=rows[: first + 1], examples=feed.batch_examples(config, step=step)[0])
    saved = trainer.unstacked(state)
    with checkpoints.Checkpoints(path, retention=_STATE_ALONE, scores={}) as saver:
        metadata = {"step": step - 1, **contents.student(config, base), "skipped": skipped - 1}
        saver.finish(step - 1, parameters=saved.parameters, optimizer=saved.optimizer, metadata=metadata, patience=0.0)
    bad = [name for name in ("loss", "gradient_norm") if not math.isfinite(rows[first][name])]
    before = f" after {config.skip_non_finite} skipped steps" if config.skip_non_finite else ""
    raise FloatingPointError(
        f"The {' and '.join(bad)} of step {step} is not finite{before}; the state before it is in {path}, and "
        f"`sbs replay {run}` shows which examples and parameters are at fault. Lower the learning rate or clip_norm, "
        "compute in float32, remove the example, or skip such steps: SKIP_NON_FINITE=10."
    )


def folder(run: str | Path, step: int) -> Path:
    """Returns the folder of a failure of a run."""
    return places.of(run) / "failures" / str(step)


def _write(
    path: Path, *, step: int, rows: Sequence[Mapping[str, float]], examples: Sequence[batches.BatchExample]
) -> None:
    """Writes failure.json; `rows` are the metrics of the steps up to this one."""
    if not hosts.is_first():
        return
    failure = {
        "step": step,
        "steps": [
            {"step": step - len(rows) + 1 + number} | {name: _plain(x) for name, x in row.items()}
            for number, row in enumerate(rows)
        ],
        "examples": [dataclasses.asdict(example) for example in examples],
    }
    path.mkdir(parents=True, exist_ok=True)
    atomic.replace(path / "failure.json", (json.dumps(failure, indent=1) + "\n").encode())


def _plain(value: float) -> float | str:
    """Converts a value to one that JSON has: infinity and NaN become text."""
    return value if math.isfinite(value) else str(value)


def newest(run: str | Path) -> int | None:
    """Returns the last failed step that a run kept, None if there is none."""
    found = [
        int(path.parent.name) for path in places.of(run).glob("failures/*/failure.json") if path.parent.name.isdigit()
    ]
    return max(found, default=None)


def read(run: str | Path, step: int) -> dict[str, Any] | None:
    """Reads failure.json of a step, None if the run kept none."""
    path = folder(run, step) / "failure.json"
    return json_files.read_json(path) if path.exists() else None
