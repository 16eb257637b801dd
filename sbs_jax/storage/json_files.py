"""JSON reader whose errors name the file, the line and the field. Standard library only.

`typed` reads a JSON value as a dataclass or TypedDict; `text_field` and its neighbours read one field of an object.
"""

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from sbs_jax.checks import nearest
from sbs_jax.storage import user_files

_T = TypeVar("_T")
_NESTED = "a value nested too deeply to show"


def read_json_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, JSON object) of each line, or of each item if the file is one JSON array.

    The file may be packed with gzip. ValueError names file and line.
    """
    line, name = 0, str(path)  # formatting a path takes as long as a third of parsing a line
    for line, data in user_files.TextFile(path).json_texts():
        where = f"{name}:{line}"
        if data is None:
            raise ValueError(f"{where}: the line is longer than {user_files.LONGEST_LINE} bytes; shorten it.")
        text = decoded(data, where)
        if not text or text.isspace():
            raise ValueError(f"{where}: the line is blank; expected one JSON object per line.")
        value = parse_json(text, where)
        if not isinstance(value, dict):
            raise ValueError(f"{where}: got {shown(value)}; expected a JSON object, {{..}}, on every line.")
        yield line, value
    if line == 0:
        raise ValueError(f"{path} is empty; expected one JSON object per line.")


def read_texts(path: str | Path) -> list[str]:
    """Reads a JSON list of texts, item by item. ValueError names file and item."""
    file = user_files.TextFile(path)
    if not file.is_array:
        return typed(read_json(path), list[str], where=str(path))
    found = []
    for number, item in file.json_texts():
        value = None if item is None else parse_json(item.decode(), f"{path}: item {number}")
        if not isinstance(value, str):
            raise ValueError(f"{path}: the field '[{number - 1}]' is {shown(value)}; expected text.")
        found.append(value)
    return found


def read_json(path: str | Path) -> Any:
    """Reads the one JSON value of a file of at most `user_files.LARGEST` bytes. ValueError names file and line."""
    return parse_json(decoded(user_files.whole(path), str(path)), str(path))


def parse_json(text: str, where: str) -> Any:
    """Returns the value of a JSON text; `where` begins the message of the ValueError."""
    try:
        value = _loaded(text)
        if "\\u" in text and "\\ud" in text.lower():  # only these escapes can produce an unpaired surrogate
            check_encodes(value)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno} of it" if error.lineno > 1 else ""
        raise ValueError(
            f"{where}: not valid JSON: {error.msg} at column {error.colno}{line}. The file may be truncated or edited; "
            "get it again."
        ) from None
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{where}: unreadable JSON: {error}") from None
    return value


def _loaded(text: str) -> Any:
    if text.startswith("{"):  # usually a line of a file; json.loads would search both its ends for spaces
        value, end = _DECODER.raw_decode(text)
        if text[end:] in ("", "\n"):
            return value
    return json.loads(text)


_DECODER = json.JSONDecoder()


def check_encodes(value: Any) -> None:
    """Raises ValueError if a text in a JSON value cannot be encoded as UTF-8."""
    encoded(value)


def encoded(value: Any) -> bytes:
    """Returns the JSON text of a value in UTF-8. ValueError if a text in it cannot be encoded."""
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise ValueError(f"unpaired surrogate {half} cannot be encoded as UTF-8; remove it.") from None


# ------------------------------------------------------------------------------- typed values


def typed(value: Any, kind: type[_T] | types.GenericAlias, *, where: str = "", extra: bool = False) -> _T:
    """Reads a JSON value as a dataclass or TypedDict.

    Fields can be str, int, float (takes ints too), bool, Literal, Any, list, tuple, dict, Mapping, further
    dataclasses and TypedDicts, and unions of these with None. The items of a list or tuple have one type. JSON lists
    become tuples where the type says so.

    >>> @dataclasses.dataclass
    ... class Pen:
    ...     colour: str
    ...     size: int = 1
    >>> typed({"colour": "red"}, Pen)
    Pen(colour='red', size=1)
    >>> typed({"colour": "red", "size": True}, Pen, where="pens.json:3")
    Traceback (most recent call last):
    ValueError: pens.json:3: the field 'size' is true; expected a whole number.

    Args:
      value: from `parse_json`.
      kind: the type to read it as.
      where: begins the message, usually with file and line.
      extra: allow unknown fields; dataclasses drop them, TypedDicts keep them.

    Raises:
      ValueError: a value of the wrong type, or an unknown or missing field. Names the field, e.g. "rows[2].label".
    """
    try:
        return _reader(kind, extra)(value, "")
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from None


def text_field(fields: Mapping[str, Any], name: str) -> str:
    """Reads a text. ValueError if the field is missing or has another type."""
    return _field(fields, name, str)


def integer_field(fields: Mapping[str, Any], name: str) -> int:
    """Reads a whole number. ValueError if the field is missing or has another type."""
    return _field(fields, name, int)


def text_list_field(fields: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Reads a list of texts. ValueError if the field is missing or has another type."""
    return _field(fields, name, tuple[str, ...])


def _field(fields: Mapping[str, Any], name: str, kind: Any) -> Any:
    if name not in fields:
        raise _missing(name, fields)
    return _reader(kind, False)(fields[name], name)


# Scalar types and their names in messages.
_PLAIN: Mapping[Any, tuple[type, ...]] = {
    **{kind: (kind,) for kind in (str, int, bool, dict, list, types.NoneType)},
    float: (int, float),
}
_WORDS: Mapping[Any, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
    types.NoneType: "null",
}
_Reader = Callable[[Any, str], Any]  # (JSON value, its field) -> the value as its type


@functools.cache
def _reader(kind: Any, extra: bool) -> _Reader:
    """Returns the function that reads one type. Cached, because records files have many lines."""
    origin = typing.get_origin(kind)
    if kind is Any:
        return lambda value, field: value
    if kind in _PLAIN or origin is Literal:
        return _plain_reader(kind)
    if dataclasses.is_dataclass(kind) or typing.is_typeddict(kind):
        return _object_reader(kind, extra)
    if origin in (dict, Mapping):
        return _mapping_reader(kind, extra)
    if origin in (list, tuple):
        return _sequence_reader(kind, extra)
    return _union_reader(kind, extra)


def _plain_reader(kind: Any) -> _Reader:
    among = typing.get_args(kind)  # of a Literal
    accepted = _PLAIN[kind] if kind in _PLAIN else tuple(map(type, among))

    def read(value: Any, field: str) -> Any:
        if type(value) not in accepted or (among and value not in among):
            raise _mismatch(kind, value, field)
        return value

    return read


def _sequence_reader(kind: Any, extra: bool) -> _Reader:
    make, items = typing.get_origin(kind), typing.get_args(kind)
    size = None if make is list or items[-1] is ... else len(items)
    read_item, plain = _reader(items[0], extra), _PLAIN.get(items[0])

    def read(value: Any, field: str) -> Any:
        if type(value) not in (list, tuple) or size not in (None, len(value)):
            raise _mismatch(kind, value, field)
        if plain and all(type(item) in plain for item in value):  # the usual case, and quick
            return make(value)
        return make(read_item(item, f"{field}[{number}]") for number, item in enumerate(value))

    return read


def _mapping_reader(kind: Any, extra: bool) -> _Reader:
    read_item = _reader(typing.get_args(kind)[1], extra)

    def read(value: Any, field: str) -> Any:
        if type(value) is not dict:
            raise _mismatch(kind, value, field)
        parent = f"{field}." if field else ""
        return {name: read_item(each, f"{parent}{name}") for name, each in value.items()}

    return read


def _union_reader(kind: Any, extra: bool) -> _Reader:
    readers: dict[type, _Reader] = {}  # by the type of the JSON value
    for each in typing.get_args(kind):
        sequence = typing.get_origin(each) in (list, tuple)
        for accepted in _PLAIN.get(each, (list, tuple) if sequence else (dict,)):
            readers[accepted] = _reader(each, extra)

    def read(value: Any, field: str) -> Any:
        if type(value) not in readers:
            raise _mismatch(kind, value, field)
        return readers[type(value)](value, field)

    return read


def _object_reader(kind: Any, extra: bool) -> _Reader:
    hints, make = typing.get_type_hints(kind), kind
    if dataclasses.is_dataclass(kind):
        fields = dataclasses.fields(kind)
        known = [field.name for field in fields]
        missing = dataclasses.MISSING
        required = [f.name for f in fields if f.default is missing and f.default_factory is missing]
    else:
        known, required = list(hints), [name for name in hints if name in kind.__required_keys__]
    readers = {name: _reader(hints[name], extra) for name in known}

    def read(value: Any, field: str) -> Any:
        if type(value) is not dict:
            raise _mismatch(kind, value, field)
        parent = f"{field}." if field else ""
        found = {}
        for name, each in value.items():
            if name in readers:
                found[name] = readers[name](each, parent + name)
            elif not extra:
                near = nearest(name[:100], known)
                raise ValueError(f"unknown field {brief(parent + name)}; known are {known}.{near}")
            elif not dataclasses.is_dataclass(kind):
                found[name] = each
        for name in required:
            if name not in found:
                raise _missing(parent + name, value)
        return make(**found)

    return read


def _missing(field: str, there: Mapping[str, Any]) -> ValueError:
    return ValueError(f"the field {brief(field)} is missing; got the fields {brief(sorted(there))}.")


def _mismatch(kind: Any, value: Any, field: str) -> ValueError:
    place = f"the field {brief(field)} is" if field else "got"
    return ValueError(f"{place} {shown(value)}; expected {_expected(kind)}.")


def _expected(kind: Any) -> str:
    """Describes a type for a message: "text or null", "a list of texts"."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind in _WORDS:
        return _WORDS[kind]
    if origin is Literal:
        return " or ".join(map(shown, inner))
    if origin in (list, tuple):
        item = _expected(inner[0]).partition(" with ")[0]
        items = f"{item.removeprefix('a ').removeprefix('an ')}s"
        return f"{len(inner)} {items}" if origin is tuple and inner[-1] is not ... else f"a list of {items}"
    if origin in (dict, Mapping):
        return "an object"
    if dataclasses.is_dataclass(kind) or typing.is_typeddict(kind):
        return f"an object with the fields {list(typing.get_type_hints(kind))}"
    return " or ".join(map(_expected, inner))


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Lists the fields of two JSON values that differ, each with both values.

    >>> differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2})
    ['a b (1, now 3)']
    """
    if isinstance(before, dict) and isinstance(now, dict):
        names = [*before, *(each for each in now if each not in before)]
        return [
            found for each in names for found in differences(before.get(each), now.get(each), f"{name} {each}".strip())
        ]
    return [] if before == now else [f"{name} ({brief(before)}, now {brief(now)})"]


# ------------------------------------------------------------------------------- texts for messages


def decoded(data: bytes, where: str) -> str:
    """Decodes UTF-8 bytes; `where` begins the message of the ValueError."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        place = f", line {line}" if line > 1 else ""
        raise ValueError(
            f"{where}: byte {error.start} (0x{data[error.start]:02x}){place} is not UTF-8; convert the file to UTF-8."
        ) from None


def shown(value: Any) -> str:
    """Shows a value in a message as JSON, shortened."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except RecursionError:
        text = _NESTED
    return f"{text[:60]}.." if len(text) > 62 else text


def brief(value: Any) -> str:
    """Shows a value in a message as Python writes it, shortened."""
    try:
        text = repr(value)
    except RecursionError:
        text = _NESTED
    return part(text)


def part(text: str) -> str:
    """Shortens a text for a message."""
    return f"{text[:200]}.." if len(text) > 202 else text
