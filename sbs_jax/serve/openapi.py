"""What the server says of itself: an OpenAPI 3.1 document."""

from typing import Any

from sbs_jax import __version__
from sbs_jax.serve.limits import Limits

_ERRORS = {
    "400": "Not JSON, or not of this form.",
    "408": "The body came too slowly.",
    "413": "The body is too large.",
    "415": "Not sent as application/json.",
    "500": "The model failed on the batch with these rows.",
    "503": "Warming up, stopping, or no room in the queue; `Retry-After` says when to ask again.",
    "504": "No answer in time; rows that still waited were given up.",
}


def document(limits: Limits) -> dict[str, Any]:
    """The document, with the limits of this server."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "sbs serve",
            "version": __version__,
            "description": "Answers of a student of Distilling Step-by-Step.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": {
            "/predict": {"post": _predict(limits)},
            "/health": {"get": _health()},
            "/metrics": {
                "get": {
                    "operationId": "metrics",
                    "summary": "Counters, in the text format of Prometheus.",
                    "responses": {
                        "200": {"description": "Counters.", "content": {"text/plain": _of({"type": "string"})}}
                    },
                }
            },
            "/openapi.json": {
                "get": {
                    "operationId": "openapi",
                    "summary": "This document.",
                    "responses": {"200": {"description": "OpenAPI 3.1.", "content": _json({"type": "object"})}},
                }
            },
        },
        "components": {"schemas": _schemas(limits)},
    }


def _predict(limits: Limits) -> dict[str, Any]:
    answers = _json(_ref("Answers"))
    either = _json({"oneOf": [_ref("Answers"), _ref("Error")]})
    responses: dict[str, Any] = {"200": {"description": "At least one row is answered.", "content": answers}}
    for status, description in _ERRORS.items():
        responses[status] = {"description": description, "content": _json(_ref("Error"))}
    responses["422"] = {"description": "No row could be answered, or there are too many.", "content": either}
    responses["503"]["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
    return {
        "operationId": "predict",
        "summary": "Answers to rows.",
        "description": "Rows that are no questions, or that the student cannot answer, have an error in their place.",
        "requestBody": {
            "required": True,
            "description": f"UTF-8, at most {limits.max_body_bytes} bytes.",
            "content": _json(_ref("Request")),
        },
        "responses": dict(sorted(responses.items())),
    }


def _health() -> dict[str, Any]:
    return {
        "operationId": "health",
        "summary": "Whether requests are taken.",
        "responses": {
            "200": {"description": "Ready.", "content": _json(_ref("Health"))},
            "503": {"description": "Warming up or stopping.", "content": _json(_ref("Health"))},
        },
    }


def _schemas(limits: Limits) -> dict[str, Any]:
    text, number = {"type": "string"}, {"type": ["number", "null"]}
    count = {"type": "integer", "minimum": 0}
    row_id = {**text, "minLength": 1, "description": "Distinct within the request; by default the row's place: '0', .."}
    return {
        "Request": _object(
            {"inputs": {"type": "array", "minItems": 1, "maxItems": limits.max_inputs, "items": _ref("Row")}}
        ),
        "Row": _object(
            {
                "id": row_id,
                "input": {**text, "description": "The question, without the prefix that the student was trained with."},
                "choices": {
                    "type": ["array", "null"],
                    "items": text,
                    "minItems": 1,
                    "description": "The possible answers, for a server with --decoding choices.",
                },
                "rationale": {
                    "type": "boolean",
                    "default": False,
                    "description": "Whether to generate the rationale too, for a server with --rationale.",
                },
                "adapter": {"type": ["string", "null"], "description": "The name of the adapters to answer with."},
            },
            required=("input",),
        ),
        "Answers": _object(
            {
                "model": {**text, "description": "Name of the run's folder."},
                "step": {**count, "description": "Training step of the student."},
                "answers": {
                    "type": "array",
                    "minItems": 1,
                    "items": {"oneOf": [_ref("Answer"), _ref("RowError")]},
                    "description": "One per row of the request, in order.",
                },
            }
        ),
        "Answer": _object(
            {
                "id": text,
                "prediction": text,
                "score": {**number, "description": "Natural log probability of the prediction."},
                "rationale": text,
                "scores": {
                    "type": "object",
                    "additionalProperties": number,
                    "description": "Natural log probability of each possible answer.",
                },
            },
            required=("id", "prediction", "score"),
        ),
        "RowError": _object({"id": text, "error": {**text, "description": "What was got, what was expected."}}),
        "Error": _object({"error": _object({"code": text, "message": text})}),
        "Health": _object(
            {
                "status": {"enum": ["warming up", "ready", "stopping"]},
                "model": text,
                "step": count,
                "queue": _object({"rows": count, "limit": count}),
                "batch": _object({"rows": count, "seconds": {"type": "number", "minimum": 0}}),
            }
        ),
    }


def _object(properties: dict[str, Any], *, required: tuple[str, ...] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties if required is None else required),
        "additionalProperties": False,
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _of(schema: dict[str, Any]) -> dict[str, Any]:
    return {"schema": schema}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": _of(schema)}
