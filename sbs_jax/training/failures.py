"""What a run keeps of a step whose loss or gradient was not finite, so that it can be looked at: `sbs replay`.

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
from sbs_jax.storage import atomic


def folder(run: str | Path, step: int) -> Path:
    """Where a failure of a run is kept."""
    return Path(run) / "failures" / str(step)


def write(
    path: Path, *, step: int, rows: Sequence[Mapping[str, float]], examples: Sequence[batches.BatchExample]
) -> None:
    """Writes failure.json; `rows` are the metrics of the steps up to this one."""
    if not hosts.is_first():
        return
    contents = {
        "step": step,
        "steps": [
            {"step": step - len(rows) + 1 + number} | {name: _plain(x) for name, x in row.items()}
            for number, row in enumerate(rows)
        ],
        "examples": [dataclasses.asdict(example) for example in examples],
    }
    path.mkdir(parents=True, exist_ok=True)
    atomic.replace(path / "failure.json", (json.dumps(contents, indent=1) + "\n").encode())


def _plain(value: float) -> float | str:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else str(value)


def newest(run: str | Path) -> int | None:
    """The last step of which something is kept."""
    found = [int(path.parent.name) for path in Path(run).glob("failures/*/failure.json") if path.parent.name.isdigit()]
    return max(found, default=None)


def read(run: str | Path, step: int) -> dict[str, Any] | None:
    """What `write` wrote; None where nothing is kept of this step."""
    path = folder(run, step) / "failure.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else None
