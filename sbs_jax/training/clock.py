"""Time of a run, by what it went to, and the rates that follow."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from sbs_jax import chips
from sbs_jax.run.directory import TIME_PARTS
from sbs_jax.student import flops
from sbs_jax.training.config import TrainConfig

GIB = 2**30


class Clock:
    """Adds up the wall time of a run, over all of its processes one after the other; begins in `start`.

    `compiled` returns the seconds this process has compiled for; they are taken out of the part in which they fall.
    """

    def __init__(self, before: Mapping[str, Any] | None, *, began: float, compiled: Callable[[], float]) -> None:
        """Takes the `state` that the resumed checkpoint holds, None in a new run; `began` is of time.monotonic."""
        self._seconds: dict[str, float] = dict.fromkeys(TIME_PARTS, 0.0)
        self._compiled = compiled
        if before is not None:
            self._seconds |= {part: before["seconds"].get(part, 0.0) for part in TIME_PARTS}
            self._seconds["lost"] += max(0.0, time.time() - (time.monotonic() - began) - before["at"])
        self._part, self._since, self._compiled_before = "start", began, compiled()

    def enter(self, part: str) -> str:
        """Counts the time from now on as `part`; returns the part that ends."""
        now, compiled, ended = time.monotonic(), self._compiled(), self._part
        of_compiling = compiled - self._compiled_before
        self._seconds["compiling"] += of_compiling
        self._seconds[ended] += max(0.0, now - self._since - of_compiling)
        self._part, self._since, self._compiled_before = part, now, compiled
        return ended

    @contextlib.contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Counts the time of the block as `part`."""
        outer = self.enter(part)
        try:
            yield
        finally:
            self.enter(outer)

    def seconds(self) -> dict[str, float]:
        """Returns the seconds of each of `TIME_PARTS` since the run's first start."""
        self.enter(self._part)
        return dict(self._seconds)

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint holds of the clock, and the time of day."""
        return {"seconds": self.seconds(), "at": time.time()}

    def metrics(self) -> dict[str, float]:
        """Returns `goodput`, the share of `steps` in all time, and the seconds of each part."""
        seconds = self.seconds()
        goodput = seconds["steps"] / (sum(seconds.values()) or 1.0)
        return {"goodput": goodput} | {f"seconds/{part}": spent for part, spent in seconds.items()}


def rates(config: TrainConfig, *, tokens_per_second: float, seconds_per_step: float) -> dict[str, float]:
    """Returns tokens per second and device, model FLOP utilisation, and the most device memory in use, in GiB.

    Utilisation is that of `sbs plan`: the model's operations at full rows, padding included, over the bfloat16 peak. It
    is left out where the device's peak is not known, adapters train a part or a teacher works too, and memory where the
    device keeps no statistics (a CPU).
    """
    devices = jax.devices()
    found = {"tokens_per_second_per_device": tokens_per_second / len(devices)}
    peak = chips.peak_flops(devices[0].device_kind)
    if peak is not None and config.tuning is None and config.teacher is None:
        lengths = config.task_feature_lengths
        operations = flops.training_flops(
            config.model, rows=config.batch_size, inputs=lengths["inputs"], targets=lengths["targets"]
        )
        found["utilisation"] = operations / (seconds_per_step * peak * len(devices))
    used: list[Any] = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    if None not in used:
        found["device_memory_gib"] = max(used) / GIB
    return found
