"""Checksums of a directory: one JSON file in it lists every other file with its size and SHA-256.

A directory without this file is incomplete. The file also has its own hash, so damage to it is detected. Files
added later are ignored.
"""

import concurrent.futures
import errno
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sbs_jax.storage import user_files
from sbs_jax.storage.atomic import sync_directory

FILE = "checksums.json"
_THREADS = 8  # hashing releases the GIL


def write(directory: Path) -> int:
    """Writes the checksum file, after syncing the directory's contents and names to disk; returns the bytes listed."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / FILE)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        described = dict(
            zip((path.relative_to(directory).as_posix() for path in files), pool.map(_described, files), strict=True)
        )
    with (directory / FILE).open("w", encoding="utf-8") as file:
        json.dump({"files": described, "sha256": _of_list(described)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for folder in (directory, *(path for path in directory.rglob("*") if path.is_dir())):
        sync_directory(folder)
    return sum(entry["bytes"] for entry in described.values())


def problem(directory: Path, *, under: Sequence[str] | None = None) -> str | None:
    """Describes the first problem of a directory, naming the damaged file; None if there is no problem.

    With `under`, checks only files in these folders.
    """
    try:
        text = (directory / FILE).read_bytes()
    except FileNotFoundError:
        return f"it is incomplete: {FILE} is missing"
    except OSError as error:
        return f"{FILE} cannot be read: {reason(error)}"
    try:
        whole = json.loads(text)
        files: dict[str, dict[str, Any]] = whole["files"]
        good = whole["sha256"] == _of_list(files) and len(files) > 0
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        good, files = False, {}
    if not good:
        return f"{FILE} is damaged"
    names = [name for name in files if under is None or name.split("/")[0] in under]
    if not names:
        return f"{FILE} lists no file of {', '.join(under or ())}"
    # Sizes first: they cost nothing and show most damage.
    for looked_at in (_problem_of_size, _problem_of_contents):
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            for found in pool.map(lambda name, look=looked_at: look(directory / name, name, files[name]), names):
                if found is not None:
                    return found
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


def _problem_of_size(path: Path, name: str, listed: dict[str, Any]) -> str | None:
    try:
        if path.is_dir():
            return f"{name} is a directory; expected a file"
        size = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {reason(error)}"
    return None if size == listed["bytes"] else f"{name} has {size} bytes; expected {listed['bytes']}"


def _problem_of_contents(path: Path, name: str, listed: dict[str, Any]) -> str | None:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"{name} cannot be read: {reason(error)}"
    return None if digest == listed["sha256"] else f"{name} has been changed: its SHA-256 is not the recorded one"


def file_sha256(path: str | Path) -> str:
    """Returns the SHA-256 of a regular file's bytes, in hexadecimal."""
    with user_files.opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
