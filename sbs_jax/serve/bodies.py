"""Bodies of the server's requests and responses, and a reader of those of `POST /predict`.

    {"inputs": [{"input": "Ann has 3 pens and buys 4. How many has she?"},
                {"id": "b", "input": "..", "choices": ["yes", "no"], "rationale": true, "adapter": "esnli"}]}

A body of another form is rejected whole. An invalid row is rejected alone; the other rows are answered.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from sbs_jax.checks import nearest
from sbs_jax.prediction.engine import Question
from sbs_jax.storage import json_files


class RequestError(Exception):
    """Fails a whole request: HTTP status, a code for programs, a message for people."""

    def __init__(self, status: int, code: str, message: str, *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers or {})


class _Body(pydantic.BaseModel):
    # Strict: 5 is not a text, "yes" is not true. Answers are validated from the engine's objects.
    model_config = pydantic.ConfigDict(extra="forbid", strict=True, from_attributes=True)


# ------------------------------------------------------------------------------------------- requests


# With a bound on the length, pydantic reads the text and so finds unpaired surrogates.
_Text = Annotated[str, Field(min_length=0)]


class Row(_Body):
    """One question."""

    # A factory, since a plain default would be in the schema.
    id: str = Field(
        default_factory=str, min_length=1, description="Distinct within the request; default: the row's place, '0', .."
    )
    input: _Text = Field(description="The question, without the prefix used in training.")
    choices: Annotated[tuple[_Text, ...], Field(strict=False, min_length=1)] | None = Field(
        None, description="The possible answers, for a server with --decoding choices."
    )
    rationale: bool = Field(False, description="Also generate the rationale, for a server with --rationale.")
    adapter: _Text | None = Field(None, description="Name of the adapters that answer.")


class Request(_Body):
    """Rows to answer."""

    inputs: list[Row] = Field(min_length=1)


# ------------------------------------------------------------------------------------------ responses


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


_Quoted = Annotated[str, pydantic.AfterValidator(_encodable)]  # may quote a request
_Count = Annotated[int, Field(ge=0)]
_LogProbability = float | None  # JSON has no -inf, the logarithm of 0: null


class Answer(_Body):
    """A row's prediction."""

    id: str
    prediction: str
    score: _LogProbability = Field(description="Natural log probability of the prediction.")
    rationale: str | None = None
    scores: dict[str, _LogProbability] | None = Field(None, description="Of each possible answer.")


class RowError(_Body):
    """A row that was not answered."""

    id: _Quoted
    error: _Quoted = Field(description="What was got and expected.")


_Answered = Annotated[Answer | RowError, Field(union_mode="left_to_right")]  # "smart" would try both


class Answers(_Body):
    """The answers to a request."""

    model: str = Field(description="Name of the run's folder.")
    step: _Count = Field(description="Training step of the student.")
    answers: list[_Answered] = Field(min_length=1, description="One per row of the request, in order.")


class ErrorDetail(_Body):
    code: str = Field(description="For programs.")
    message: _Quoted = Field(description="For people.")


class Error(_Body):
    """Failure of a whole request."""

    error: ErrorDetail

    @classmethod
    def of(cls, code: str, message: str) -> "Error":
        return cls(error=ErrorDetail(code=code, message=message))


class Queue(_Body):
    rows: _Count
    limit: _Count


class Batch(_Body):
    rows: _Count
    seconds: float = Field(ge=0)


class Programs(_Body):
    ready: _Count = Field(description="Compiled; one that is not yet is replaced by a larger one.")
    count: _Count


class Health(_Body):
    """State of the server, its queue, the batch being computed and the programs compiled beside serving."""

    status: Literal["warming up", "ready", "stopping"]
    model: str
    step: _Count
    queue: Queue
    batch: Batch
    programs: Programs


def encoded(body: pydantic.BaseModel) -> bytes:
    """Encodes a response as JSON; omits fields that are None."""
    return body.model_dump_json(exclude_none=True).encode()


# -------------------------------------------------------------------------------------------- reading

_EXAMPLE = '{"inputs": [{"input": "a question"}]}'
_EXPECTED = {"choices": "a list of texts", "rationale": "true or false"}


def read(data: bytes, *, most: int, most_choices: int) -> list[Question | RowError]:
    """Reads the rows of a body, at most `most`, in order. A row without an id gets its place, from "0".

    RequestError if it is not UTF-8, not JSON, or not of the form above, or if all rows together have more than
    `most_choices` choices.
    """
    rows = _rows(_parsed(data))
    if len(rows) > most:
        message = f"the body has {len(rows)} inputs; at most {most} per request: send several."
        raise RequestError(422, "too_many_inputs", message)
    found: list[Question | RowError] = []
    seen: dict[str, int] = {}
    for place, raw in enumerate(rows):
        name = raw.get("id") if isinstance(raw, dict) else None
        name = name if isinstance(name, str) else str(place)
        try:
            row = Row.model_validate(raw)
        except pydantic.ValidationError as error:
            found.append(RowError(id=name, error=_wrong_row(error, raw, place)))
            continue
        if name in seen:
            message = f"the id {json_files.brief(name)} is that of row {seen[name]} already; give every row its own."
            found.append(RowError(id=name, error=message))
            continue
        seen[name] = place
        found.append(
            Question(id=name, input=row.input, adapter=row.adapter, choices=row.choices, rationale=row.rationale)
        )
    choices = sum(len(row.choices or ()) for row in found if isinstance(row, Question))
    if choices > most_choices:
        message = f"the rows have {choices} choices together; at most {most_choices} per request: send several."
        raise RequestError(422, "too_many_choices", message)
    return found


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data.decode(), parse_constant=_no_constant, object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        message = f"the body's byte {error.start} (0x{data[error.start]:02x}) is not UTF-8; send UTF-8."
        raise RequestError(400, "not_utf8", message) from None
    except json.JSONDecodeError as error:
        wrong = f"is not JSON: {error}"
    except RecursionError:
        wrong = "is nested too deeply"
    except ValueError as error:  # from the functions below, or a number of thousands of digits
        wrong = f"cannot be read: {json_files.part(str(error))}"
    raise RequestError(400, "not_json", f"the body {wrong}; expected {_EXAMPLE}.")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"an object has {json_files.brief(twice)} twice")
    return found


def _rows(body: Any) -> list[Any]:
    """Returns the rows, not yet validated: a `Request` would be rejected for one wrong row."""
    beside = [name for name in body if name != "inputs"] if isinstance(body, dict) else []
    if not isinstance(body, dict) or "inputs" not in body:
        wrong = f"the body is {json_files.shown(body)}; expected {_EXAMPLE}."
    elif beside:
        wrong = f"the body has {json_files.brief(beside[0])} beside 'inputs'; put a row's fields into the row."
    elif not isinstance(body["inputs"], list):
        wrong = f"the body's 'inputs' is {json_files.shown(body['inputs'])}; expected a list: {_EXAMPLE}."
    elif not body["inputs"]:
        wrong = f"the body's 'inputs' is an empty list; expected at least one row: {_EXAMPLE}."
    else:
        return body["inputs"]
    raise RequestError(400, "wrong_form", wrong)


def _wrong_row(error: pydantic.ValidationError, row: Any, place: int) -> str:
    if not isinstance(row, dict):
        return f'row {place} is {json_files.shown(row)}; expected an object: {{"input": "a question"}}.'
    known = list(Row.model_fields)
    unknown = [name for name in row if name not in known]
    if unknown:
        near = nearest(unknown[0][:100], known)
        return f"unknown field {json_files.brief(unknown[0])}; known are {known}.{near}"
    first = error.errors(include_url=False)[0]
    name, kind = str(first["loc"][0]), first["type"]
    if kind == "missing":
        return f"the field {name!r} is missing; expected a question."
    if kind == "string_unicode":
        return f"{name!r} holds an unpaired surrogate, which UTF-8 cannot encode; remove it."
    if kind in ("too_short", "string_too_short"):
        return f"{name!r} is empty; leave it out, or give at least one."
    return f"the field {name!r} is {json_files.shown(row[name])}; expected {_EXPECTED.get(name, 'text')}."
