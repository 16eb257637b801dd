"""Atomic writes: a file or folder is written beside its place, then moved there."""

import contextlib
import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sbs_jax.storage import places


@contextlib.contextmanager
def replacing(path: Path, *, ours: bool = True) -> Iterator[BinaryIO]:
    """Opens `<path>.tmp`, which takes the place of `path` when the block ends without an error.

    Readers see the old file or the whole new one. Contents and name are on disk when the block has ended. After an
    error the temporary file is removed. Only one process at a time may write a path. In a folder that is not `ours`
    alone the temporary file has a name that nobody else uses, so several processes may write, the last one wins.
    """
    if places.in_bucket(path):  # an object appears as a whole
        with path.open("wb") as file:
            yield file
        return
    temporary = path.with_name(f"{path.name}.tmp" if ours else f".{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()  # it may hold the last free space
        raise
    sync_directory(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Makes a folder beside `path`, which becomes `path` when the block ends without an error and is removed otherwise.

    FileExistsError if `path` exists. For one in a bucket the block gets a local folder, which is then uploaded: a
    failure on the way leaves a part of the objects.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists already; choose another name, or remove it.")
    if places.in_bucket(path):
        with tempfile.TemporaryDirectory(prefix="sbs-jax-") as scratch:
            yield Path(scratch)
            for file in sorted(each for each in Path(scratch).rglob("*") if each.is_file()):
                places.upload(file, path / file.relative_to(scratch).as_posix())
        return
    # A name that nobody else uses: an older folder could be the user's, or that of another process.
    folder = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.incomplete")
    folder.mkdir(parents=True)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    folder.rename(path)


def replace(path: Path, contents: bytes, *, ours: bool = True) -> None:
    """Writes a whole file with `replacing`."""
    with replacing(path, ours=ours) as file:
        file.write(contents)


def move(path: Path, target: Path) -> None:
    """Moves a whole file to its place on the same file system, or in a bucket; it is there for good afterwards."""
    if places.in_bucket(target):
        places.upload(path, target)
        path.unlink()
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())
    path.replace(target)
    sync_directory(target.parent)


def write_all(descriptor: int, data: bytes, *, offset: int) -> None:
    """Writes all of `data` or raises OSError; on a nearly full disk, `os.pwrite` alone may silently write a part."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def sync_directory(path: Path) -> None:
    """Flushes a directory's file names to disk, where its file system supports that."""
    if places.in_bucket(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # mounted buckets do not support it
            raise
    finally:
        os.close(descriptor)
