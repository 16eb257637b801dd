"""Scalars in TensorBoard's event format, as bytes.

TensorBoard's own writer hands them to a thread that ends at the first error of the disk, and with it every later event
of the run; so the bytes are made here and written like the other files of a run (pending_writes.py).
"""

import io
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PREFIX = "events.out.tfevents."  # by which TensorBoard knows them


def next_file(directory: Path) -> Path:
    """A name behind all that are there: TensorBoard reads in the order of names, and clocks may have been set back."""
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    numbers = [int(found[1]) for name in names if (found := re.match(re.escape(_PREFIX) + r"(\d+)", name))]
    return directory / f"{_PREFIX}{max(numbers, default=0) + 1:010d}"


def header() -> bytes:
    """What a file of events begins with."""
    return _record(file_version="brain.Event:2")


def scalars(kind: str, step: int, values: Mapping[str, float]) -> bytes:
    """One event per value, tagged `<kind>/<name>`."""
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
