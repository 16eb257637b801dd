"""The body of `POST /predict`: bytes to questions, and what is wrong with those that are none.

    {"inputs": [{"input": "Ann has 3 pens and buys 4. How many has she?"},
                {"id": "b", "input": "..", "choices": ["yes", "no"], "rationale": true, "adapter": "esnli"}]}

A body that is not of this form is refused whole. A row that is not is refused by itself: the others are answered.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from sbs_jax.prediction.engine import Question
from sbs_jax.storage import json_files

_EXAMPLE = '{"inputs": [{"input": "a question"}]}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Row:
    """The fields of a row."""

    id: str
    input: str
    choices: tuple[str, ...] | None = None
    rationale: bool = False
    adapter: str | None = None


class BodyError(ValueError):
    """A body that is refused whole. `code` is for programs, the message for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refused:
    """A row that is not answered, and why."""

    id: str
    message: str


def read(data: bytes, *, most: int) -> list[Question | Refused]:
    """The rows of a body, at most `most`, in order. A row without an id has its place, from "0", as its id.

    BodyError for what is not UTF-8, not JSON, or not of the form above.
    """
    value = _parsed(data)
    if not isinstance(value, dict) or "inputs" not in value:
        raise BodyError("wrong_form", f"the body is {json_files.shown(value)}; expected {_EXAMPLE}.")
    unknown = [name for name in value if name != "inputs"]
    if unknown:
        raise BodyError(
            "wrong_form",
            f"the body has {json_files.brief(unknown[0])} beside 'inputs'; fields of a row stand in the row.",
        )
    rows = value["inputs"]
    if not isinstance(rows, list):
        raise BodyError("wrong_form", f"the body's 'inputs' is {json_files.shown(rows)}; expected a list: {_EXAMPLE}.")
    if not rows:
        raise BodyError("wrong_form", f"the body's 'inputs' is an empty list; expected at least one row: {_EXAMPLE}.")
    if len(rows) > most:
        raise BodyError(
            "too_many_inputs", f"the body has {len(rows)} inputs; at most {most} per request: send several."
        )
    found: list[Question | Refused] = []
    seen: dict[str, int] = {}
    for place, row in enumerate(rows):
        name = row.get("id") if isinstance(row, dict) and isinstance(row.get("id"), str) else None
        try:
            asked = _asked(row, place)
            if asked.id in seen:
                raise ValueError(
                    f"the id {json_files.brief(asked.id)} is that of row {seen[asked.id]} already; "
                    "give every row its own, or none."
                )
            seen[asked.id] = place
            found.append(asked)
        except ValueError as error:
            found.append(Refused(id=str(place) if name is None else name, message=str(error)))
    return found


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise BodyError(
            "not_utf8", f"the body's byte {error.start} (0x{data[error.start]:02x}) is not UTF-8; send UTF-8."
        ) from None
    except json.JSONDecodeError as error:
        raise BodyError(
            "not_json", f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from None
    except RecursionError:
        raise BodyError("not_json", "the body is nested too deeply to be read; expected no more than rows.") from None
    except ValueError as error:  # ours, below, and numbers of thousands of digits
        raise BodyError("not_json", f"the body cannot be read: {json_files.part(str(error))}") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON.")


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"an object has {json_files.brief(twice)} twice.")
    return found


def _asked(row: Any, place: int) -> Question:
    """ValueError where a row is not as it should be."""
    if not isinstance(row, dict):
        raise ValueError(f'row {place} is {json_files.shown(row)}; expected an object: {{"input": "a question"}}.')
    asked = json_files.typed({"id": str(place), **row}, _Row)
    if not asked.id:
        raise ValueError("'id' is empty; leave it out, or give a text.")
    if asked.choices == ():
        raise ValueError("'choices' is an empty list; leave it out, or give at least one.")
    json_files.check_encodes(row)
    return Question(**vars(asked))


def written(value: Any) -> bytes:
    """JSON for a response; numbers that JSON has not (a probability of 0 has the logarithm -inf) are null."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list) else value
