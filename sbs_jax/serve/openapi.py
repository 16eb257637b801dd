"""OpenAPI 3.1 document of the server."""

from typing import Any

from pydantic.json_schema import models_json_schema

from sbs_jax import __version__
from sbs_jax.serve import bodies
from sbs_jax.serve.limits import Limits

_FAILURES = {
    "400": "Not JSON, or not of this form.",
    "408": "The body took too long.",
    "413": "The body is too large.",
    "415": "Not sent as application/json.",
    "500": "The model failed on the batch with these rows.",
    "503": "Warming up, stopping, or the queue is full; `Retry-After` says when to retry.",
    "504": "No answer in time; its rows have left the queue.",
}


def document(limits: Limits) -> dict[str, Any]:
    """Returns the document, with the limits of this server."""
    models = (bodies.Request, bodies.Answers, bodies.Error, bodies.Health)
    _, found = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    schemas = found["$defs"]
    schemas["Request"]["properties"]["inputs"]["maxItems"] = limits.max_inputs
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
            "/health": _get(
                "health",
                "Whether requests are accepted.",
                {"200": _of("Ready.", "Health"), "503": _of("Warming up or stopping.", "Health")},
            ),
            "/metrics": _get(
                "metrics",
                "Counters, in the text format of Prometheus.",
                {"200": {"description": "Counters.", "content": {"text/plain": {"schema": {"type": "string"}}}}},
            ),
            "/openapi.json": _get(
                "openapi",
                "This document.",
                {"200": {"description": "OpenAPI 3.1.", "content": _json({"type": "object"})}},
            ),
        },
        "components": {"schemas": schemas},
    }


def _predict(limits: Limits) -> dict[str, Any]:
    either = {"oneOf": [_ref("Answers"), _ref("Error")]}
    responses = {status: _of(text, "Error") for status, text in _FAILURES.items()}
    responses["200"] = _of("At least one row is answered.", "Answers")
    responses["422"] = {"description": "No row could be answered, or there are too many.", "content": _json(either)}
    responses["503"]["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
    return {
        "operationId": "predict",
        "summary": "Answers to rows.",
        "description": "A row that is invalid, or that the student cannot answer, has an error in its place.",
        "requestBody": {
            "required": True,
            "description": f"UTF-8, at most {limits.max_body_bytes} bytes.",
            "content": _json(_ref("Request")),
        },
        "responses": dict(sorted(responses.items())),
    }


def _get(name: str, summary: str, responses: dict[str, Any]) -> dict[str, Any]:
    return {"get": {"operationId": name, "summary": summary, "responses": responses}}


def _of(description: str, model: str) -> dict[str, Any]:
    return {"description": description, "content": _json(_ref(model))}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
