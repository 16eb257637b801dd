"""A hosted teacher over loopback, which can misbehave: OpenAI's interface, Gemini's and Vertex AI's, batches included.

    with teacher_server.served(answer=lambda prompt: "Iron sinks. So the answer is no.") as server:
        client = providers.make("openai", base_url=server.openai, timeout=5, connections=10)    # or server.gemini
        ...
        assert server.asked == 1 and server.bodies[0]["model"] == "some-model"

`answer` gets what the model reads: a list of {"role", "content"} (system, user, assistant) of a chat, also of Gemini's,
or the text of a plain completion; with a second parameter also the request's body. Tokens are words. Stop strings and
max_tokens are respected. `faults` is a script: what is done to the first request, the second, ..; after its end
nothing. Or it is a function of (number from 0, body). A fault is None, an HTTP status, or a word (see `Fault`):

    served(faults=[429, None, Fault(429, retry_after="2"), "reset", "malformed"])

From a shell, or through `apart()`, it is a process of its own, which does not share the interpreter with the client:

    python tests/teacher_server.py --latency 0.05 [--port 8000]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import inspect
import itertools
import json
import math
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

REPLY = "Iron sinks. So the answer is no."
_REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 429: "Too Many Requests"}
# Google's word for a status.
_STATUS = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    409: "ABORTED",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
_OPENAI_CODE = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault of one request.

    Attributes:
      kind: an HTTP status, or one of
        "reset": half of the reply, then the connection is reset; "close": closed without a byte;
        "slow": the reply comes byte by byte, one every `seconds`; "hang": nothing comes at all;
        "late": the reply comes after `seconds` more; "malformed": half of the JSON, as if it were all;
        "html": status 200 with a page of a proxy; "nothing": status 200 with an empty body;
        "empty": no choices; "null": a choice without text; "filter": stopped by the content filter;
        "prompt_filter": Gemini refuses the prompt (OpenAI: as "filter"); "length": cut short (half of the words);
        "quota": 429 because the money is gone; "too_long": 400, the prompt exceeds the context;
        "endless": status 200 with a body that never ends;
        in a batch also "missing": no line at all.
      retry_after: the header's value, seconds or an HTTP date.
      message: of the error; made up where None.
      body: sent instead of the reply or error: bytes as they are, anything else as JSON.
      headers: more of them.
    """

    kind: int | str
    retry_after: str | None = None
    seconds: float = 0.1
    message: str | None = None
    body: Any = None
    headers: dict[str, str] = dataclasses.field(default_factory=dict)


Faults = Sequence["Fault | int | str | None"] | Callable[[int, dict[str, Any]], "Fault | int | str | None"]
Answer = Callable[..., str]  # of the prompt, or of the prompt and the body


@dataclasses.dataclass(kw_only=True, eq=False)
class Server:
    """Records the requests. Counts are of generation requests; lines of batches count in `lines`."""

    answer: Answer = lambda prompt: REPLY
    faults: Faults = ()
    line_faults: Faults = ()  # for the lines of a batch: "missing", "expired", "malformed" too
    latency: float | Callable[[], float] = 0.0
    keep: bool = True  # bodies and headers
    key: str | None = None  # the only one accepted ..
    key_header: str = "authorization"  # .. in this header of OpenAI's interface, as "Bearer KEY", or the key itself
    root: str = "/v1"  # of OpenAI's interface
    query: str = ""  # that every request must have, such as "api-version=2024-10-21"
    models: Sequence[str] | None = None  # the only ones known
    batch_polls: int = 1  # polls that find a batch still running
    batch_case: Callable[[str], str] = lambda word: word  # of a batch's status
    moves: str | None = None  # requests whose "METHOD /path" contains a match of this pattern are sent on ..
    moved_to: str = ""  # .. to this origin
    moved_status: int = 307
    uploads_to: str | None = None  # origin that Gemini's upload of a file is sent to
    thinking: int = 0  # tokens of thought per reply: billed as output, whatever max_tokens is
    thinking_in_total: bool = False  # they are counted in OpenAI's total_tokens alone, as some servers do
    prompt_factor: int = 1  # tokens per word of a prompt

    url: str = ""
    asked: int = 0  # generation requests that arrived
    replied: int = 0  # whole replies with a text that were sent
    billed: tuple[int, int] = (0, 0)  # tokens (sent, received) that a provider bills, whatever arrives of the replies
    in_flight: int = 0
    most_in_flight: int = 0
    connections: int = 0  # opened so far
    open_now: int = 0
    lines: int = 0  # requests in batches
    paths: Counter[str] = dataclasses.field(
        default_factory=Counter
    )  # "POST /v1/chat/completions" -> count; all requests
    bodies: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # of generation requests
    headers: list[dict[str, str]] = dataclasses.field(default_factory=list)  # of the same, names in lower case
    batches: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)  # by name; Cloud Storage's by gs:// address
    denied: set[str] = dataclasses.field(default_factory=set)  # buckets that nobody may use

    def __post_init__(self) -> None:
        self._two = len(inspect.signature(self.answer).parameters) > 1
        self._ids = itertools.count(1)

    @property
    def openai(self) -> str:
        """base_url for OpenAI's SDK."""
        return f"{self.url}{self.root}{f'?{self.query}' if self.query else ''}"

    @property
    def gemini(self) -> str:
        """base_url for Google's SDK (Gemini and Vertex AI)."""
        return self.url

    def bill(self, sent: int, received: int) -> None:
        self.billed = self.billed[0] + sent, self.billed[1] + received

    def text(self, prompt: list[dict[str, str]] | str, body: dict[str, Any]) -> str:
        return self.answer(prompt, body) if self._two else self.answer(prompt)

    def new_id(self) -> int:
        return next(self._ids)


def _fault(script: Faults, number: int, body: dict[str, Any]) -> Fault | None:
    found = script(number, body) if callable(script) else script[number] if number < len(script) else None
    return found if found is None or isinstance(found, Fault) else Fault(found)


def _words(text: str) -> list[str]:
    return re.findall(r"\s*\S+", text)


def _finished(text: str, *, stops: Sequence[str], most: int | None, halve: bool) -> tuple[str, str, int]:
    """Ends a text as a model would: (text, finish, tokens)."""
    for stop in stops:
        text = text.split(stop)[0]
    words = _words(text)
    if halve:
        most = max(1, len(words) // 2)
    if most is not None and len(words) > most:
        return "".join(words[:most]), "length", most
    return text, "stop", len(words)


# --------------------------------------------------------------------------------------------- OpenAI


def _openai_error(status: int, message: str, code: str | None) -> dict[str, Any]:
    kind = "insufficient_quota" if code == "insufficient_quota" else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _openai_reply(server: Server, path: str, body: dict[str, Any], fault: Fault | None) -> tuple[int, dict[str, Any]]:
    chat = path.endswith("/chat/completions")
    kind = fault.kind if fault else None
    model = body.get("model", "")
    if kind == "quota":
        return 429, _openai_error(429, "You exceeded your current quota, please check your plan.", "insufficient_quota")
    if kind == "too_long":
        message = "This model's maximum context length is 100 tokens. However, your messages have 999 tokens."
        return 400, _openai_error(400, message, "context_length_exceeded")
    if isinstance(kind, int):
        message = (fault and fault.message) or f"made up: status {kind}"
        return kind, _openai_error(kind, message, _OPENAI_CODE.get(kind))
    if server.models is not None and model not in server.models:
        return 404, _openai_error(
            404, f"The model `{model}` does not exist or you do not have access.", "model_not_found"
        )
    prompt = body["messages"] if chat else body["prompt"]
    given = [message["content"] for message in prompt] if chat else [prompt]
    stops = body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    if chat and len(stops) > 4:
        return 400, _openai_error(400, "Invalid 'stop': array too long. Expected at most 4.", "array_above_max_length")
    most = body.get("max_completion_tokens") or body.get("max_tokens")
    text, finish, tokens = _finished(server.text(prompt, body), stops=stops, most=most, halve=kind == "length")
    if kind in ("filter", "prompt_filter"):
        text, finish = "", "content_filter"
    content = None if kind == "null" else text
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
    choice |= {"message": {"role": "assistant", "content": content, "refusal": None}} if chat else {"text": content}
    sent = server.prompt_factor * sum(len(_words(text)) for text in given)
    received = tokens + server.thinking
    server.bill(sent, received)
    usage = {"prompt_tokens": sent, "completion_tokens": tokens if server.thinking_in_total else received}
    return 200, {
        "id": f"chatcmpl-{server.new_id()}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": f"{model}-2026-01-01",
        "choices": [] if kind == "empty" else [choice],
        "usage": usage | {"total_tokens": sent + received},
    }


def _openai_batch(server: Server, batch: dict[str, Any], *, share: float = 1.0) -> None:
    """Answers a part of a batch, the last line first, since no order is promised."""
    lines = [json.loads(line) for line in server.files[batch["input_file_id"]].split(b"\n") if line.strip()]
    lines = lines[: math.ceil(share * len(lines))]
    good, bad = [], []
    for number, line in enumerate(lines):
        server.lines += 1
        fault = _fault(server.line_faults, number, line["body"])
        if fault is not None and fault.kind == "missing":
            continue
        head = {"id": f"batch_req_{server.new_id()}", "custom_id": line["custom_id"]}
        if fault is not None and fault.kind == "expired":
            error = {"code": "batch_expired", "message": "This request could not be executed before the window ended."}
            bad.append(head | {"response": None, "error": error})
            continue
        if fault is not None and fault.kind == "malformed":
            good.append("{")
            continue
        status, reply = _openai_reply(server, line["url"], line["body"], fault)
        response = {"status_code": status, "request_id": "r", "body": reply}
        (good if status == 200 else bad).append(head | {"response": response, "error": None})
    for name, some in (("output_file_id", good), ("error_file_id", bad)):
        if some:
            batch[name] = f"file-{server.new_id()}"
            written = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in some]
            text = "\n".join(reversed(written))
            server.files[batch[name]] = text.encode()
    batch["request_counts"] = {"total": len(lines), "completed": len(good), "failed": len(bad)}
    batch["status"] = "completed"
    batch["completed_at"] = int(time.time())


def _openai_other(
    server: Server, method: str, url: urllib.parse.SplitResult, raw: bytes, headers: dict[str, str]
) -> tuple[Any, ...]:
    """Answers requests about files, batches and models: (status, JSON or bytes)."""
    path = url.path.removeprefix("/v1")
    query = dict(urllib.parse.parse_qsl(url.query))
    if path == "/files" and method == "POST":
        fields = _multipart(raw, headers["content-type"])
        name = f"file-{server.new_id()}"
        server.files[name] = fields["file"]
        return 200, _file_object(server, name)
    if match := re.fullmatch(r"/files/([^/]+)(/content)?", path):
        name = match[1]
        if name not in server.files:
            return 404, _openai_error(404, f"No such File object: {name}", None)
        return 200, server.files[name] if match[2] else _file_object(server, name)
    if path == "/batches" and method == "POST":
        body = json.loads(raw)
        if body["input_file_id"] not in server.files:
            return 400, _openai_error(400, f"No such File object: {body['input_file_id']}", None)
        name = f"batch_{server.new_id()}"
        total = len(server.files[body["input_file_id"]].splitlines())
        server.batches[name] = {
            "id": name,
            "object": "batch",
            "endpoint": body["endpoint"],
            "input_file_id": body["input_file_id"],
            "completion_window": body["completion_window"],
            "metadata": body.get("metadata"),
            "errors": None,
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": int(time.time()),
            "request_counts": {"total": total, "completed": 0, "failed": 0},
            "polls": 0,
        }
        return 200, server.batches[name]
    if path == "/batches":
        names = list(reversed(server.batches))
        start = names.index(query["after"]) + 1 if "after" in query else 0
        some = names[start : start + int(query.get("limit", 20))]
        more = start + len(some) < len(names)
        ends = {"first_id": some[0] if some else None, "last_id": some[-1] if some else None}
        return 200, {"object": "list", "data": [server.batches[name] for name in some], "has_more": more, **ends}
    if match := re.fullmatch(r"/batches/([^/]+)(/cancel)?", path):
        batch = server.batches.get(match[1])
        if batch is None:
            return 404, _openai_error(404, f"No batch found with id '{match[1]}'.", None)
        if match[2] and batch["status"] not in ("validating", "in_progress"):
            return 409, _openai_error(409, f"Cannot cancel a batch with status '{batch['status']}'.", None)
        if match[2]:
            batch["status"] = "cancelling"
        elif batch["status"] == "cancelling":
            _openai_batch(server, batch, share=0.5)
            batch["status"] = "cancelled"
        elif batch["status"] in ("validating", "in_progress"):
            batch["polls"] += 1
            batch["status"] = "in_progress"
            if batch["polls"] > server.batch_polls:
                _openai_batch(server, batch)
        return 200, batch | {"status": server.batch_case(batch["status"])}
    return 404, _openai_error(404, f"Unknown request URL: {method} {url.path}", "unknown_url")


def _file_object(server: Server, name: str) -> dict[str, Any]:
    size = len(server.files[name])
    head = {"id": name, "object": "file", "bytes": size, "created_at": 0, "filename": "x.jsonl"}
    return {**head, "purpose": "batch", "status": "processed"}


def _multipart(raw: bytes, content_type: str) -> dict[str, bytes]:
    boundary = content_type.split("boundary=")[1].strip('"').encode()
    fields = {}
    for part in raw.split(b"--" + boundary)[1:-1]:
        head, _, value = part.partition(b"\r\n\r\n")
        name = re.search(rb'name="([^"]*)"', head)
        assert name is not None
        fields[name[1].decode()] = value.removesuffix(b"\r\n")
    return fields


# --------------------------------------------------------------------------------------------- Google


def _google_error(status: int, message: str, **more: Any) -> dict[str, Any]:
    return {"error": {"code": status, "message": message, "status": _STATUS.get(status, "UNKNOWN"), **more}}


def _messages(body: dict[str, Any]) -> list[dict[str, str]]:
    """Converts Gemini's contents to messages of a chat."""

    def joined(content: dict[str, Any]) -> str:
        return "".join(part.get("text", "") for part in content.get("parts", ()))

    system = body.get("systemInstruction") or body.get("system_instruction")
    first = [{"role": "system", "content": joined(system)}] if system else []
    roles = {"model": "assistant", "user": "user"}
    return first + [{"role": roles[one.get("role", "user")], "content": joined(one)} for one in body["contents"]]


def _google_reply(server: Server, model: str, body: dict[str, Any], fault: Fault | None) -> tuple[int, dict[str, Any]]:
    kind = fault.kind if fault else None
    if kind == "quota":
        message = "You exceeded your current quota, please check your plan and billing details."
        return 429, _google_error(429, message)
    if kind == "too_long":
        message = "The input token count (999) exceeds the maximum number of tokens allowed (100)."
        return 400, _google_error(400, message)
    if isinstance(kind, int):
        details = []
        if kind == 429 and fault and fault.retry_after is None and fault.message == "RetryInfo":
            details = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "7s"}]
        return kind, _google_error(kind, (fault and fault.message) or f"made up: status {kind}", details=details)
    if server.models is not None and model not in server.models:
        return 404, _google_error(404, f"models/{model} is not found for API version v1beta.")
    messages = _messages(body)
    config = body.get("generationConfig") or body.get("generation_config") or {}
    text, finish, tokens = _finished(
        server.text(messages, body),
        stops=config.get("stopSequences") or (),
        most=config.get("maxOutputTokens"),
        halve=kind == "length",
    )
    sent = server.prompt_factor * sum(len(_words(message["content"])) for message in messages)
    reply: dict[str, Any] = {"modelVersion": f"{model}-001", "responseId": f"r{server.new_id()}"}
    if kind == "prompt_filter":
        server.bill(sent, 0)
        usage = {"promptTokenCount": sent, "totalTokenCount": sent}
        return 200, reply | {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}, "usageMetadata": usage}
    # At least three tokens of thought, which are billed as output.
    thoughts = 3 + server.thinking
    server.bill(sent, tokens + thoughts)
    usage = {"promptTokenCount": sent, "candidatesTokenCount": tokens, "thoughtsTokenCount": thoughts}
    usage |= {"totalTokenCount": sent + tokens + thoughts}
    candidate: dict[str, Any] = {"index": 0, "finishReason": {"stop": "STOP", "length": "MAX_TOKENS"}[finish]}
    if kind == "filter":
        candidate["finishReason"] = "SAFETY"
    elif kind != "null":
        candidate["content"] = {"role": "model", "parts": [{"text": text}]}
    return 200, reply | {"candidates": [] if kind == "empty" else [candidate], "usageMetadata": usage}


def _google_lines(server: Server, model: str, lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers lines of {"key", "request"}, the last first, with their keys."""
    results = []
    for number, line in enumerate(lines):
        server.lines += 1
        fault = _fault(server.line_faults, number, line["request"])
        if fault is not None and fault.kind == "missing":
            continue
        head = {"key": line["key"]}
        if fault is not None and fault.kind == "malformed":
            results.append(head)
            continue
        status, reply = _google_reply(server, model, line["request"], fault)
        if status == 200:
            results.append(head | {"response": reply})
        else:
            error = {"code": {400: 3, 429: 8}.get(status, 13), "message": reply["error"]["message"]}
            results.append(head | {"error": error})
    return results[::-1]


def _google_other(
    server: Server, method: str, url: urllib.parse.SplitResult, raw: bytes, headers: dict[str, str]
) -> tuple[Any, ...]:
    """Answers requests about files and batches of Gemini and Vertex AI: (status, JSON or bytes[, headers])."""
    path = re.sub(r"^(/upload|/download)?/v1(beta1?)?", r"\1", url.path)
    query = dict(urllib.parse.parse_qsl(url.query))
    if path == "/upload/files" and headers.get("x-goog-upload-command", "start") == "start":
        place = f"{server.uploads_to or server.url}/upload/v1beta/files?upload_id={server.new_id()}"
        return 200, {}, {"x-goog-upload-url": place, "x-goog-upload-status": "active"}
    if path == "/upload/files":
        name = f"files/{query['upload_id']}"
        server.files[name] = server.files.get(name, b"") + raw
        final = "finalize" in headers["x-goog-upload-command"]
        body = {"file": {"name": name, "sizeBytes": str(len(server.files[name])), "mimeType": "application/jsonl"}}
        return 200, body, {"x-goog-upload-status": "final" if final else "active"}
    if match := re.fullmatch(r"(?:/download)?/(files/[^/:]+)(:download)?", path):
        if match[1] not in server.files:
            return 404, _google_error(404, f"{match[1]} is not found.")
        return 200, server.files[match[1]] if match[2] else {"name": match[1], "state": "ACTIVE"}
    if match := re.fullmatch(r"/models/([^/:]+):batchGenerateContent", path):
        if server.models is not None and match[1] not in server.models:
            return 404, _google_error(404, f"models/{match[1]} is not found for API version v1beta.")
        name = f"batches/b{server.new_id()}"
        source = json.loads(raw)["batch"]
        server.batches[name] = {"polls": 0, "model": match[1], "source": source["inputConfig"], "operation": {
            "name": name,
            "metadata": {
                "@type": "type.googleapis.com/google.ai.generativelanguage.v1main.GenerateContentBatch",
                "model": f"models/{match[1]}",
                "displayName": source.get("displayName", ""),
                "state": "BATCH_STATE_PENDING",
                "createTime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            },
        }}  # fmt: skip
        return 200, server.batches[name]["operation"]
    if path == "/batches":
        return _listed(server, query, "operations", [batch["operation"] for batch in server.batches.values()])
    if match := re.fullmatch(r"/(batches/[^/:]+)(:cancel)?", path):
        batch = server.batches.get(match[1])
        if batch is None:
            return 404, _google_error(404, f"{match[1]} is not found.")
        data = batch["operation"]["metadata"]
        if match[2]:
            data["state"] = "BATCH_STATE_CANCELLED"
            return 200, {}
        if data["state"] in ("BATCH_STATE_PENDING", "BATCH_STATE_RUNNING"):
            batch["polls"] += 1
            data["state"] = "BATCH_STATE_RUNNING"
            if batch["polls"] > server.batch_polls:
                _google_batch(server, batch)
        return 200, batch["operation"]
    if match := re.fullmatch(r"/(projects/[^/]+/locations/[^/]+)/batchPredictionJobs", path):
        if method == "GET":
            found = list(server.batches.values())
            if wanted := re.fullmatch(r'display_?[nN]ame="([^"]*)"', query.get("filter", "")):
                found = [job for job in found if job["displayName"] == wanted[1]]
            return _listed(server, query, "batchPredictionJobs", found)
        job = json.loads(raw)
        job |= {"name": f"{match[1]}/batchPredictionJobs/{server.new_id()}", "state": "JOB_STATE_PENDING"}
        server.batches[job["name"]] = job
        return 200, job
    if match := re.fullmatch(r"/(projects/[^/]+/locations/[^/]+/batchPredictionJobs/[^/:]+)(:cancel)?", path):
        job = server.batches.get(match[1])
        if job is None:
            return 404, _google_error(404, f"{match[1]} is not found.")
        if match[2]:
            job["state"] = "JOB_STATE_CANCELLED"
            return 200, {}
        job["polls"] = job.get("polls", 0) + 1
        if job["state"] in ("JOB_STATE_PENDING", "JOB_STATE_RUNNING"):
            job["state"] = "JOB_STATE_RUNNING" if job["polls"] <= server.batch_polls else "JOB_STATE_SUCCEEDED"
            if job["state"] == "JOB_STATE_SUCCEEDED":
                _vertex_batch(server, job)
        return 200, job
    if path.startswith(("/storage", "/upload/storage")):
        return _bucket(server, method, path, query, raw)
    return 404, _google_error(404, f"Not found: {method} {url.path}")


def _listed(server: Server, query: dict[str, str], name: str, items: list[dict[str, Any]]):
    del server
    start, size = int(query.get("pageToken", 0)), int(query.get("pageSize", 50))
    newest_first = items[::-1]
    reply: dict[str, Any] = {name: newest_first[start : start + size]}
    if start + size < len(items):
        reply["nextPageToken"] = str(start + size)
    return 200, reply


def _google_batch(server: Server, batch: dict[str, Any]) -> None:
    source, data = batch["source"], batch["operation"]["metadata"]
    text = server.files[source["fileName"]]
    results = _google_lines(server, batch["model"], [json.loads(line) for line in text.split(b"\n") if line])
    name = f"files/{server.new_id()}"
    server.files[name] = "\n".join(json.dumps(line, ensure_ascii=False) for line in results).encode()
    data["output"] = {"responsesFile": name}
    data["state"] = "BATCH_STATE_SUCCEEDED"
    failed = sum("error" in line for line in results)
    counts = {"requestCount": len(results), "successfulRequestCount": len(results) - failed}
    data["batchStats"] = {name: str(count) for name, count in {**counts, "failedRequestCount": failed}.items()}
    batch["operation"] |= {"done": True, "response": data["output"]}


def _vertex_batch(server: Server, job: dict[str, Any]) -> None:
    """Reads the job's gs:// lines and writes <outputUriPrefix>/prediction-x/predictions.jsonl beside them."""
    (source,) = job["inputConfig"]["gcsSource"]["uris"]
    model = job["model"].rpartition("/")[2]
    out = []
    lines = [json.loads(line) for line in server.files[source].splitlines()]
    for number, line in enumerate(lines):
        server.lines += 1
        fault = _fault(server.line_faults, number, line["request"])
        if fault is not None and fault.kind == "missing":
            continue
        status, reply = _google_reply(server, model, line["request"], fault)
        bad = status != 200
        word = f"Error: {reply['error']['status']}: {reply['error']['message']}" if bad else ""
        out.append({**line, "status": word, "response": {} if bad else reply, "processed_time": "2026-01-01T00:00:00Z"})
    folder = f"{job['outputConfig']['gcsDestination']['outputUriPrefix'].rstrip('/')}/prediction-model-2026"
    server.files[f"{folder}/predictions.jsonl"] = "\n".join(json.dumps(line) for line in reversed(out)).encode()
    job["outputInfo"] = {"gcsOutputDirectory": folder}
    job["completionStats"] = {"successfulCount": str(sum(not x["status"] for x in out)), "failedCount": "0"}


def _bucket(server: Server, method: str, path: str, query: dict[str, str], raw: bytes):
    """Answers as Cloud Storage's JSON API for uploads, listings and downloads."""
    bucket = path.partition("/b/")[2].partition("/")[0]
    if bucket in server.denied:
        return 403, _google_error(403, f"You may not use the bucket {bucket}.")
    if method == "POST" and (match := re.fullmatch(r"/upload/storage/v1/b/([^/]+)/o", path)):
        server.files[f"gs://{match[1]}/{query['name']}"] = raw
        return 200, {"name": query["name"], "bucket": match[1], "size": str(len(raw))}
    if match := re.fullmatch(r"/storage/v1/b/([^/]+)/o", path):
        start = f"gs://{match[1]}/"
        names = [name.removeprefix(start) for name in server.files if name.startswith(start + query.get("prefix", ""))]
        names = [n for n in names if query.get("startOffset", "") <= n < query.get("endOffset", "\U0010ffff")]
        return 200, {"items": [{"name": name} for name in sorted(names)]}
    if match := re.fullmatch(r"/storage/v1/b/([^/]+)/o/(.+)", path):
        name = f"gs://{match[1]}/{urllib.parse.unquote(match[2])}"
        return (
            (200, server.files[name]) if name in server.files else (404, _google_error(404, f"No such object: {name}"))
        )
    return 404, _google_error(404, path)


# ----------------------------------------------------------------------------------------------- HTTP


class _Connection(asyncio.Protocol):
    """Serves one connection: requests one after the other, each answered by a task."""

    def __init__(self, server: Server, open_ones: set[_Connection]) -> None:
        self._server, self._open = server, open_ones
        self._buffer = b""
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._server.connections += 1
        self._server.open_now += 1
        self._open.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._open.discard(self)
        self._server.open_now -= 1
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._task is None:
            self._next()

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._transport.abort()

    def _next(self) -> None:
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ")
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        if headers.get("transfer-encoding") == "chunked":
            whole = _unchunked(rest)
            if whole is None:
                return
            body, self._buffer = whole
        else:
            length = int(headers.get("content-length", 0))
            if len(rest) < length:
                return
            body, self._buffer = rest[:length], rest[length:]
        self._task = asyncio.get_running_loop().create_task(self._serve(method, target, headers, body))
        self._task.add_done_callback(self._served)

    def _served(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            # A mistake in the server or in `answer` must be seen in the test, not as a time-out.
            print(f"teacher_server: {error!r}", file=sys.stderr)
            self._send(500, _google_error(500, f"the test's server failed: {error!r}"))
        if not self._transport.is_closing():
            self._next()

    async def _serve(self, method: str, target: str, headers: dict[str, str], raw: bytes) -> None:
        server = self._server
        url = urllib.parse.urlsplit(target)
        server.paths[f"{method} {url.path}"] += 1
        if server.moves is not None and re.search(server.moves, f"{method} {url.path}"):
            self._send(server.moved_status, b"", {"Location": f"{server.moved_to}{target}"})
            return
        if url.path.startswith(f"{server.root}/") and url.query == server.query:
            url = url._replace(path=f"/v1/{url.path.removeprefix(f'{server.root}/')}")
        elif server.root != "/v1":
            self._send(404, {"error": {"code": "404", "message": "Resource not found"}})
            return
        google = "x-goog-api-client" in headers or not url.path.startswith("/v1/")
        if refusal := self._refusal(headers, google=google):
            self._send(*refusal)
            return
        asked = re.fullmatch(r"/v1/(?:chat/)?completions|.*/models/([^/:]+):generateContent", url.path)
        if asked is None:
            other = _google_other if google else _openai_other
            self._send(*other(server, method, url, raw, headers))
            return
        body = json.loads(raw)
        number = server.asked
        server.asked += 1
        server.in_flight += 1
        server.most_in_flight = max(server.most_in_flight, server.in_flight)
        if server.keep:
            server.bodies.append(body)
            server.headers.append(headers)
        try:
            await self._generate(number, url.path, asked[1], body)
        finally:
            server.in_flight -= 1

    def _refusal(self, headers: dict[str, str], *, google: bool) -> tuple[int, dict[str, Any]] | None:
        key = self._server.key
        name = self._server.key_header
        bearer = headers.get(name, "").removeprefix("Bearer ") if name == "authorization" else headers.get(name, "")
        given = headers.get("x-goog-api-key") or bearer
        if name != "authorization" and "authorization" in headers:  # Azure reads it as a token, first
            given = headers["authorization"]
        if key is None or given == key:
            return None
        if google and "x-goog-api-key" in headers:
            return 400, _google_error(400, "API key not valid. Please pass a valid API key.", details=[
                {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}])  # fmt: skip
        if google:
            return 401, _google_error(401, "Request had invalid authentication credentials.")
        # Like the real one, it repeats the key.
        return 401, _openai_error(401, f"Incorrect API key provided: {given}.", "invalid_api_key")

    async def _generate(self, number: int, path: str, model: str | None, body: dict[str, Any]) -> None:
        server = self._server
        fault = _fault(server.faults, number, body)
        kind = fault.kind if fault else None
        # What is generated is billed, whether it arrives or not.
        if model is None:
            status, reply = _openai_reply(server, path, body, fault)
        else:
            status, reply = _google_reply(server, model, body, fault)
        if kind == "hang":
            await asyncio.sleep(3600)
        if kind == "close":
            self._transport.close()
            return
        if not isinstance(kind, int):
            wait = server.latency() if callable(server.latency) else server.latency
            wait += fault.seconds if fault is not None and kind == "late" else 0
            if wait:
                await asyncio.sleep(wait)
        more = {"Retry-After": fault.retry_after} if fault is not None and fault.retry_after is not None else {}
        content = json.dumps(reply).encode()
        if fault is not None:
            more |= fault.headers
            if fault.body is not None:
                content = fault.body if isinstance(fault.body, bytes) else json.dumps(fault.body).encode()
        if kind == "endless":
            self._transport.write(self._head(200, 1 << 50, more))
            while not self._transport.is_closing():
                if self._transport.get_write_buffer_size() < 1 << 20:
                    self._transport.write(bytes(1 << 16))
                await asyncio.sleep(0)
            return
        if kind == "malformed":
            content = content[: len(content) // 2]
        elif kind == "html":
            content, more = b"<html><body>Please sign in to the network.</body></html>", {"Content-Type": "text/html"}
        elif kind == "nothing":
            content = b""
        if fault is not None and kind == "reset":
            self._transport.write(self._head(status, len(content), more) + content[: len(content) // 2])
            await asyncio.sleep(0.02)
            linger = struct.pack("ii", 1, 0)  # a reset, not an orderly end
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self._transport.abort()
            return
        if fault is not None and kind == "slow":
            self._transport.write(self._head(status, len(content), more))
            for index in range(len(content)):
                self._transport.write(content[index : index + 1])
                await asyncio.sleep(fault.seconds)
        else:
            self._send(status, content, more)
        if status == 200 and kind not in ("html", "nothing", "malformed", "empty", "null", "prompt_filter"):
            server.replied += 1

    def _head(self, status: int, length: int, more: dict[str, str]) -> bytes:
        headers = {"Content-Type": "application/json", "Content-Length": str(length), "x-request-id": "req-1", **more}
        lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Error')}", *(f"{k}: {v}" for k, v in headers.items())]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    def _send(self, status: int, reply: bytes | dict[str, Any], more: dict[str, str] | None = None) -> None:
        content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self._transport.write(self._head(status, len(content), more or {}) + content)


def _unchunked(rest: bytes) -> tuple[bytes, bytes] | None:
    body = b""
    while True:
        size, found, after = rest.partition(b"\r\n")
        if not found:
            return None
        length = int(size, 16)
        if len(after) < length + 2:
            return None
        body, rest = body + after[:length], after[length + 2 :]
        if length == 0:
            return body, rest


async def _serve_until(server: Server, port: int, ready: Callable[[], None], stop: asyncio.Event) -> None:
    open_ones: set[_Connection] = set()
    listener = await asyncio.get_running_loop().create_server(
        lambda: _Connection(server, open_ones), "127.0.0.1", port, backlog=4096
    )
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    ready()
    await stop.wait()
    listener.close()
    for connection in list(open_ones):
        connection.close()
    await asyncio.sleep(0.01)


@contextlib.contextmanager
def served(*, port: int = 0, **options: Any) -> Iterator[Server]:
    """Starts a server in a thread; the options are fields of `Server`."""
    server = Server(**options)
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    ready = threading.Event()

    def work() -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(_serve_until(server, port, ready.set, stop))
        finally:
            ready.set()
            loop.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    ready.wait(10)
    if not server.url:
        raise OSError(f"the test's server did not start on port {port}")
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)


@contextlib.contextmanager
def apart(*, latency: float = 0.0, reply: str = REPLY) -> Iterator[str]:
    """Starts a server in a process of its own, for measurements; yields its URL (OpenAI's base_url is this + "/v1")."""
    command = [sys.executable, __file__, "--latency", str(latency), "--reply", reply]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description="A hosted teacher over loopback.")
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--reply", default=REPLY)
    parser.add_argument("--port", type=int, default=0)
    given = parser.parse_args()
    options = {"answer": lambda prompt: given.reply, "latency": given.latency, "keep": False}
    with served(port=given.port, **options) as server:
        print(server.url, flush=True)
        sys.stdin.read()  # until whoever started it is gone


if __name__ == "__main__":
    main()
