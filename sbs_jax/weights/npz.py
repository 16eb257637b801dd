"""Parameters in one `.npz` file, the form of the embedded student: a zip file with NumPy's array for each name."""

import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sbs_jax.storage.json_files import part
from sbs_jax.student import t5
from sbs_jax.weights import names

_END = ".npy"
# What the readers of zip files and of NumPy's headers raise where a file is damaged.
_DAMAGE = (
    *(zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, SyntaxError),
    *(tokenize.TokenError, struct.error, OSError, ValueError, TypeError, KeyError, OverflowError, MemoryError),
)


def arrays(path: str | Path, *, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The arrays of a file, by name; they must be those of `shapes`.

    ValueError, before an array is read, where a member is anything else: of another name or shape, of objects (which
    are pickles, and run when they are read), of another size than the file says of it. FileNotFoundError where there is
    no file.
    """
    try:
        archive = zipfile.ZipFile(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"No parameters at {path}; expected an .npz file or a run directory.") from None
    except _DAMAGE as error:
        raise _refused(path, error) from None
    with archive:
        try:
            members = {info.filename.removesuffix(_END): info for info in archive.infolist()}
            found = {name: _shape(archive, info) for name, info in members.items()}
        except _DAMAGE as error:
            raise _refused(path, error) from None
        names.check(path, found, shapes, kind="npz")
        try:
            return {name: _read(archive, info) for name, info in members.items()}
        except _DAMAGE as error:
            raise _refused(path, error) from None


def _refused(path: object, error: Exception) -> ValueError:
    told = part(str(error)) or type(error).__name__
    return ValueError(f"{path} is no whole file of parameters ({told}). Get it anew.")


def _shape(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[int, ...]:
    """The shape that a member's header tells, of numbers that take just what is left of the member."""
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
    return shape


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def save_npz(path: str | Path, parameters: t5.Parameters, *, dtype: str) -> None:
    """Writes parameters as one `.npz` of the given float type (the form of the embedded student)."""
    arrays = {name: np.asarray(x).astype(dtype) for name, x in sorted(parameters.items())}
    np.savez_compressed(path, allow_pickle=False, **arrays)
