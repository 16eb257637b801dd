"""Models of the Hugging Face Hub by name, such as "google/t5-v1_1-base" or "google/t5-v1_1-base@<revision>".

The package `huggingface_hub` fetches files into its own cache; it is imported at the first use. A name with a commit as
its revision always means the same files, and needs no network once they are in the cache.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import logging
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from sbs_jax.storage.json_files import part

log = logging.getLogger(__name__)

_NAME = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(@(?P<revision>[\w.-]{1,200}))?", re.ASCII
)
_TIMEOUT = 30.0  # seconds without an answer of the hub
_COMMIT = re.compile(r"[0-9a-f]{40}")
# A missing path with such an ending is a missing file, and no model.
_FILES = (".bin", ".gguf", ".gz", ".json", ".jsonl", ".model", ".msgpack", ".npz", ".safetensors")
# Patterns of all files that students are made of, for the command line that downloads them.
_PATTERNS = ("*.json", "spiece.model", "*.safetensors", "*.msgpack")

# Picks from the names of a repository's files those to fetch; () if it lacks what is needed.
Choose = Callable[[Collection[str]], Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Name:
    """A model of the hub; `revision` is a branch, a tag or a commit, None for the newest."""

    repository: str
    revision: str | None

    @property
    def is_pinned(self) -> bool:
        """True if the revision is a commit."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def parse(text: str) -> Name | None:
    """Reads a name; None for a path that exists, or might in a folder that does, and for a text that can be no name."""
    match = _NAME.fullmatch(text)
    if match is None or text.lower().endswith(_FILES) or Path(text).exists():
        return None
    name = Name(match["repository"], match["revision"])
    return name if name.is_pinned or not Path(text).parent.is_dir() else None


def check_installed(text: str, *, owner: str) -> None:
    """Requires huggingface_hub for a name; FileNotFoundError says how to download it. `owner` begins the message."""
    name = parse(text)
    if name is not None and importlib.util.find_spec("huggingface_hub") is None:
        raise _missing(name, f"{owner} is {text!r}, where nothing is.")


def pinned(text: str, *, known: str | None = None) -> str:
    """Returns a name with its commit, "google/t5-v1_1-base@<commit>"; other texts as they are.

    `known`, a name with its commit, is returned if it is of the same repository and `text` has no revision. Raises the
    errors of `folder`.
    """
    name = parse(text)
    if name is None or name.is_pinned:
        return text
    before = parse(known) if known else None
    if before is not None and before.is_pinned and (before.repository, None) == (name.repository, name.revision):
        return str(before)
    return str(Name(name.repository, _listing(name).commit))


def folder(text: str, choose: Choose, *, needed: str) -> str:
    """Returns the local folder of a model, with the chosen files; other texts as they are.

    `needed` says in an error what `choose` looks for. FileNotFoundError for an unknown name, a repository without these
    files, or a missing package; ConnectionError if the hub cannot be asked and the cache has no copy; PermissionError
    for a gated model.
    """
    name = parse(text)
    return text if name is None else _fetched(name, choose, needed)


@functools.cache
def _fetched(name: Name, choose: Choose, needed: str) -> str:
    held = _held(name) if name.is_pinned else None
    if held is not None and choose(held.files):
        return str(held.folder)
    found = _listing(name)
    files = choose(found.files)
    if not files:
        where = "the cache" if found.folder else "the Hugging Face Hub"
        raise FileNotFoundError(
            f"{name} has no {needed} in {where}; it has {part(', '.join(sorted(found.files))) or 'no files'}. "
            + ("Repeat this with a connection." if found.folder else "Give another model or revision.")
        )
    if found.folder is not None:
        return str(found.folder)
    library = _library(name)
    try:
        return library.snapshot_download(name.repository, revision=found.commit, allow_patterns=list(files))
    except Exception as error:  # of several HTTP libraries
        raise _explained(name, error) from error


@dataclasses.dataclass(frozen=True)
class _Listing:
    """The files of a commit; `folder` holds them if they were found in the cache."""

    commit: str
    files: tuple[str, ...]
    folder: Path | None = None


def _listing(name: Name) -> _Listing:
    """Asks the hub for the files of a model; without a connection, looks into the cache."""
    library = _library(name)
    try:
        info = library.HfApi().model_info(name.repository, revision=name.revision, timeout=_TIMEOUT)
    except Exception as error:  # of several HTTP libraries
        explained = _explained(name, error)
        held = _held(name) if isinstance(explained, ConnectionError) else None
        if held is None:
            raise explained from error
        log.warning("%s: the hub was not asked (%s); using commit %s of the cache.", name, _reason(error), held.commit)
        return held
    return _Listing(info.sha, tuple(each.rfilename for each in info.siblings or ()))


def _held(name: Name) -> _Listing | None:
    """Looks for a model in the cache of `huggingface_hub`; None if it is not there.

    Without a revision it is the commit that the cache knows as the newest, or the one fetched last.
    """
    library = _library(name)
    try:
        found = Path(
            library.snapshot_download(name.repository, revision=name.revision, local_files_only=True, allow_patterns=[])
        )
    except library.errors.LocalEntryNotFoundError:
        if name.revision is not None:
            return None
        commits = _cached_commits(library, name)
        if not commits:
            return None
        found = Path(max(commits, key=lambda each: each.last_modified).snapshot_path)
    return _Listing(found.name, tuple(path.name for path in found.iterdir() if path.is_file()), found)


def _cached_commits(library: Any, name: Name) -> list[Any]:
    try:
        repositories = library.scan_cache_dir().repos
    except library.errors.CacheNotFound:
        return []
    return [each for found in repositories if found.repo_id == name.repository for each in found.revisions]


def _library(name: Name) -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ModuleNotFoundError as error:
        raise _missing(name, f"There is no {name} here.") from error


def _missing(name: Name, beginning: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"{beginning} If it is a model of the Hugging Face Hub, install huggingface_hub and repeat this: pip install "
        f"huggingface_hub. Or download it elsewhere, and give its folder: {_download(name)}"
    )


def _download(name: Name) -> str:
    """Returns the command line that downloads a model."""
    revision = f" --revision {name.revision}" if name.revision else ""
    patterns = " ".join(f"--include '{each}'" for each in _PATTERNS)
    return f"hf download {name.repository}{revision} {patterns} --local-dir {name.repository.rpartition('/')[2]}"


def _explained(name: Name, error: Exception) -> OSError:
    """Turns an error of `huggingface_hub` into one for the user; ConnectionError if the hub could not answer."""
    errors = _library(name).errors
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return PermissionError(
            f"{name.repository} is gated: accept its terms on https://huggingface.co/{name.repository}, log in with "
            "`hf auth login` (or set HF_TOKEN), and repeat this."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(f"{name.repository} has no revision {name.revision!r}; give a branch, tag or commit.")
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403, 404):
        return FileNotFoundError(
            f"There is no {name.repository} here, and no such model on the Hugging Face Hub ({_reason(error)}). Check "
            "the path, or the name (owner/name); for a private model, log in with `hf auth login`."
        )
    return ConnectionError(
        f"There is no {name.repository} here, and the Hugging Face Hub cannot be asked ({_reason(error)}). Repeat this "
        f"with a connection, or download it elsewhere and give its folder: {_download(name)}"
    )


def _reason(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return f"HTTP {status}" if status else part(str(error).partition("\n")[0]) or type(error).__name__
