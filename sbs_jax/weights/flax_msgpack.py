"""Files of weights that transformers' Flax models saved (`flax_model.msgpack`), mapped and read by slices.

They are msgpack: maps of names, nested, with an array at the end, which Flax stores as its extension 1, again msgpack:
(shape, name of the type, bytes). `flax.serialization` needs memory for twice the file and checks no claim.

    {"encoder": {"block": {"0": {"layer": {"0": {"SelfAttention": {"q": {"kernel": [D, H K]}, ..}, ..}}}}}, ..}

Names and layout are brought to those of PyTorch's files, so that one table serves both: `encoder.block.0...q.weight`,
`[H K, D]`.
"""

import contextlib
import math
import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sbs_jax.storage import user_files
from sbs_jax.storage.json_files import brief, part
from sbs_jax.weights import tensor_files
from sbs_jax.weights.arrays import Index, LazyArray

_ARRAY = 1  # Flax's extension
_CHUNKED = "__msgpack_chunked_array__"  # marks a map that stands for an array above 2^30 bytes
_DEEPEST = 20  # maps inside maps
_MOST = 2**20  # entries of a map
_LONGEST = 2**31  # numbers along an axis
_DTYPES = {np.dtype(each).name: np.dtype(each) for each in tensor_files.DTYPES.values()}
_LAST = {"kernel": "weight", "embedding": "weight"}
# First bytes of an item that carries its size in the next bytes: (kind, bytes of the size).
_SIZED = {
    0xC4: ("bytes", 1),
    0xC5: ("bytes", 2),
    0xC6: ("bytes", 4),
    0xC7: ("extension", 1),
    0xC8: ("extension", 2),
    0xC9: ("extension", 4),
    0xCC: ("number", 1),
    0xCD: ("number", 2),
    0xCE: ("number", 4),
    0xCF: ("number", 8),
    0xD9: ("text", 1),
    0xDA: ("text", 2),
    0xDB: ("text", 4),
    0xDC: ("list", 2),
    0xDD: ("list", 4),
    0xDE: ("map", 2),
    0xDF: ("map", 4),
}
# Ranges of first bytes that hold the size, or the number itself.
_SHORT = {"number": range(0x80), "map": range(0x80, 0x90), "list": range(0x90, 0xA0), "text": range(0xA0, 0xC0)}
_FIXED = range(0xD4, 0xD9)  # extensions of 1, 2, 4, 8 and 16 bytes


def torch_name(name: str) -> str:
    """Returns PyTorch's name of an array.

    >>> torch_name("encoder/block/0/layer/0/SelfAttention/q/kernel")
    'encoder.block.0.layer.0.SelfAttention.q.weight'
    """
    *parents, last = name.split("/")
    return ".".join([*parents, _LAST.get(last, last)])


def read(file: Path) -> dict[str, LazyArray]:
    """Opens the arrays of a file, under PyTorch's names and in its layout. ValueError if it is damaged."""
    with user_files.opened(file) as opened:
        try:
            data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise ValueError(f"{file} is empty. Get it again.") from None
    try:
        found = {}
        for name, array in _Items(data).arrays():
            theirs = torch_name(name)
            if theirs in found:
                raise _DamageError(f"{brief(theirs)} stands there twice")
            found[theirs] = array.transposed() if name.endswith("/kernel") else array
    except _DamageError as error:
        raise ValueError(f"{file} is not a complete file of Flax's weights ({error}). Get it again.") from None
    return found


class _DamageError(ValueError):
    """A file that contradicts itself or ends too early."""


class _Items:
    """The items of a mapped msgpack file, read one after the other; every size is checked against the file's."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 0

    def arrays(self) -> Iterator[tuple[str, LazyArray]]:
        """Yields every array and its name, which joins those of the maps around it by "/"."""
        yield from self._map("", deep=0)
        if self._at != len(self._data):
            raise _DamageError(f"{len(self._data) - self._at} bytes follow its end")

    def _map(self, prefix: str, *, deep: int) -> Iterator[tuple[str, LazyArray]]:
        size = self._expect("map", prefix)
        if deep > _DEEPEST or size > _MOST:
            raise _DamageError("more names than a model has")
        for _ in range(size):
            name = self._text()
            if name == _CHUNKED:
                yield prefix.removesuffix("/"), self._chunked(size, prefix)
                return
            if not name or "/" in name:
                raise _DamageError(f"the name {brief(name)}")
            place = f"{prefix}{name}"
            if self._peek() == "map":
                yield from self._map(f"{place}/", deep=deep + 1)
            else:
                yield place, self._array(place)

    def _array(self, place: str) -> LazyArray:
        end = self._expect("extension", place)
        end += self._at
        if end > len(self._data):
            raise _DamageError("it ends too early")
        if self._expect("list", place) != 3:
            raise _DamageError(f"{part(place)} is no array")
        shape = tuple(self._expect("number", place) for _ in range(self._sizes(place)))
        code = self._text()
        size = self._expect("bytes", place)
        dtype = _DTYPES.get(code)
        if dtype is None:
            raise _DamageError(f"{part(place)} is of type {brief(code)}; expected one of {', '.join(_DTYPES)}")
        if math.prod(shape) * dtype.itemsize != size or self._at + size != end:
            raise _DamageError(f"{part(place)} claims the shape {brief(shape)} and has {size} bytes")
        if max(shape, default=0) >= _LONGEST or not size:
            raise _DamageError(f"{part(place)} claims the shape {brief(shape)}")
        values = np.frombuffer(self._data, dtype, count=math.prod(shape), offset=self._at).reshape(shape)
        self._at = end
        # Copied: an array of a file need not lie at a multiple of its item's size.
        return LazyArray(shape, dtype, lambda index: np.array(values[index]))

    def _chunked(self, size: int, place: str) -> LazyArray:
        """Reads the rest of a map that stands for an array in flat chunks."""
        self._at += 1  # true
        if (size, self._text()) != (3, "shape"):
            raise _DamageError(f"{part(place)} is no array in chunks")
        shape = tuple(self._expect("number", place) for _ in self._numbered(place))
        if self._text() != "chunks":
            raise _DamageError(f"{part(place)} is no array in chunks")
        chunks = [self._array(place) for _ in self._numbered(place)]
        kinds = {chunk.dtype for chunk in chunks}
        if len(kinds) != 1 or sum(math.prod(chunk.shape) for chunk in chunks) != math.prod(shape):
            raise _DamageError(f"{part(place)} has chunks that do not fill the shape {brief(shape)}")

        def read(index: Index) -> np.ndarray:
            return np.concatenate([chunk.whole().reshape(-1) for chunk in chunks]).reshape(shape)[index]

        return LazyArray(shape, kinds.pop(), read)

    def _numbered(self, place: str) -> Iterator[int]:
        """Yields 0, 1, .. for each entry of a map with these names, which stands before its value."""
        size = self._expect("map", place)
        if size > _MOST:
            raise _DamageError(f"{part(place)} has {size} entries")
        for number in range(size):
            if self._text() != str(number):
                raise _DamageError(f"{part(place)} lacks the entry {number}")
            yield number

    def _sizes(self, place: str) -> int:
        dimensions = self._expect("list", place)
        if dimensions > 8:
            raise _DamageError(f"{part(place)} has {dimensions} dimensions")
        return dimensions

    def _text(self) -> str:
        size = self._expect("text", "")
        with contextlib.suppress(UnicodeDecodeError):
            return self._take(size).decode()
        raise _DamageError("a name is not UTF-8")

    def _take(self, size: int) -> bytes:
        taken = self._data[self._at : self._at + size]
        if len(taken) < size:
            raise _DamageError("it ends too early")
        self._at += size
        return taken

    def _peek(self) -> str:
        at = self._at
        kind, _ = self._item()
        self._at = at
        return kind

    def _expect(self, kind: str, place: str) -> int:
        found, size = self._item()
        if found != kind:
            raise _DamageError(f"{part(place) or 'it'} has a {found} where a {kind} belongs")
        return size

    def _item(self) -> tuple[str, int]:
        """Reads the head of an item: its kind, and its size or value."""
        first = self._take(1)[0]
        for kind, firsts in _SHORT.items():
            if first in firsts:
                return kind, first - firsts.start
        if first in _FIXED:
            kind, size = "extension", 1 << (first - _FIXED.start)
        elif first in _SIZED:
            kind, count = _SIZED[first]
            size = int.from_bytes(self._take(count), "big")
        else:
            return f"0x{first:02x}", 0
        if kind == "extension" and self._take(1)[0] != _ARRAY:
            return "foreign extension", size
        return kind, size
