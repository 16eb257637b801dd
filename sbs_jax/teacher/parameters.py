"""Parameters that a model does not take: which one a refusal is about, and a request's body without it.

Models differ in `temperature` (reasoning models), `max_tokens` against `max_completion_tokens`, `seed`, `stop`.
A refusal costs nothing, so the request is repeated without the parameter (`connections.HostedClient.send_accepted`).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from sbs_jax.teacher import refusals
from sbs_jax.teacher.clients import STOP, Reply

# What refusals call a parameter of OpenAI's and Gemini's bodies; of two in one refusal, the first here.
_STOPS = r"stop(?:[_ ]?(?:sequence|string|word)s?)?"
_WORDS = {
    "max_tokens": "max_tokens",
    "max_completion_tokens": "max_completion_tokens",
    "stop": _STOPS,
    "stopSequences": _STOPS,
    "seed": "seed",
    "top_p": "top_?p",
    "topP": "top_?p",
    "temperature": "temperature",
}
ANY = dict.fromkeys(_WORDS, 1.0)  # a body with every parameter
_OTHER_NAME = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
_UNKNOWN = re.compile(
    r"unsupported|(?:not|n't) (?:be )?(?:support|permit|allow|accept|compatib|recogni|available)|extra_forbidden"
    r"|extra (?:input|field|argument)|unknown|unrecogni|unexpected|deprecated|no such|cannot find|cannot both",
    re.IGNORECASE,
)
_WRONG = re.compile(
    r"invalid|must be|should be|too (?:long|many)|strictly|at (?:least|most)|can(?:not|'t)", re.IGNORECASE
)
_ROLE = r"(?:parameter|argument|field|option|property|name|input|supplied|permitted|allowed|supported)(?:s|\(s\))?"


def refused(status: int, answer: object, body: Mapping[str, Any]) -> str | None:
    """Returns the parameter of a request's body that the answer refuses, or None.

    The refusal names it in `param` (OpenAI), at the end of `loc` (pydantic) or in its message. A temperature above 0
    that is out of range is not meant: the user has to correct it.
    """
    if status not in (400, 422):
        return None
    fields, message = refusals.described(answer)
    text = f"{message} {refusals.written(answer)}"[:10_000]
    unknown, wrong = _UNKNOWN.search(text), _WRONG.search(text)
    sent = {**body, **body.get("generationConfig", {})}
    for name, word in _WORDS.items():
        fits = unknown or (wrong and (word in (_STOPS, "seed") or (name not in _OTHER_NAME and not sent.get(name))))
        if name in sent and fits and _is_about(word, fields.get("param"), text):
            return name
    return None


def _is_about(word: str, param: object, text: str) -> bool:
    if isinstance(param, str) and param.strip():
        return re.search(rf"(?:^|[.\]/ ]){word}$", param.strip(), re.IGNORECASE) is not None
    if word in ("temperature", "top_?p"):
        return re.search(rf"\b{word}\b", text, re.IGNORECASE) is not None
    # "stop" and "seed" are also words of other sentences.
    quoted, after = rf"""['"`]{word}['"`\\]""", r"\s*(?::|(?:is|are|does|do|must|should|cannot)\b)"
    pattern = rf"{quoted}|\b{_ROLE}\s*[:=]?\s*{word}\b|\b{word}\s+{_ROLE}|\b{word}{after}"
    return re.search(pattern, text, re.IGNORECASE) is not None


def without(body: Mapping[str, Any], left_out: Collection[str]) -> dict[str, Any]:
    """Returns a body without some parameters; `max_tokens` and `max_completion_tokens` replace each other."""
    kept = {_OTHER_NAME.get(name, "") if name in left_out else name: value for name, value in body.items()}
    kept.pop("", None)
    if "generationConfig" in kept:
        kept["generationConfig"] = without(kept["generationConfig"], left_out)
    return kept


def with_more(body: dict[str, Any], more: str) -> dict[str, Any]:
    """Merges the user's JSON object into a body (RFC 7396): objects are merged, null removes a name."""

    def merged(old: Any, new: Any) -> Any:
        if not isinstance(new, dict):
            return new
        result = dict(old) if isinstance(old, dict) else {}
        for name, value in new.items():
            if value is None:
                result.pop(name, None)
            else:
                result[name] = merged(result.get(name), value)
        return result

    return merged(body, json.loads(more)) if more else body


def cut(reply: Reply, stops: tuple[str, ...]) -> Reply:
    """Ends a reply at its first stop string, for a model that does not take them."""
    ends = [reply.text.find(stop) for stop in stops if stop in reply.text]
    return dataclasses.replace(reply, text=reply.text[: min(ends)], finish=STOP) if ends else reply
