"""A profile of some training steps, where TensorBoard's and XProf's profile pages look for it."""

import contextlib
import logging
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from sbs_jax.storage import atomic
from sbs_jax.training.config import TrainConfig

log = logging.getLogger(__name__)


class Profiler:
    """Traces the steps from the first to the last of a window; every process traces its own devices.

    A trace that fails is reported and costs the run nothing else.
    """

    def __init__(self, steps: Sequence[int] | None, *, folder: Path) -> None:
        """`steps` are the first and the last step, None for no trace; `folder` is that of TensorBoard."""
        self._steps, self._folder = steps, folder
        self._traced: Path | None = None  # where the trace in progress is written

    @classmethod
    @contextlib.contextmanager
    def of(cls, config: TrainConfig, run: Path) -> "Iterator[Profiler]":
        """Yields the profiler of a run, and ends its trace if the run ends meanwhile."""
        profiler = cls(config.profile_steps, folder=run / "tensorboard")
        try:
            yield profiler
        finally:
            profiler.stop()

    @contextlib.contextmanager
    def step(self, step: int, *, ready: Callable[[], Any]) -> Iterator[None]:
        """Surrounds a step. `ready` waits for the devices, so that only whole steps of the window are in the trace."""
        if self._steps is None or not self._steps[0] <= step <= self._steps[1]:
            yield
            return
        first, last = self._steps
        if self._traced is None:
            ready()
            self._start(first, last)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        if step == last:
            ready()
            self.stop()

    def _start(self, first: int, last: int) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every call of Python would be an event
        folder = Path(tempfile.mkdtemp(prefix="sbs-jax-profile-"))
        try:
            jax.profiler.start_trace(folder, profiler_options=options)
        except (RuntimeError, OSError, ValueError) as error:  # another profiler is active
            shutil.rmtree(folder, ignore_errors=True)
            log.warning("Warning: no profile of the steps %d to %d: %s", first, last, error)
            self._steps = None
        else:
            self._traced = folder

    def stop(self) -> None:
        """Ends the trace, if there is one, and puts it into the run."""
        if self._traced is None or self._steps is None:
            return
        first, last = self._steps
        # All processes' files side by side, which is how the profile page finds them.
        target = self._folder / "plugins" / "profile" / f"steps-{first}-{last}"
        name = f"{socket.gethostname()}-{jax.process_index()}"
        try:
            jax.profiler.stop_trace()
            target.mkdir(parents=True, exist_ok=True)
            for file in self._traced.rglob("*.xplane.pb"):
                with file.open("rb") as trace, atomic.replacing(target / f"{name}.xplane.pb") as copy:
                    shutil.copyfileobj(trace, copy)
            log.info("Profile of the steps %d to %d: %s", first, last, target)
        except (RuntimeError, OSError, ValueError) as error:
            log.warning("Warning: no profile of the steps %d to %d: %s", first, last, error)
        finally:
            shutil.rmtree(self._traced, ignore_errors=True)
            self._traced = self._steps = None
