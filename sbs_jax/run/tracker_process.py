"""The process of a tracker: sends each line of metrics to MLflow or Weights & Biases, and repeats what fails.

    python -m sbs_jax.run.tracker_process NAME RUN

reads lines of JSON (trackers.py writes them) and writes what the run logs. `RUN/trackers/NAME.json` keeps the
id of the tracker's run, so that a resumed run continues it. The last line says how many seconds are left after it.
"""

# pyright: reportMissingImports=false
# Its packages are optional.

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from sbs_jax.run import trackers
from sbs_jax.storage import atomic, json_files

_PROJECT = "sbs_jax"  # experiment or project, unless the environment names one
_WAITS = (1.0, 60.0)  # seconds between repetitions, from .. to
_SECONDS = 10.0  # left after the input, if the run was killed and could not say


@runtime_checkable
class _Client(Protocol):
    """A tracker's own client; any method may raise anything."""

    def log(self, kind: str, step: int, values: Mapping[str, float], when: float) -> None: ...

    def close(self, *, finished: bool) -> None: ...


class _MLflow:
    def __init__(self, run: Path, settings: Mapping[str, Any], id_: str | None, keep: Callable[[str], None]) -> None:
        import mlflow
        from mlflow import entities

        self._entities, self._client = entities, mlflow.MlflowClient()
        if id_ is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
            found = self._client.get_experiment_by_name(name)
            experiment = self._client.create_experiment(name) if found is None else found.experiment_id
            made: str = self._client.create_run(experiment, run_name=run.name).info.run_id
            keep(made)
            params = [entities.Param(key, str(value)[:500]) for key, value in settings.items()]
            for start in range(0, len(params), 100):  # its limit
                self._client.log_batch(made, params=params[start : start + 100])
            id_ = made
        else:
            self._client.update_run(id_, status="RUNNING")
        self._id = id_

    def log(self, kind: str, step: int, values: Mapping[str, float], when: float) -> None:
        stamp = int(when * 1000)
        # Its folders of files cannot hold "train/loss" and "train/loss/label".
        names = {name: f"{kind}/{name.replace('/', '.')}" for name in values}
        metrics = [self._entities.Metric(names[name], value, stamp, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, *, finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


class _Wandb:
    def __init__(self, run: Path, settings: Mapping[str, Any], id_: str | None, keep: Callable[[str], None]) -> None:
        import wandb

        if id_ is None:
            id_ = uuid.uuid4().hex
            keep(id_)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=id_,
            resume="allow",
            name=run.name,
            config=dict(settings),
            dir=str(run / trackers.FOLDER),
        )
        # A test comes after the last step and belongs to an earlier one, which W&B's own step cannot say.
        self._run.define_metric("*", step_metric="step")

    def log(self, kind: str, step: int, values: Mapping[str, float], when: float) -> None:
        self._run.log({"step": step, **{f"{kind}/{name}": value for name, value in values.items()}})

    def close(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


_CLIENTS: Mapping[str, Callable[..., _Client]] = {trackers.MLFLOW: _MLflow, trackers.WANDB: _Wandb}


def main() -> None:
    """Sends the lines of standard input until its end."""
    name, run = sys.argv[1], Path(sys.argv[2])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to all processes of a preempted machine; the run ends this one
    said = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the client prints
    _Sender(name, run, said=said).run()


class _Sender:
    """The lines that wait, and the client, which is opened at the first one."""

    def __init__(self, name: str, run: Path, *, said: Any) -> None:
        self._name, self._run, self._said = name, run, said
        self._file = run / trackers.FOLDER / f"{name}.json"
        self._client: _Client | None = None
        self._settings: Mapping[str, Any] = {}
        self._failing = False

    def run(self) -> None:
        """Handles every line, repeating the one that fails."""
        lines = _Lines()
        for message in lines:
            if "settings" in message:
                self._settings = message["settings"]
            elif not self._repeated(lambda message=message: self._handle(message), lines):
                os._exit(trackers.LATE)  # not by way of the client's own end, which may wait
        os._exit(0)

    def _handle(self, message: Mapping[str, Any]) -> None:
        if self._client is None:
            self._client = _CLIENTS[self._name](self._run, self._settings, self._known(), self._keep)
        if "finished" in message:
            self._client.close(finished=message["finished"])
        else:
            self._client.log(message["kind"], message["step"], message["values"], message["time"])

    def _repeated(self, act: Callable[[], None], lines: "_Lines") -> bool:
        """Acts until it works; False if the input ended and no time is left."""
        wait, longest = _WAITS
        while True:
            try:
                act()
            except Exception as error:  # of any kind: of HTTP, of databases, of the client's own
                self._say_failure(error)
            else:
                if self._failing:
                    self._say(logging.INFO, "works again; every line was sent.")
                self._failing = False
                return True
            if not lines.rest(wait):
                return False
            wait = min(2 * wait, longest)

    def _say_failure(self, error: Exception) -> None:
        if not self._failing:
            reason = json_files.part(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
            self._say(
                logging.WARNING,
                f"a line was not sent ({reason}). This is repeated in the background; training goes on, and "
                "metrics.jsonl has every line.",
            )
        self._failing = True

    def _say(self, level: int, text: str) -> None:
        self._said.write(json.dumps({"level": level, "text": text}) + "\n")

    def _known(self) -> str | None:
        with contextlib.suppress(FileNotFoundError):
            found = json_files.read_json(self._file)
            if isinstance(found, dict) and isinstance(found.get("id"), str):
                return found["id"]
        return None

    def _keep(self, id_: str) -> None:
        self._file.parent.mkdir(exist_ok=True)
        atomic.replace(self._file, (json.dumps({"id": id_}) + "\n").encode())


class _Lines:
    """Lines of standard input; after its end there is only so much time."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._deadline = 0.0
        self._waiting: list[Mapping[str, Any]] = []
        self._more = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        seconds = _SECONDS
        for line in sys.stdin.buffer:
            message = json.loads(line)
            seconds = message.get("seconds", seconds)
            with self._more:
                self._waiting.append(message)
                self._more.notify()
        self._deadline = time.monotonic() + seconds
        self._ended.set()
        with self._more:
            self._more.notify()
        time.sleep(seconds)
        os._exit(trackers.LATE)  # also while a client waits for its server

    def __iter__(self) -> Any:
        while True:
            with self._more:
                self._more.wait_for(lambda: self._waiting or self._ended.is_set())
                if not self._waiting:
                    return
                message = self._waiting.pop(0)
            yield message

    def rest(self, seconds: float) -> bool:
        """Waits before a repetition; False if there is no time for one."""
        if self._ended.wait(seconds):
            left = self._deadline - time.monotonic()
            time.sleep(max(0.0, min(1.0, left)))
            return left > 0
        return True


if __name__ == "__main__":
    main()
