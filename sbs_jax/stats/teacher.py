"""The teacher behind some runs: how often its labels are the humans', and how its replies could be read.

All of it comes from the manifest of the records that the runs trained on (`sbs records`, `sbs teach`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbs_jax.data import records
from sbs_jax.stats import paper
from sbs_jax.storage import json_files


@dataclass(frozen=True, kw_only=True)
class Split:
    """What the records say of the teacher on one split."""

    rows: int
    labelled: int  # rows with a human label
    labels: int  # rows with a usable label of the teacher
    right: int  # labelled rows on which the two agree
    rationales: int  # rows with a usable rationale
    outcomes: Mapping[str, int]  # how the replies were read, to rows
    accuracy: float | None  # percent of the labelled rows

    @property
    def other_label(self) -> float | None:
        """Percent of the teacher's usable labels that are not the human's: what such a rationale argues for.

        None where some rows have no human label, so that nobody can tell.
        """
        if not self.labels or self.labelled < self.rows:
            return None
        return 100.0 * (self.labels - self.right) / self.labels


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The teacher of one dataset's records."""

    name: str | None  # None where the records do not tell
    parameters: float | None  # None where nobody published them
    parser: str | None
    splits: Mapping[str, Split]  # those whose file is the one that the runs read


def read(manifest: Mapping[str, Any]) -> Teacher | None:
    """The teacher of a run's records by the run's manifest; None where those records are gone or are other ones now.

    A report needs no records: damage there is not an error here.
    """
    data = manifest["data"]
    file = Path(data["options"]["records_dir"]) / data["dataset"] / records.MANIFEST
    try:
        found = json_files.read_json(file) if file.is_file() else None
    except (ValueError, OSError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("splits"), dict):
        return None
    splits = {}
    for name, facts in found["splits"].items():
        known = data["splits"].get(name)
        if known and isinstance(facts, dict) and facts.get("sha256") == known["sha256"]:
            split = _split(facts)
            if split:
                splits[name] = split
    if not splits:
        return None
    name, parameters = _model(found, data["dataset"])
    parser = found.get("parser")
    return Teacher(name=name, parameters=parameters, parser=parser if isinstance(parser, str) else None, splits=splits)


def _split(facts: Mapping[str, Any]) -> Split | None:
    """None where the accuracy is no number, so that the manifest is damaged or of another version."""
    accuracy = facts.get("teacher_accuracy")
    if not (accuracy is None or type(accuracy) in (int, float)):
        return None

    def count(name: str) -> int:
        value = facts.get(name)
        return value if type(value) is int else 0

    outcomes = facts.get("outcomes")
    return Split(
        rows=count("rows"),
        labelled=count("labelled"),
        labels=count("teacher_labels"),
        right=count("teacher_right"),
        rationales=count("rationales"),
        outcomes={str(k): v for k, v in outcomes.items() if type(v) is int} if isinstance(outcomes, dict) else {},
        accuracy=accuracy,
    )


def _model(found: Mapping[str, Any], dataset: str) -> tuple[str | None, float | None]:
    """The teacher's name and size. Replies of the paper's release are of its 540B PaLM."""
    asked = found.get("teacher")
    name = asked.get("model") if isinstance(asked, dict) else None
    if isinstance(name, str):
        return (paper.TEACHER, paper.TEACHER_PARAMETERS) if name == "540b" else (name, None)
    sources = [s.get("sources") for s in found["splits"].values() if isinstance(s, dict)]
    released = any(str(file).startswith("llm/") for s in sources if isinstance(s, dict) for file in s)
    if found.get("inputs") == "release" and released and dataset in paper.DATASETS:
        return paper.TEACHER, paper.TEACHER_PARAMETERS
    return None, None
