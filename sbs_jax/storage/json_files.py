"""Read JSON with errors that name the file, the line and the field. Standard library only."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_NESTED = "a value nested too deeply to show"


def read_json_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, JSON object) of each line. ValueError names file and line."""
    line = 0
    with Path(path).open("rb") as file:
        # Bytes are split at "\n" alone: text may hold other characters that end a line elsewhere.
        for line, data in enumerate(file, start=1):
            where = f"{path}:{line}"
            text = decoded(data, where)
            if not text.strip():
                raise ValueError(f"{where}: the line is blank; expected one JSON object per line.")
            value = parse_json(text, where)
            if not isinstance(value, dict):
                raise ValueError(f"{where}: got {shown(value)}; expected a JSON object, {{..}}, on every line.")
            yield line, value
    if line == 0:
        raise ValueError(f"{path} is empty; expected one JSON object per line.")


def read_json(path: str | Path) -> Any:
    """The one JSON value that a file holds. ValueError names file and line."""
    return parse_json(decoded(Path(path).read_bytes(), str(path)), str(path))


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text; `where` begins the message of the ValueError."""
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():  # only such escapes can give what UTF-8 cannot hold
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = f", line {error.lineno} of it" if error.lineno > 1 else ""
        raise ValueError(
            f"{where}: not valid JSON: {error.msg} at column {error.colno}{line}. The file may be "
            "cut short or edited; get it anew."
        ) from None
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise ValueError(f"{where}: half a surrogate pair, {half}, is no character of UTF-8; remove it.") from None
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{where}: JSON that cannot be read: {error}.") from None
    return value


def text_field(fields: Mapping[str, Any], name: str) -> str:
    """The text of a field. ValueError where it is missing or no text."""
    value = _field(fields, name)
    if not isinstance(value, str):
        raise ValueError(f"the field {name!r} is {brief(value)}; expected text.")
    return value


def integer_field(fields: Mapping[str, Any], name: str) -> int:
    """The integer of a field. ValueError where it is missing or no integer."""
    value = _field(fields, name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"the field {name!r} is {brief(value)}; expected an integer.")
    return value


def text_list_field(fields: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """The texts of a field. ValueError where it is missing or no list of texts."""
    value = _field(fields, name)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"the field {name!r} is {brief(value)}; expected a list of texts.")
    return tuple(value)


def _field(fields: Mapping[str, Any], name: str) -> Any:
    if name not in fields:
        raise ValueError(f"the field {name!r} is missing; it has {brief(sorted(fields))}.")
    return fields[name]


def decoded(data: bytes, where: str) -> str:
    """The text of UTF-8 bytes; `where` begins the message of the ValueError."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        place = f", line {line}" if line > 1 else ""
        raise ValueError(
            f"{where}: byte {error.start} (0x{data[error.start]:02x}){place} is not UTF-8; convert the file to UTF-8."
        ) from None


def shown(value: Any) -> str:
    """A value for a message, as JSON; only its beginning where it is long."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except RecursionError:
        text = _NESTED
    return f"{text[:60]}.." if len(text) > 62 else text


def brief(value: Any) -> str:
    """A value for a message, as Python writes it; only its beginning where it is long."""
    try:
        text = repr(value)
    except RecursionError:
        text = _NESTED
    return part(text)


def part(text: str) -> str:
    """A text for a message; only its beginning where it is long."""
    return f"{text[:200]}.." if len(text) > 202 else text
