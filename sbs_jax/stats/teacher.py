"""The teacher's accuracy and outcomes, from the manifest of the records that runs trained on."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sbs_jax.data import records
from sbs_jax.stats import paper
from sbs_jax.storage import json_files, places


@dataclass(frozen=True, kw_only=True)
class Split:
    """The teacher's replies on one split, as the manifest of the records has them."""

    rows: int = 0
    labelled: int = 0  # rows with a human label
    teacher_labels: int = 0  # rows with a usable label of the teacher
    teacher_right: int = 0  # labelled rows on which the two agree
    rationales: int = 0  # rows with a usable rationale
    outcomes: Mapping[str, int] = field(default_factory=dict)  # rows by outcome of their replies
    teacher_accuracy: float | None = None  # percent of the labelled rows

    @property
    def other_label(self) -> float | None:
        """Percent of the teacher's usable labels that differ from the human's; the rationales argue for the teacher's.

        None if some rows have no human label.
        """
        if not self.teacher_labels or self.labelled < self.rows:
            return None
        return 100.0 * (self.teacher_labels - self.teacher_right) / self.teacher_labels


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The teacher of one dataset's records."""

    name: str | None  # None if the records do not say
    parameters: float | None  # None if not published
    parser: str | None
    splits: Mapping[str, Split]  # splits whose file is the one that the runs read


def read(manifest: Mapping[str, Any]) -> Teacher | None:
    """Reads the teacher of a run's records; None if those are gone, damaged or have changed since.

    A report needs no records, so nothing here is an error.
    """
    data = manifest["data"]
    file = places.of(data["options"]["records_dir"]) / data["dataset"] / records.MANIFEST
    try:
        found = json_files.read_json(file) if file.is_file() else None
    except (ValueError, OSError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("splits"), dict):
        return None
    splits = {}
    for name, facts in found["splits"].items():
        known = data["splits"].get(name)
        if (
            known and isinstance(facts, dict) and facts.get("sha256") in known["sha256"].split()
        ):  # of several with folds
            with contextlib.suppress(ValueError):  # damaged, or of another version
                splits[name] = json_files.typed(facts, Split, extra=True)
    if not splits:
        return None
    name, parameters = _model(found, data["dataset"])
    parser = found.get("parser")
    return Teacher(name=name, parameters=parameters, parser=parser if isinstance(parser, str) else None, splits=splits)


def _model(found: Mapping[str, Any], dataset: str) -> tuple[str | None, float | None]:
    """Returns the teacher's name and size; replies of the paper's release are of its 540B PaLM."""
    asked = found.get("teacher")
    name = asked.get("model") if isinstance(asked, dict) else None
    if isinstance(name, str):
        return (paper.TEACHER, paper.TEACHER_PARAMETERS) if name == "540b" else (name, None)
    sources = [s.get("sources") for s in found["splits"].values() if isinstance(s, dict)]
    released = any(str(file).startswith("llm/") for s in sources if isinstance(s, dict) for file in s)
    if found.get("inputs") == "release" and released and dataset in paper.DATASETS:
        return paper.TEACHER, paper.TEACHER_PARAMETERS
    return None, None
