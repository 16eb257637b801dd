"""Scalars in TensorBoard's event format.

TensorBoard's own writer uses a thread that ends at the first disk error and loses every later event. So the bytes are
made here and written like the other files of a run (pending_writes.py).
"""

import io
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sbs_jax.run import pending_writes

_PREFIX = "events.out.tfevents."  # TensorBoard looks for it


def next_file(directory: Path) -> Path:
    """Returns a name after all existing ones: TensorBoard reads in name order, and clocks may be set back."""
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    numbers = [int(found[1]) for name in names if (found := re.match(re.escape(_PREFIX) + r"(\d+)", name))]
    return directory / f"{_PREFIX}{max(numbers, default=0) + 1:010d}"


class TensorBoard:
    """The tracker that writes TensorBoard's events into a new file; its bytes wait with the run's others."""

    def __init__(self, directory: Path, pending: pending_writes.PendingWrites) -> None:
        self._file, self._pending = next_file(directory), pending
        pending.follow(self._file, end=0)
        pending.append(self._file, header())

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Queues one event per value."""
        self._pending.append(self._file, scalars(kind, step, values))

    def close(self, *, finished: bool) -> None:
        """Does nothing: the run writes what waits."""


def header() -> bytes:
    """Returns the first record of an event file."""
    return _record(file_version="brain.Event:2")


def scalars(kind: str, step: int, values: Mapping[str, float]) -> bytes:
    """Encodes one event per value, tagged `<kind>/<name>`."""
    from tensorboard.plugins.scalar import summary_v2

    return b"".join(
        _record(step=step, summary=summary_v2.scalar_pb(f"{kind}/{name}", value)) for name, value in values.items()
    )


def _record(**fields: Any) -> bytes:
    from tensorboard.compat.proto import event_pb2
    from tensorboard.summary.writer import record_writer

    event = event_pb2.Event(wall_time=time.time(), **fields)  # pyright: ignore[reportAttributeAccessIssue]  # generated
    file = io.BytesIO()
    record_writer.RecordWriter(file).write(event.SerializeToString())
    return file.getvalue()
