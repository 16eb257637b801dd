"""Metrics and speeds between two lines of the log."""

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from sbs_jax.training.step import Batch

log = logging.getLogger(__name__)

# Metrics that a clock or a device tells: those of the process that wrote them, not the same again in a repeated run.
_MEASURED = (
    *("tokens_per_second", "tokens_per_second_per_device", "seconds_per_step", "data_wait_share"),
    *("utilisation", "device_memory_gib", "goodput"),
)


def is_measured(name: str) -> bool:
    """Tells whether a metric depends on the machine and the moment, and not on the run alone."""
    return name in _MEASURED or name.startswith("seconds/")


class MetricsWindow:
    """Metrics of the steps since the last log line, and speeds.

    Metrics stay on the device until they are read, so the loop can run ahead of it. A checkpoint between two lines
    stores them (`rows`), so that a resumed run writes the same line.
    """

    def __init__(self, rows: Sequence[Mapping[str, float]] = ()) -> None:
        self._rows = [dict(row) for row in rows]
        self._on_device: list[dict[str, jax.Array]] = []
        self._start = time.monotonic()
        self._waited = self._tokens = 0.0
        self._steps = 0

    def wait_for(self, batches: Iterator[tuple[Batch, float]]) -> tuple[Batch, float]:
        begin = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - begin
        return batch

    def add(self, metrics: dict[str, jax.Array], tokens: float) -> None:
        self._on_device.append(metrics)
        self._tokens += tokens
        self._steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time inside from the speeds."""
        begin = time.monotonic()
        yield
        self._start += time.monotonic() - begin

    def rows(self) -> list[dict[str, float]]:
        """Returns the metrics of each step; waits for the last step."""
        self._rows += [{name: float(x) for name, x in row.items()} for row in jax.device_get(self._on_device)]
        self._on_device = []
        return list(self._rows)  # a copy: a save in the background writes it while this window grows

    def close(self) -> dict[str, float]:
        """Returns means over the steps that were not skipped (none if all were), and speeds; starts a new window."""
        rows = [row for row in self.rows() if is_finite(row)]
        seconds = time.monotonic() - self._start
        values = {}
        for name in [name for name in rows[0] if name != "skipped"] if rows else ():
            # In float32, as the device had them.
            values[name] = float(np.mean(np.asarray([row[name] for row in rows], np.float32)))
        values |= {
            "tokens_per_second": self._tokens / seconds,
            "seconds_per_step": seconds / self._steps,
            "data_wait_share": self._waited / seconds,
        }
        MetricsWindow.__init__(self)
        return values


def is_finite(row: Mapping[str, float]) -> bool:
    return all(math.isfinite(row[name]) for name in ("loss", "gradient_norm"))
