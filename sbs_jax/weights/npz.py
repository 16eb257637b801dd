"""Parameters in one `.npz` file, the form of the built-in student: a zip file with one NumPy array per name."""

import functools
import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np

from sbs_jax.storage import user_files
from sbs_jax.storage.json_files import part
from sbs_jax.student import families
from sbs_jax.weights.arrays import LazyArray, Opened

_END = ".npy"
# Errors that the readers of zip files and NumPy headers raise for damaged files.
_DAMAGE = (
    *(zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, SyntaxError),
    *(tokenize.TokenError, struct.error, OSError, ValueError, TypeError, KeyError, OverflowError, MemoryError),
)


def is_file(path: str | Path) -> bool:
    """Detects an `.npz` file by its name."""
    return str(path).endswith(".npz")


def open_file(path: str | Path) -> Opened:
    """Opens the arrays of a file; the form does not store the architecture.

    ValueError, before an array is read, for any member that is not an array of numbers (objects are pickles, which run
    code when read) or whose size contradicts its header. Reading a damaged array raises ValueError too.
    """
    user_files.check(path)
    try:
        archive = zipfile.ZipFile(path)
        members = {info.filename.removesuffix(_END): info for info in archive.infolist()}
        headers = {name: _header(archive, info) for name, info in members.items()}
    except _DAMAGE as error:
        raise _refused(path, error) from None

    @functools.lru_cache(maxsize=1)  # shards of an array are read in a row; decompress it once
    def member(name: str) -> np.ndarray:
        try:
            with archive.open(members[name]) as file:
                return np.lib.format.read_array(file, allow_pickle=False)
        except _DAMAGE as error:
            raise _refused(path, error) from None

    def lazy(name: str, shape: tuple[int, ...], dtype: np.dtype) -> LazyArray:
        return LazyArray(shape, dtype, lambda index: member(name)[index])

    return Opened(None, {name: lazy(name, *header) for name, header in headers.items()})


def _refused(path: object, error: Exception) -> ValueError:
    reason = part(str(error)) or type(error).__name__
    return ValueError(f"{path} is not a complete file of parameters ({reason}). Get it again.")


def _header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype]:
    """Reads the shape and type in a member's header. ValueError unless they account for every byte of the member."""
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{info.filename} is of the version {version}; expected 1.0 or 2.0")
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(file)
        size = math.prod(shape) * dtype.itemsize
        if dtype.kind not in "fiu" or min(shape, default=0) < 0 or file.tell() + size != info.file_size:
            raise ValueError(f"{info.filename} claims to be {dtype} {shape} in {info.file_size} bytes")
    return shape, dtype


def save_npz(path: str | Path, parameters: families.Parameters, *, dtype: str) -> None:
    """Writes parameters as one `.npz` file in the given float type."""
    arrays = {name: np.asarray(x).astype(dtype) for name, x in sorted(parameters.items())}
    np.savez_compressed(path, allow_pickle=False, **arrays)
