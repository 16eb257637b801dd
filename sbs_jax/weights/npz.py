"""Parameters in one `.npz` file, the form of the embedded student: a zip file with NumPy's array for each name."""

import functools
import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np

from sbs_jax.storage.json_files import part
from sbs_jax.student import t5
from sbs_jax.weights.arrays import LazyArray, Opened

_END = ".npy"
# What the readers of zip files and of NumPy's headers raise where a file is damaged.
_DAMAGE = (
    *(zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, SyntaxError),
    *(tokenize.TokenError, struct.error, OSError, ValueError, TypeError, KeyError, OverflowError, MemoryError),
)


def is_file(path: str | Path) -> bool:
    """Recognises a file by its name."""
    return str(path).endswith(".npz")


def open_file(path: str | Path) -> Opened:
    """Opens the arrays of a file, by name; the architecture is not stored there.

    ValueError, before an array is read, for a member that is anything but an array of numbers: objects (pickles run
    when they are read), or another size than the header says. Reading an array raises ValueError where it is damaged.
    """
    try:
        archive = zipfile.ZipFile(path)
        members = {info.filename.removesuffix(_END): info for info in archive.infolist()}
        headers = {name: _header(archive, info) for name, info in members.items()}
    except _DAMAGE as error:
        raise _refused(path, error) from None

    @functools.lru_cache(maxsize=1)  # the shards of one array come one after the other
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
    told = part(str(error)) or type(error).__name__
    return ValueError(f"{path} is no whole file of parameters ({told}). Get it anew.")


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
            raise ValueError(
                f"{info.filename} is said to be {dtype} {shape} in {info.file_size} bytes, which cannot be"
            )
    return shape, dtype


def save_npz(path: str | Path, parameters: t5.Parameters, *, dtype: str) -> None:
    """Writes parameters as one `.npz` of the given float type (the form of the embedded student)."""
    arrays = {name: np.asarray(x).astype(dtype) for name, x in sorted(parameters.items())}
    np.savez_compressed(path, allow_pickle=False, **arrays)
