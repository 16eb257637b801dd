"""Token tables of large records, kept in the user's cache from one start to the next.

An entry is a folder, named by a hash of everything that its contents depend on. All processes of a machine map the same
files into memory. Entries that were unused for longest make room for new ones.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sbs_jax.data import tokens
from sbs_jax.storage import atomic, checksums, json_files, places

log = logging.getLogger(__name__)

LARGE = 2**23  # bytes of records from which an entry saves a second or more
MOST = 8 * 2**30  # bytes of all entries
_FACTS = "facts.json"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """Holds `facts` for JSON, `warnings` for each start's log, and tables by feature."""

    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    warnings: Sequence[str] = ()
    tables: Mapping[str, tokens.TokenTable] = dataclasses.field(default_factory=dict)


def entry(key: Mapping[str, Any] | None, make: Callable[[], Entry]) -> Entry:
    """Returns the entry of a key, which is made and kept if there is none; without a key it is only made."""
    if key is None:
        return make()
    name = hashlib.sha256(json.dumps([_code(), key], sort_keys=True).encode()).hexdigest()[:32]
    place = places.user_cache() / "tables" / name
    found = _read(place)
    if found is None:
        _keep(place, found := make())
    return found


def _code() -> str:
    """Hashes the package's modules about data: another version may select or encode otherwise."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _read(place: Path) -> Entry | None:
    """Reads an entry; None if there is none, or a damaged one."""
    if not place.is_dir():
        return None
    try:
        if (problem := checksums.problem(place)) is not None:
            raise ValueError(problem)
        os.utime(place)  # tells the others that it is in use
        described = json_files.read_json(place / _FACTS)
        tables = {
            feature: tokens.TokenTable(**{part: _mapped(place / f"{feature}.{part}.npy") for part in tokens.PARTS})
            for feature in described["tables"]
        }
    except (OSError, ValueError) as error:
        log.warning("Warning: %s is not read (%s); it is made again.", place, error)
        shutil.rmtree(place, ignore_errors=True)
        return None
    return Entry(facts=described["facts"], warnings=described["warnings"], tables=tables)


def _mapped(file: Path) -> np.ndarray:
    return np.asarray(np.load(file, mmap_mode="r"))


def _keep(place: Path, made: Entry) -> None:
    """Writes an entry, unless another process has; a disk that refuses it costs later starts their time."""
    arrays = {
        f"{feature}.{part}.npy": getattr(table, part) for feature, table in made.tables.items() for part in tokens.PARTS
    }
    try:
        _make_room(place.parent, sum(array.nbytes for array in arrays.values()))
        with atomic.new_folder(place) as folder:
            for name, array in arrays.items():
                np.save(folder / name, array)
            described = {"facts": made.facts, "warnings": made.warnings, "tables": [*made.tables]}
            (folder / _FACTS).write_text(json.dumps(described), encoding="utf-8")
            checksums.write(folder)
    except FileExistsError:
        pass
    except OSError as error:
        if not place.is_dir():  # else another process was quicker
            log.warning("Warning: the token tables cannot be kept in %s (%s); each start makes them.", place, error)


def _make_room(folder: Path, needed: int) -> None:
    """Removes the entries that were unused for longest until `needed` bytes fit."""
    if not folder.is_dir():
        return
    entries = []
    for place in folder.iterdir():
        try:
            size = sum(file.stat().st_size for file in place.iterdir())
            entries.append((place.stat().st_mtime, size, place))
        except FileNotFoundError:  # another process has just removed or finished it
            continue
    total = needed + sum(size for _, size, _ in entries)
    for _, size, place in sorted(entries):
        if total <= MOST:
            return
        shutil.rmtree(place, ignore_errors=True)
        total -= size
