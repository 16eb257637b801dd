"""Footer of a Parquet file: what its columns claim to hold, read before pyarrow takes memory for it.

pyarrow ends the process on some damaged footers when it is asked for these figures. The footer is one structure of
Thrift's compact protocol (https://github.com/apache/parquet-format). Standard library only.
"""

import dataclasses
import struct
from pathlib import Path
from typing import Any

from sbs_jax.storage import user_files

_MAGIC = b"PAR1"
_LARGEST = 2**26  # bytes of a footer
_DEEPEST = 20  # nesting of structures; Parquet's own has 6
_BYTE_ARRAY = 6
_DELTA_ENCODINGS = {5, 6, 7}
# Types of Thrift's compact protocol.
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 11, 12
# Numbers of fields: of the file, a group of rows, a column's chunk and its description.
_GROUPS, _COLUMNS, _DESCRIPTION = 4, 1, 3
_TYPE, _ENCODINGS, _PATH, _VALUES, _UNFOLDED = 1, 2, 3, 5, 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """A column in one group of rows; `path` is "choices.list.element", `unfolded` its bytes before compression."""

    path: str
    is_text: bool
    is_delta: bool
    values: int
    unfolded: int


def read(path: str | Path) -> list[Chunk]:
    """Reads the chunks of all columns and groups of rows. ValueError if the file has no such footer."""
    with user_files.opened(path) as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 8))
        end = file.read(8)
        length = int.from_bytes(end[:4], "little")
        if len(end) < 8 or end[4:] != _MAGIC or length > min(_LARGEST, size - 8):
            raise ValueError(f"{path} cannot be read as Parquet: it does not end as one. Get it again.")
        file.seek(size - 8 - length)
        data = file.read(length)
    try:
        groups = _Thrift(data).struct()[_GROUPS]
        return [_chunk(column[_DESCRIPTION]) for group in groups for column in group[_COLUMNS]]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, struct.error) as error:
        raise ValueError(f"{path} cannot be read as Parquet: its footer is damaged ({error!r:.80}).") from None


def _chunk(found: dict[int, Any]) -> Chunk:
    values, unfolded = found[_VALUES], found[_UNFOLDED]
    if type(values) is not int or type(unfolded) is not int:
        raise ValueError("sizes that are no numbers")
    return Chunk(
        path=b".".join(found[_PATH]).decode(),
        is_text=found[_TYPE] == _BYTE_ARRAY,
        is_delta=not _DELTA_ENCODINGS.isdisjoint(found[_ENCODINGS]),
        values=values,
        unfolded=unfolded,
    )


class _Thrift:
    """Reader of Thrift's compact protocol: structures as {field number: value}."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def struct(self, *, depth: int = 0) -> dict[int, Any]:
        found: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._signed()
            kind = head & 15
            found[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind, depth + 1)
        return found

    def _value(self, kind: int, depth: int) -> Any:
        if depth > _DEEPEST:
            raise ValueError("nested too deeply")
        if kind in (_TRUE, _FALSE, _BYTE):
            return self._byte()
        if kind < _DOUBLE:
            return self._signed()
        if kind == _DOUBLE:
            return self._bytes(8)
        if kind == _BINARY:
            return self._bytes(self._unsigned())
        if kind in (_LIST, _SET):
            head = self._byte()
            return self._values(head & 15, head >> 4 if head >> 4 < 15 else self._unsigned(), depth)
        if kind == _MAP:
            count = self._unsigned()
            kinds = self._byte() if count else 0
            return [
                (self._value(kinds >> 4, depth + 1), self._value(kinds & 15, depth + 1)) for _ in self._counted(count)
            ]
        if kind == _STRUCT:
            return self.struct(depth=depth)
        raise ValueError(f"a value of type {kind}")

    def _values(self, kind: int, count: int, depth: int) -> list[Any]:
        return [self._value(kind, depth + 1) for _ in self._counted(count)]

    def _counted(self, count: int) -> range:
        if count > len(self._data) - self._at:  # each takes at least a byte
            raise ValueError(f"{count} values in {len(self._data) - self._at} bytes")
        return range(count)

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _bytes(self, count: int) -> bytes:
        self._at += len(self._counted(count))
        return self._data[self._at - count : self._at]

    def _unsigned(self) -> int:
        value = shift = 0
        while shift < 70:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise ValueError("a number without end")

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
