"""Header of a GGUF file (llama.cpp's form of a model): metadata, and the place of each tensor.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. A file
from outside can claim anything: each count is compared with the bytes that are left before it is followed. Standard
library only; weights/gguf.py reads the tensors.
"""

import dataclasses
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sbs_jax.storage import user_files
from sbs_jax.storage.json_files import brief

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_MOST_DIMENSIONS = 4
_MOST_TENSORS = 100_000
_LARGEST_HEADER = 2**28  # bytes; Gemma 3's, of 262,144 pieces, has 6 MB
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor: its shape (the last axis is contiguous), ggml's number of its type, and its first byte in the file."""

    shape: tuple[int, ...]
    kind: int
    start: int


@dataclasses.dataclass(frozen=True)
class Header:
    """Contents of a header: `metadata` by key, `tensors` by name, and the bytes of the whole file."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    size: int


def is_file(path: str | Path) -> bool:
    """Detects a GGUF file by its first bytes."""
    path = Path(path)
    if not path.is_file():
        return False
    with user_files.opened(path) as file:
        return file.read(len(MAGIC)) == MAGIC


def read(path: str | Path) -> Header:
    """Reads the header of a file. ValueError if it is damaged, or of another version."""
    with user_files.opened(path) as file:
        size = file.seek(0, 2)
        if size < 24:
            raise ValueError(f"{path} has {size} bytes; expected a GGUF file. Get it again.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Reader(data).header()
            except (struct.error, UnicodeDecodeError, OverflowError, ValueError) as error:
                raise ValueError(f"{path} is not a GGUF file that can be read: {error}. Get it again.") from None


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 0
        self._end = min(len(data), _LARGEST_HEADER)

    def header(self) -> Header:
        if self._bytes(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._scalar("I")
        if version not in _VERSIONS:
            raise ValueError(f"it is of version {version}, expected {' or '.join(map(str, _VERSIONS))}")
        tensors, pairs = self._scalar("Q"), self._scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(self._counted(pairs, least=13)):
            key = self._text()
            if key in metadata:
                raise ValueError(f"it has {brief(key)} twice")
            metadata[key] = self._value(self._scalar("I"))
        found: dict[str, tuple[tuple[int, ...], int, int]] = {}
        if tensors > _MOST_TENSORS:
            raise ValueError(f"it claims {tensors} tensors, expected at most {_MOST_TENSORS}")
        for _ in range(self._counted(tensors, least=24)):
            name, dimensions = self._text(), self._scalar("I")
            if name in found or not 1 <= dimensions <= _MOST_DIMENSIONS:
                raise ValueError(f"its tensor {brief(name)} occurs twice or has {dimensions} dimensions")
            shape = tuple(self._scalar("Q") for _ in range(dimensions))[::-1]
            found[name] = (shape, self._scalar("I"), self._scalar("Q"))
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= 2**20:
            raise ValueError(f"its alignment is {brief(alignment)}")
        first = -(-self._at // alignment) * alignment
        placed = {name: Tensor(shape, kind, first + offset) for name, (shape, kind, offset) in found.items()}
        return Header(metadata, placed, len(self._data))

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _TEXT:
            return self._text()
        if kind != _ARRAY:
            raise ValueError(f"it has a value of type {kind}")
        kind, count = self._scalar("I"), self._scalar("Q")
        if kind in _SCALARS:
            code = f"<{self._counted(count, least=struct.calcsize(_SCALARS[kind]))}{_SCALARS[kind]}"
            return list(struct.unpack(code, self._bytes(struct.calcsize(code))))
        if kind == _TEXT:
            return [self._text() for _ in range(self._counted(count, least=8))]
        raise ValueError(f"it has an array of type {kind}")  # such as arrays of arrays, which no model has

    def _text(self) -> str:
        return self._bytes(self._scalar("Q")).decode()

    def _scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._bytes(struct.calcsize(f"<{code}")))[0]

    def _bytes(self, count: int) -> bytes:
        self._counted(count, least=1)
        self._at += count
        return self._data[self._at - count : self._at]

    def _counted(self, count: int, *, least: int) -> int:
        """Requires that `count` values of at least so many bytes can follow."""
        if count * least > self._end - self._at:
            raise ValueError(f"it claims {count} values in {self._end - self._at} bytes")
        return count
