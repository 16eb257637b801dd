"""Paths on disk and on Google Cloud Storage, behind pathlib's interface.

`of("gs://bucket/run") / "manifest.json"` is a `BucketPath`, which reads and writes whole objects; any other text is a
`pathlib.Path`. Folders of a bucket are only the beginnings of names: making one does nothing, and one exists while it
holds an object. There is no rename without copying, so nothing here relies on one.

Credentials are the platform's default ones; without any, public buckets can be read. STORAGE_EMULATOR_HOST names a
local emulator, which needs none.
"""

import contextlib
import fnmatch
import functools
import hashlib
import io
import itertools
import os
import pathlib
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from google.cloud import storage

SCHEME = "gs:"
_PATIENCE = 15  # seconds in which a request is repeated after 429, 5xx or a lost connection
_TIMEOUT = 30  # seconds without an answer to one request


class StorageError(OSError):
    """A request to a bucket failed, and so did its repetitions."""


class GenerationError(OSError):
    """Another process has changed the object."""


def of(path: str | os.PathLike[str]) -> Path:
    """Returns the path that a text means, in a bucket or on disk."""
    if isinstance(path, BucketPath):
        return path
    return BucketPath(path) if str(path).startswith(f"{SCHEME}//") else Path(path)


def in_bucket(path: str | os.PathLike[str]) -> bool:
    """Returns True for `gs://..`."""
    return isinstance(path, BucketPath) or str(path).startswith(f"{SCHEME}//")


def real(path: str | os.PathLike[str]) -> Path:
    """Returns the path without links: what is locked or written under two names must be one path."""
    return of(path) if in_bucket(path) else Path(os.path.realpath(path))


def walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yields (folder, names of its folders, names of its files), as os.walk does; the caller may drop folders."""
    if not isinstance(folder, BucketPath):
        yield from ((Path(place), names, files) for place, names, files in os.walk(folder))
        return
    folders, objects = folder.children()
    yield folder, folders, objects
    for name in folders:
        yield from walk(folder / name)


def user_cache() -> Path:
    """Returns this package's folder below the user's cache; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sbs_jax"


class BucketPath(type(Path())):  # the class of this platform's paths
    """`gs://<bucket>/<name>`: an object, or the beginning of the names of some.

    Methods that it does not define raise io.UnsupportedOperation, because pathlib asks for the local path. Errors are
    those of files: FileNotFoundError, PermissionError, and StorageError for any other.
    """

    def __str__(self) -> str:
        if self.parts[:1] != (SCHEME,):  # relative to another one
            return "/".join(self.parts)
        return f"{SCHEME}//{'/'.join(self.parts[1:])}"

    def __fspath__(self) -> str:
        raise io.UnsupportedOperation(f"{self} is in a bucket; expected a local path.")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def as_posix(self) -> str:
        return str(self)

    # ------------------------------------------------------------------ where

    def is_absolute(self) -> bool:
        return True

    def absolute(self) -> "BucketPath":
        return self

    def resolve(self, strict: bool = False) -> "BucketPath":
        return self

    def expanduser(self) -> "BucketPath":
        return self

    @property
    def _bucket(self) -> "storage.Bucket":
        if len(self.parts) < 2:
            raise ValueError(f"{self} names no bucket; expected gs://<bucket>/<folder>.")
        return client().bucket(self.parts[1])

    @property
    def _name(self) -> str:
        return "/".join(self.parts[2:])

    @property
    def _beginning(self) -> str:
        """The beginning of the names below."""
        return f"{self._name}/" if self._name else ""

    def _blob(self) -> "storage.Blob":
        return self._bucket.blob(self._name)

    # ------------------------------------------------------------------ what is there

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        with _explained(self):
            return bool(self._name) and self._blob().exists(timeout=_TIMEOUT, retry=_retry())

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        return any(True for _ in self._listed(most=1))

    def is_symlink(self) -> bool:
        return False

    def samefile(self, other_path: Any) -> bool:
        return str(self) == str(other_path)

    def iterdir(self) -> Iterator["BucketPath"]:
        """Yields objects and folders directly below, by name; none of a folder that is not there."""
        for name in sorted({*itertools.chain(*self.children())}):
            yield self / name

    def children(self) -> tuple[list[str], list[str]]:
        """Lists the names of the folders and of the objects directly below."""
        with _explained(self):
            found = self._bucket.list_blobs(prefix=self._beginning, delimiter="/", timeout=_TIMEOUT, retry=_retry())
            objects = [blob.name.rpartition("/")[2] for blob in found]
            folders = [prefix.rstrip("/").rpartition("/")[2] for prefix in found.prefixes]
        return sorted(folders), sorted(filter(None, objects))

    def files(self) -> dict[str, tuple[int, int]]:
        """Returns (bytes, generation) of every object below, by its name relative to this folder: one listing.

        Empty objects that stand for folders, as Google's console makes them, are left out.
        """
        start = len(self._beginning)
        found = self._listed()
        return {name[start:]: (size, generation) for name, size, generation in found if not name.endswith("/")}

    def glob(self, pattern: str, **_: Any) -> Iterator["BucketPath"]:
        """Yields the objects below whose relative name has this pattern, part by part; no `**`."""
        wanted = pattern.split("/")
        for name in self.files():
            parts = name.split("/")
            if len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted)):
                yield self / name

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Returns the size of an object, as of a regular file; its generation is the time, in nanoseconds."""
        with _explained(self):
            blob = self._bucket.get_blob(self._name, timeout=_TIMEOUT, retry=_retry()) if self._name else None
        if blob is None:
            if self.is_dir():
                return os.stat_result((stat.S_IFDIR | 0o755, 0, 0, 1, 0, 0, 0, 0, 0, 0))
            raise FileNotFoundError(f"there is no object {self}, or no such bucket")
        seconds = int(blob.updated.timestamp()) if blob.updated else 0
        fields = (stat.S_IFREG | 0o644, 0, 0, 1, 0, 0, blob.size or 0, seconds, seconds, seconds)
        return os.stat_result(fields, {"st_mtime_ns": int(blob.generation or 0)})

    def _listed(self, *, most: int | None = None) -> Iterator[tuple[str, int, int]]:
        with _explained(self):
            found = self._bucket.list_blobs(prefix=self._beginning, max_results=most, timeout=_TIMEOUT, retry=_retry())
            for blob in found:
                yield blob.name, blob.size or 0, int(blob.generation or 0)

    # ------------------------------------------------------------------ reading

    def open(
        self,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> Any:
        """Opens an object for reading, in pieces, or for writing as a whole when the file is closed."""
        if mode == "rb":
            return io.BufferedReader(_Reader(self))
        if mode == "wb":
            return _Writer(self)
        if mode in ("r", "w"):
            return io.TextIOWrapper(self.open(f"{mode}b"), encoding or "utf-8", errors, newline)
        raise io.UnsupportedOperation(f"{self} is in a bucket and cannot be opened with mode {mode!r}.")

    def read_bytes(self) -> bytes:
        return self.read_versioned()[0]

    def read_text(self, encoding: str | None = None, errors: str | None = None, newline: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def read_versioned(self) -> tuple[bytes, int]:
        """Returns the contents and their generation. FileNotFoundError if there is no object."""
        with _explained(self):
            blob = self._blob()
            data = blob.download_as_bytes(timeout=_TIMEOUT, retry=_retry())
            return data, int(blob.generation or 0)

    # ------------------------------------------------------------------ writing

    def write_bytes(self, data: Any) -> int:
        self.write_versioned(bytes(data))
        return len(data)

    def write_text(
        self, data: str, encoding: str | None = None, errors: str | None = None, newline: str | None = None
    ) -> int:
        self.write_versioned(data.encode(encoding or "utf-8", errors or "strict"))
        return len(data)

    def write_versioned(self, data: bytes, *, replaces: int | None = None) -> int:
        """Writes a whole object and returns its generation.

        `replaces` is the generation that it may replace, 0 for none; GenerationError if there is another one. A
        repeated request may find its own first one there: read the object to know.
        """
        with _explained(self):
            blob = self._blob()
            blob.upload_from_string(
                data,
                content_type="application/octet-stream",
                if_generation_match=replaces,
                timeout=_TIMEOUT,
                retry=_retry(),
            )
            return int(blob.generation or 0)

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        if not exist_ok and self.exists():
            raise FileExistsError(f"{self} exists already.")

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            with _explained(self):
                self._blob().delete(timeout=_TIMEOUT, retry=_retry())
        except FileNotFoundError:
            if not missing_ok:
                raise

    def remove_tree(self, *, first: str | None = None) -> None:
        """Removes every object below; the one named `first` before the others."""
        names = sorted(self.files(), key=lambda name: name != first)
        for name in names:
            (self / name).unlink(missing_ok=True)

    def copy_tree(self, target: "BucketPath") -> None:
        """Copies every object below to another folder of buckets, without their passing through this machine."""
        for name in self.files():
            to = target / name
            with _explained(self):
                source = (self / name)._blob()
                self._bucket.copy_blob(source, to._bucket, to._name, timeout=_TIMEOUT, retry=_retry())

    def rename(self, target: Any) -> Any:
        raise io.UnsupportedOperation(f"{self} is in a bucket, where nothing can be renamed.")

    replace = rename


def fetched(path: Path, choose: Callable[[Collection[str]], Sequence[str]] | None = None) -> Path:
    """Returns a copy in the user's cache of an object, or of those directly in a folder that `choose` picks.

    It is fetched again when the bucket has another generation. FileNotFoundError if there is nothing to fetch.
    """
    assert isinstance(path, BucketPath)
    folder = path if choose is not None else path.parent
    names = [path.name] if choose is None else choose(folder.children()[1])
    generations = {name: (folder / name).stat().st_mtime_ns for name in names}
    if not generations:
        raise FileNotFoundError(f"there is nothing to read in {path}")
    known = hashlib.sha256(f"{folder} {sorted(generations.items())}".encode()).hexdigest()[:32]
    place = user_cache() / "buckets" / known
    place.mkdir(parents=True, exist_ok=True)
    for name in names:
        if not (place / name).exists():
            partial = place / f"{name}.{os.getpid()}.partial"
            with _explained(folder / name):
                (folder / name)._blob().download_to_filename(str(partial), timeout=_TIMEOUT, retry=_retry())
            partial.replace(place / name)
    return place if choose is not None else place / path.name


def upload(file: Path, target: Path) -> None:
    """Writes a local file to an object, in pieces."""
    assert isinstance(target, BucketPath)
    with _explained(target):
        target._blob().upload_from_filename(str(file), timeout=_TIMEOUT, retry=_retry())


class _Reader(io.RawIOBase):
    """Reads an object in pieces, all of one generation."""

    _PIECE = 2**23

    def __init__(self, path: BucketPath) -> None:
        self._path, self._at, self._piece, self._start = path, 0, b"", 0
        with _explained(path):
            blob = path._bucket.get_blob(path._name, timeout=_TIMEOUT, retry=_retry())
        if blob is None:
            raise FileNotFoundError(f"there is no object {path}, or no such bucket")
        self._blob, self.size = blob, int(blob.size or 0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self.size - self._at)
        if count <= 0:
            return 0
        if not self._start <= self._at < self._start + len(self._piece):
            self._fetch(max(count, self._PIECE))
        begin = self._at - self._start
        data = self._piece[begin : begin + count]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _fetch(self, count: int) -> None:
        end = min(self._at + count, self.size) - 1
        with _explained(self._path):
            self._piece = self._blob.download_as_bytes(
                start=self._at,
                end=end,
                if_generation_match=self._blob.generation,
                timeout=_TIMEOUT,
                retry=_retry(),
                checksum="auto",
            )
        self._start = self._at


class _Writer(io.BytesIO):
    """Contents of an object, which is written when this is closed; not after an error in a `with` block."""

    def __init__(self, path: BucketPath) -> None:
        super().__init__()
        self._path, self._failed = path, False

    def __exit__(self, kind: Any, *_: object) -> None:
        self._failed = kind is not None
        self.close()

    def close(self) -> None:
        contents = None if self.closed or self._failed else self.getvalue()
        super().close()  # first: nothing may be written twice
        if contents is not None:
            self._path.write_bytes(contents)

    def __del__(self) -> None:
        self._failed = True  # nobody closed it


@functools.cache
def _client_of(process: int) -> "storage.Client":
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud import storage

    try:
        return storage.Client()
    except DefaultCredentialsError:
        return storage.Client.create_anonymous_client()


def client() -> "storage.Client":
    """Returns this process's connection to Cloud Storage."""
    return _client_of(os.getpid())


def _retry() -> Any:
    from google.cloud.storage.retry import DEFAULT_RETRY

    return DEFAULT_RETRY.with_timeout(_PATIENCE)


@contextlib.contextmanager
def _explained(path: pathlib.PurePath) -> Iterator[None]:
    """Turns the errors of requests into those of files, with the path."""
    import requests
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError

    try:
        yield
    except exceptions.NotFound:
        raise FileNotFoundError(f"there is no object {path}, or no such bucket") from None
    except (exceptions.Forbidden, exceptions.Unauthorized) as error:
        raise PermissionError(f"no permission for {path}: {_words(error)}") from None
    except exceptions.PreconditionFailed:
        raise GenerationError(f"{path} was changed by another process meanwhile") from None
    except (exceptions.GoogleAPIError, GoogleAuthError, requests.RequestException, ConnectionError) as error:
        raise StorageError(f"{path}: {_words(error)}") from None


def _words(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    return str(getattr(cause, "message", None) or cause)[:300].rstrip(".") or type(error).__name__
