"""The directory of one run: configuration, manifest, metrics, TensorBoard events, predictions.

config.gin            operative configuration; another one is refused
manifest.json         git revision, versions, data hashes, parameter table
metrics.jsonl         one JSON object a line: {"kind": "train", "step": 50, "loss": ..}
tensorboard/          the same for TensorBoard
predictions/          <task>-<step>.jsonl
checkpoints/<step>/   see checkpoints.py

Of several processes, all of which call the same methods, the first one writes.
"""

import difflib
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sbs_jax import hosts

MANIFEST = "manifest.json"
# How a run is computed and on which mesh: it may be resumed in another way.
_HOW_MACROS = ("SLICES", "TENSOR", "LAYERS", "REMAT", "VOCABULARY_CHUNKS")
_HOW_BINDINGS = ("partitioning.Layout.", "t5.Execution.", "train.TrainConfig.vocabulary_chunks")
_SEEN_WITHIN = 15.0  # seconds in which a network file system shows a new file to another host
_REPORTED = (
    *("sbs-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "seqio", "tensorflow", "tensorflow-text"),
    *("tensorflow-datasets", "sentencepiece", "numpy"),
)


class RunDir:
    """Opens (or makes) a run directory for writing; use it with `with`."""

    def __init__(self, path: str | Path, *, config_text: str) -> None:
        self.path = Path(path).absolute()
        self._config_text = config_text
        self._metrics = self.path / "metrics.jsonl"

    def __enter__(self) -> "RunDir":
        config = self.path / "config.gin"
        if hosts.is_first():
            self.path.mkdir(parents=True, exist_ok=True)
            self._refuse_another_configuration()
            _replace(config, self._config_text)
            from tensorboard.summary import Writer  # seconds of import, which readers of a run need not wait for

            self._events = Writer(str(self.path / "tensorboard"))
        written = hosts.from_first(lambda: _digest(config))
        if not hosts.is_first():
            self._refuse_another_folder(config, written)
        return self

    def __exit__(self, *_: object) -> None:
        if hosts.is_first():
            self._events.close()

    def _refuse_another_folder(self, config: Path, written: str) -> None:
        """On the other processes: what the first one wrote has to be there, or checkpoints would fall to pieces."""
        deadline = time.monotonic() + _SEEN_WITHIN
        while not (config.exists() and _digest(config) == written):
            if time.monotonic() > deadline:
                raise FileNotFoundError(
                    f"{self.path} on {hosts.describe()} is not the folder that process 0 writes to; MODEL_DIR must be "
                    "one that all hosts share (a network file system or a mounted bucket)."
                )
            time.sleep(0.2)

    def _refuse_another_configuration(self) -> None:
        existing = self.path / "config.gin"
        if not existing.exists():
            held = [p.name for p in self.path.iterdir()]
            if held:
                raise FileExistsError(
                    f"{self.path} is not empty and not a run directory (it has {', '.join(sorted(held)[:5])}); "
                    "choose another MODEL_DIR."
                )
            return
        old, new = _meaning(existing.read_text("utf-8")), _meaning(self._config_text)
        if old != new:
            diff = "\n".join(difflib.unified_diff(old, new, "existing", "requested", lineterm="", n=0))
            raise FileExistsError(
                f"{self.path} holds a run with another configuration:\n{diff}\n"
                "Choose another MODEL_DIR, or repeat the existing configuration to resume it."
            )

    def write_manifest(self, contents: Mapping[str, Any]) -> None:
        """Adds the machine's side (git revision, versions) to what the caller knows, and writes it."""
        if not hosts.is_first():
            return
        versions = {"python": platform.python_version()}
        for name in _REPORTED:
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                versions[name] = "not installed"
        whole = {"git_revision": git_revision(), "versions": versions, **contents}
        _replace(self.path / MANIFEST, json.dumps(whole, indent=1, sort_keys=True) + "\n")

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, on disk before this returns, and the same as TensorBoard scalars."""
        if not hosts.is_first():
            return
        line = json.dumps({"kind": kind, "step": step, **values})
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        for name, value in values.items():
            self._events.add_scalar(f"{kind}/{name}", value, step)
        self._events.flush()

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl, on every process."""
        return hosts.from_first(lambda: read_metrics(self.path))

    def truncate_metrics(self, *, after_step: int) -> None:
        """Drops lines of steps that a resumed run will repeat (and a line cut short by the end of the process)."""
        if hosts.is_first() and self._metrics.exists():
            kept = [json.dumps(line) + "\n" for line in read_metrics(self.path) if line["step"] <= after_step]
            _replace(self._metrics, "".join(kept))

    def write_predictions(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """`predictions/<name>.jsonl`."""
        if not hosts.is_first():
            return
        path = self.path / "predictions" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        _replace(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Lines of a run's metrics.jsonl; a last line without its end is left out."""
    file = Path(path) / "metrics.jsonl"
    if not file.exists():
        return []
    text = file.read_text("utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a run."""
    file = Path(path) / MANIFEST
    if not file.exists():
        raise FileNotFoundError(f"{path} is not a run directory: it has no manifest.json.")
    return json.loads(file.read_text("utf-8"))


def read_scores(path: str | Path) -> dict[int, float]:
    """The primary metric of validation by step; empty where nothing was logged, or no manifest says which it is."""
    if not (Path(path) / MANIFEST).is_file():
        return {}
    primary = read_manifest(path)["run"].get("primary_metric")
    if primary is None:
        return {}
    return {line["step"]: line[primary] for line in read_metrics(path) if line["kind"] == "validation"}


def git_revision() -> str:
    """Revision of the checkout this code runs from, with `-dirty` if it is changed; or why there is none."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({error})"
    return done.stdout.strip() if done.returncode == 0 else "unknown (not a git checkout)"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _meaning(text: str) -> list[str]:
    """Bindings of a configuration without comments, and without where and how it runs: directory, mesh, execution."""
    where = ("MODEL_DIR =", *_HOW_BINDINGS, *(f"{macro} =" for macro in _HOW_MACROS))
    kept, dropping = [], False
    for line in map(str.rstrip, text.splitlines()):
        if line and not line.startswith("#"):
            if not line.startswith(" "):  # a binding begins; others go on with its value
                dropping = line.startswith(where)
            if not dropping:
                kept.append(line)
    return kept


def _replace(path: Path, text: str) -> None:
    """Writes a file so that readers see the old or the new one, never half."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
