"""Run directories, given by their own paths or found inside folders."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sbs_jax.run import directory
from sbs_jax.stats.results import Run, is_tested, runs_of
from sbs_jax.storage import places


@dataclass(frozen=True)
class Found:
    """The runs below some paths; `left_out` names the others, each with its reason."""

    runs: tuple[Run, ...]
    left_out: tuple[str, ...]


def find(paths: Sequence[str | Path]) -> Found:
    """Finds every run of some paths, each once, in the order given and by name within a folder.

    A run of several datasets is one for each of them.

    A run directory given by its own path must be usable by a report (else FileNotFoundError or ValueError). A folder
    without a manifest.json is searched for run directories; those without a test result, or of an unknown method, go
    to `left_out`. Files beside the runs (`runs/*`) are ignored.
    """
    runs: dict[Path, list[Run]] = {}
    left_out: list[str] = []
    for path in map(places.of, paths):
        if path.is_file() and len(paths) > 1:
            continue
        inside = [] if (path / directory.MANIFEST).exists() or not path.is_dir() else _run_dirs(path)
        if not inside:
            runs.setdefault(places.real(path), runs_of(path))
        for folder in inside:
            try:
                of_folder = runs_of(folder)
            except ValueError as error:
                left_out.append(f"{folder}: {error}")
                continue
            if is_tested(folder):
                runs.setdefault(places.real(folder), of_folder)
            else:
                left_out.append(f"{folder}: it has no test result yet.")
    if not runs:
        reasons = "".join(f"\n  {text}" for text in left_out)
        raise ValueError(f"Found no finished run in {', '.join(map(str, paths))}.{reasons}")
    return Found(tuple(run for of_folder in runs.values() for run in of_folder), tuple(left_out))


def _run_dirs(folder: Path) -> list[Path]:
    """Lists folders below that look like run directories, by name; records have a manifest too, but no metrics."""
    found = []
    for place, names, files in places.walk(folder):
        names.sort()
        if directory.MANIFEST in files and ("config.gin" in files or "metrics.jsonl" in files):
            found.append(place)
            names.clear()
    return found
