"""Store of a teacher's soft targets: its distribution over each target token of the training rows, written once.

A store is a folder, on disk or in a bucket:

    manifest.json                     `about`: teacher, data, vocabulary, K; the shards with their SHA-256
    <task>-00000.safetensors, ..      a fixed number of a task's rows each, in the order of the records

A shard's arrays are `ids` and `log_p` [tokens, K], `log_p_rest` [tokens] (of all other ids together), and of each row
`keys`, `targets` (a hash of its target tokens) and `sizes` (its tokens). A row is found by its key, a hash of its task
and id and of the number of its rationale, never by its position.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.numpy

from sbs_jax.storage import atomic, bucket_lock, checksums, json_files, places

if TYPE_CHECKING:
    from sbs_jax.data import tokens  # imports TensorFlow, which a check of arguments must not

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LOG_P = np.dtype(np.float16)
_THREADS = 8  # hashing releases the GIL
_REMEDY = "Repeat `sbs soft_targets` with this --output to make it again"


def ids_dtype(vocabulary_size: int) -> np.dtype:
    """Returns the smallest type that holds the ids of a vocabulary."""
    return np.dtype(np.uint16 if vocabulary_size <= 2**16 else np.uint32)


def key(task: str, row_id: str, *, rationale: int = 0) -> int:
    """Hashes what tells a row from all others: its task, its record's id, and which of its rationales it has."""
    return _hash(f"{task}\0{rationale}\0{row_id}".encode(errors="surrogatepass"))


def targets_hash(ids: np.ndarray) -> int:
    """Hashes the target tokens of a row."""
    return _hash(ids.astype("<i4").tobytes())


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of a task as a shard holds them: a key, a hash and a size per row, then one entry per target token."""

    keys: np.ndarray
    targets: np.ndarray
    sizes: np.ndarray
    ids: np.ndarray
    log_p: np.ndarray
    log_p_rest: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """A finished file of a store."""

    rows: int
    tokens: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """A store's description: what its numbers depend on, and its finished shards by file name."""

    about: dict[str, Any]
    files: list[str]  # of the whole store
    shards: dict[str, Shard]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """Facts of a store that training needs: the hash and size of its vocabulary, its tasks, and K."""

    vocabulary: str | None
    vocabulary_size: int
    tasks: list[str]
    top_k: int

    @property
    def ids(self) -> np.dtype:
        """Type of the ids."""
        return ids_dtype(self.vocabulary_size)


def form(path: str | Path) -> Form:
    """Reads a store's facts; its numbers are not looked at."""
    return _form(_read_manifest(places.of(path))[0], where=path)


def sha256(path: str | Path) -> str:
    """Returns the SHA-256 of a store's manifest, which stands for all of it."""
    return _read_manifest(places.of(path))[1]


def _form(manifest: Manifest, *, where: object) -> Form:
    try:
        return json_files.typed(manifest.about, Form, extra=True)
    except ValueError as error:
        raise ValueError(f"{where}: {error} {_REMEDY}.") from None


def _read_manifest(folder: Path) -> tuple[Manifest, str]:
    """Reads a store's manifest and its SHA-256. FileNotFoundError, or ValueError for another file."""
    path = folder / MANIFEST
    if not path.exists():
        raise FileNotFoundError(f"{folder} is no store of soft targets: its {MANIFEST} is missing.")
    try:
        found = json_files.typed(json_files.read_json(path), Manifest, where=str(path))
    except ValueError as error:
        raise ValueError(f"{error} Expected what `sbs soft_targets` writes.") from None
    if strange := sorted(name for name in {*found.files, *found.shards} if Path(name).name != name):
        raise ValueError(f"{path} lists {json_files.brief(strange[0])}; expected files of its own folder.")
    return found, checksums.file_sha256(path)


def counts(folder: Path) -> dict[str, int]:
    """Sums the rows, tokens and bytes of a store's finished files."""
    shards = _read_manifest(folder)[0].shards.values()
    return {name: sum(getattr(each, name) for each in shards) for name in ("rows", "tokens", "bytes")}


def check_output(folder: Path) -> None:
    """Refuses a folder that holds something other than a store."""
    if (folder / MANIFEST).exists():
        _read_manifest(folder)
    elif folder.exists() and any(each.name != "lock" for each in folder.iterdir()):
        raise FileExistsError(f"{folder} exists and is no store of soft targets; choose another --output.")


class Writer:
    """A store that is being written, shard by shard; use it with `with`, which locks the folder.

    `missing` are the files to write. Those of an earlier process whose hash is right are kept. ValueError if the store
    is of another teacher or of other data, with the difference.
    """

    def __init__(self, folder: Path, *, about: Mapping[str, Any], files: Sequence[str]) -> None:
        self._folder, self._files = places.real(folder), [*files]
        self._about = json.loads(json.dumps(about))
        self._shards: dict[str, Shard] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Writer:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = self._stack.enter_context(bucket_lock.lock_of(self._folder, instead="another --output"))
        try:
            self._resume()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _resume(self) -> None:
        check_output(self._folder)
        if not (self._folder / MANIFEST).exists():
            self._save()
            return
        before, _ = _read_manifest(self._folder)
        changed = json_files.differences(before.about, self._about)
        if changed or before.files != self._files:
            raise ValueError(
                f"{self._folder} holds soft targets with another {'; another '.join(changed[:5]) or 'list of files'}. "
                "Repeat that command to resume it, choose another --output, or remove that folder to start again."
            )
        for name, problem in _problems(self._folder, before.shards).items():
            if problem is None:
                self._shards[name] = before.shards[name]
            else:
                log.warning("Warning: %s; it is computed again.", problem)

    @property
    def missing(self) -> list[str]:
        """Lists the files that are not written yet."""
        return [name for name in self._files if name not in self._shards]

    def add(self, name: str, rows: Rows) -> None:
        """Writes a shard, then its hash; a process that is killed between the two computes this shard again."""
        self._lock.check()
        arrays = {field.name: np.ascontiguousarray(getattr(rows, field.name)) for field in dataclasses.fields(rows)}
        data = safetensors.numpy.save(arrays)
        atomic.replace(self._folder / name, data)
        digest = hashlib.sha256(data).hexdigest()
        self._shards[name] = Shard(rows=len(rows.keys), tokens=len(rows.log_p_rest), bytes=len(data), sha256=digest)
        self._save()

    def _save(self) -> None:
        shards = {name: self._shards[name] for name in self._files if name in self._shards}
        manifest = dataclasses.asdict(Manifest(about=self._about, files=self._files, shards=shards))
        atomic.replace(self._folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def _problems(folder: Path, shards: Mapping[str, Shard]) -> dict[str, str | None]:
    """Hashes shards; returns a description of each one's problem, None if there is none."""

    def one(name: str) -> str | None:
        path = folder / name
        try:
            if checksums.file_sha256(path) == shards[name].sha256:
                return None
            return f"{path} is damaged: its SHA-256 is not the recorded one"
        except FileNotFoundError:
            return f"{path} is missing"
        except (OSError, ValueError) as error:
            return f"{path} cannot be read: {checksums.reason(error)}"

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(shards, pool.map(one, shards), strict=True))


class Store:
    """A finished store, whose arrays are mapped and read row by row. ValueError if it is unfinished or damaged.

    `sha256` stands for all of it.
    """

    def __init__(self, path: str | Path) -> None:
        folder = places.of(path)
        manifest, self.sha256 = _read_manifest(folder)
        if left := [name for name in manifest.files if name not in manifest.shards]:
            raise ValueError(
                f"{path} is unfinished: {len(left)} of its {len(manifest.files)} files are not written. Repeat the "
                "`sbs soft_targets` that was interrupted."
            )
        if places.in_bucket(folder):
            folder = places.fetched(folder, lambda names: [name for name in manifest.files if name in names])
        if problem := next(filter(None, _problems(folder, manifest.shards).values()), None):
            raise ValueError(f"{problem}. {_REMEDY}.")
        self.path, self.form = str(path), _form(manifest, where=path)
        self._files = [folder / name for name in manifest.files]
        rows = [_opened(file) for file in self._files]
        self._arrays = [[file.get_slice(name) for name in _OF_TOKENS] for file in rows]
        self._first = np.cumsum([0, *(manifest.shards[name].tokens for name in manifest.files)])
        keys, self._targets, sizes = (
            np.concatenate([file.get_tensor(name) for file in rows]) for name in ("keys", "targets", "sizes")
        )
        self._order = np.argsort(keys, kind="stable")
        self._keys, self._sizes = keys[self._order], sizes.astype(np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes

    def find(self, task: str, row_ids: Sequence[str], targets: tokens.TokenTable, *, length: int) -> np.ndarray:
        """Returns the first token in the store of each row of a task, int64 [n]; its others follow.

        ValueError names the first row that is not in the store, or whose target tokens, truncated to `length`, are not
        those that the teacher was given.
        """
        wanted = np.array([key(task, row_id) for row_id in row_ids], np.uint64)
        places_N = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        found_N = self._order[places_N]
        for number in np.flatnonzero(self._keys[places_N] != wanted)[:1]:
            raise ValueError(
                f"{self.path} has no soft targets of the row {json_files.brief(row_ids[number])} of {task}. Write them "
                "for these records: `sbs soft_targets --records_dir`, with the data options of the teacher's run."
            )
        for number, place in enumerate(found_N.tolist()):
            ids = targets.row(number, length=length)
            if len(ids) != self._sizes[place] or targets_hash(ids) != self._targets[place]:
                raise ValueError(
                    f"{self.path} has soft targets of another text for the row {json_files.brief(row_ids[number])} of "
                    f"{task} than {len(ids)} tokens of this run. Train on the records, label source and lengths that "
                    "the teacher was given, or write the soft targets again."
                )
        return self._starts[found_N]

    def read(self, starts: Sequence[int], sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Reads ids [n, K], log_p [n, K] and log_p_rest [n] of `sizes` tokens each from `starts` on."""
        top_k = self.form.top_k
        empty = (np.zeros((0, top_k), self.form.ids), np.zeros((0, top_k), LOG_P))
        parts: list[Sequence[np.ndarray]] = [(*empty, np.zeros(0, LOG_P))]
        for start, size, file in zip(
            starts, sizes, (np.searchsorted(self._first, starts, side="right") - 1).tolist(), strict=True
        ):
            begin = start - int(self._first[file])
            parts.append([array[begin : begin + size] for array in self._arrays[file]])
        ids, log_p, rest = (np.concatenate(each) for each in zip(*parts, strict=True))
        return ids, log_p, rest


_OF_TOKENS = ("ids", "log_p", "log_p_rest")


def _opened(file: Path) -> Any:
    """Opens a shard, whose arrays are mapped."""
    try:
        return safetensors.safe_open(file, framework="np")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} cannot be read ({json_files.part(str(error))}). {_REMEDY}.") from None
