"""Checksums of a directory: one JSON file in it lists every other file with its size and SHA-256.

A directory without this file is incomplete. The file also has its own hash, so damage to it is detected. Files
added later are ignored. In a bucket the generation of an object stands for its hash: an object of the same generation
has the same bytes, so one listing checks them all.
"""

import concurrent.futures
import dataclasses
import errno
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from sbs_jax.storage import json_files, places, user_files
from sbs_jax.storage.atomic import sync_directory

FILE = "checksums.json"
_LARGEST = 2**26  # bytes of the list: 400,000 files
_THREADS = 8  # hashing releases the GIL


@dataclasses.dataclass(frozen=True)
class _Entry:
    bytes: int
    sha256: str | None = None
    generation: int | None = None  # in a bucket

    def __post_init__(self) -> None:
        if (self.sha256 is None) == (self.generation is None):
            raise ValueError("expected a SHA-256, or the generation of an object.")


@dataclasses.dataclass(frozen=True)
class _List:
    files: dict[str, _Entry]
    sha256: str


def write(directory: Path, *, known: Mapping[str, Mapping[str, Any]] | None = None) -> int:
    """Writes the checksum file, after syncing the directory's contents and names to disk; returns the bytes listed.

    `known` has the entries of files that another process has synced and hashed. In a bucket, places.GenerationError if
    the directory has a checksum file already.
    """
    if isinstance(directory, places.BucketPath):
        return _write_generations(directory)
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / FILE)
    names = [path.relative_to(directory).as_posix() for path in files]
    theirs = {name: dict((known or {})[name]) for name in names if name in (known or {})}
    described = theirs | entries(directory, [name for name in names if name not in theirs])
    with (directory / FILE).open("w", encoding="utf-8") as file:
        json.dump({"files": described, "sha256": _of_list(described)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for folder in (directory, *(path for path in directory.rglob("*") if path.is_dir())):
        sync_directory(folder)
    return sum(entry["bytes"] for entry in described.values())


def entries(directory: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Syncs files to disk and hashes them; returns the entry of each name, {"bytes": .., "sha256": ..}."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _described(directory / name), names), strict=True))


def problem(directory: Path, *, under: Sequence[str] | None = None) -> str | None:
    """Describes the first problem of a directory, naming the damaged file; None if there is no problem.

    With `under`, checks only files in these folders.
    """
    objects = None
    try:
        if isinstance(directory, places.BucketPath):
            objects = directory.files()
        data = user_files.whole(directory / FILE, most=_LARGEST)
        value = json_files.parse_json(json_files.decoded(data, FILE), FILE)
        files = json_files.typed(value, _List).files
    except FileNotFoundError:
        return f"it is incomplete: {FILE} is missing"
    except OSError as error:
        return f"{FILE} cannot be read: {reason(error)}"
    except ValueError:
        return f"{FILE} is damaged"
    if value["sha256"] != _of_list(value["files"]) or not files:
        return f"{FILE} is damaged"
    for name in files:
        if not _is_inside(name):
            return f"{FILE} lists {json_files.brief(name)}; expected files of its own folder"
    names = [name for name in files if under is None or name.split("/")[0] in under]
    if not names:
        return f"{FILE} lists no file of {', '.join(under or ())}"
    if objects is not None:
        return next(filter(None, (_problem_of_object(objects.get(name), name, files[name]) for name in names)), None)
    # Sizes first: they cost nothing and show most damage.
    for looked_at in (_problem_of_size, _problem_of_contents):
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            for found in pool.map(lambda name, look=looked_at: look(directory / name, name, files[name]), names):
                if found is not None:
                    return json_files.part(found)
    return None


def reason(error: BaseException) -> str:
    """Describes a storage error in a few words."""
    if isinstance(error, OSError) and error.strerror:
        code = errno.errorcode.get(error.errno or 0, "")
        return f"{error.strerror}{f' ({code})' if code else ''}{f': {error.filename}' if error.filename else ''}"
    return str(error) or type(error).__name__


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def _of_list(files: Any) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _is_inside(name: str) -> bool:
    """Returns True for a relative path, in its shortest form, that stays in the folder."""
    path = PurePosixPath(name)
    return path.as_posix() == name and name != "." and not path.is_absolute() and ".." not in path.parts


def _write_generations(directory: places.BucketPath) -> int:
    files = {name: found for name, found in sorted(directory.files().items()) if name != FILE}
    described = {name: {"bytes": size, "generation": generation} for name, (size, generation) in files.items()}
    contents = json.dumps({"files": described, "sha256": _of_list(described)}, indent=1)
    (directory / FILE).write_versioned(contents.encode(), replaces=0)
    return sum(entry["bytes"] for entry in described.values())


def _problem_of_object(found: tuple[int, int] | None, name: str, listed: _Entry) -> str | None:
    if found is None:
        return f"{name} is missing"
    size, generation = found
    if size != listed.bytes:
        return f"{name} has {size} bytes; expected {listed.bytes}"
    if listed.generation in (None, generation):  # None: copied from a disk, which the bucket checked
        return None
    return f"{name} has been written again: its generation is not the recorded one"


def _problem_of_size(path: Path, name: str, listed: _Entry) -> str | None:
    try:
        size = user_files.check(path).st_size
    except (FileNotFoundError, NotADirectoryError):
        return f"{name} is missing"
    except (OSError, ValueError) as error:
        return f"{name} cannot be read: {reason(error)}"
    return None if size == listed.bytes else f"{name} has {size} bytes; expected {listed.bytes}"


def _problem_of_contents(path: Path, name: str, listed: _Entry) -> str | None:
    if listed.sha256 is None:  # copied from a bucket
        return None
    try:
        with user_files.opened(path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        return f"{name} cannot be read: {reason(error)}"
    return None if digest == listed.sha256 else f"{name} has been changed: its SHA-256 is not the recorded one"


def file_sha256(path: str | Path) -> str:
    """Returns the SHA-256 of a regular file's bytes, in hexadecimal."""
    with user_files.opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
