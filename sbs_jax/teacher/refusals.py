"""What comes back in place of a reply, in our words: Fatal, Again or Failed, whoever was asked.

Statuses, lost connections, bodies that hold no reply, requests that cannot be sent. What a provider says of them is
quoted on one line, without the key and without anything that looks like one.
"""

from __future__ import annotations

import contextlib
import email.utils
import json
import math
import re
import time
from collections.abc import Mapping
from typing import Any

from sbs_jax.teacher.clients import CONTENT_FILTER, LENGTH, STOP, TOO_LONG, Again, Failed, Fatal, Reply

_LONGER = re.compile(
    r"context[ _]length|maximum context|maximum model length|input token count|number of tokens allowed"
    r"|prompt is too long|too many (input )?tokens|input is too long",
    re.IGNORECASE,
)
_FILTER = re.compile(r"content_filter|content_policy|content management policy|content filter", re.IGNORECASE)
_NO_KEY = re.compile(r"api_key|api key (not valid|expired)", re.IGNORECASE)
_NO_MONEY = re.compile(r"insufficient_quota|billing_hard_limit|billing_not_active|credits are depleted", re.IGNORECASE)
_LOOKS_SECRET = re.compile(r"\b(?:sk|pk|rk)-[\w*.-]{6,}|\bAIza[\w*-]{6,}|\bya29\.[\w.-]+|\bBearer\s+\S+")


def problem(
    status: int,
    message: str,
    *,
    code: str = "",
    retry_after: float | None = None,
    secrets: tuple[str, ...] = (),
) -> Exception:
    """Fatal, Again or Failed for an HTTP status other than 200. `code` is the provider's word for it."""
    said = f"{status}: {short(message, *secrets)}"
    both = f"{code} {message}"
    if status == 402 or (status == 429 and _NO_MONEY.search(both)):
        return Fatal(f"The account's money or quota is used up ({said}).")
    if status == 429:
        return Again(f"Asked too often ({said}).", retry_after=retry_after, limited=True)
    if status in (408, 409, 425) or status >= 500:
        # 529 is the word of some for what 503 says: too many are asking.
        return Again(f"The teacher is in trouble ({said}).", retry_after=retry_after, limited=status in (503, 529))
    if status in (401, 403) or (status == 400 and _NO_KEY.search(both)):
        return Fatal(f"The teacher refuses the credentials ({said}); check the key, and what it may use.")
    if status == 404:
        return Fatal(f"There is no such model or address ({said}); check --model and --base_url.")
    if status == 413 or (status in (400, 422) and _LONGER.search(both)):
        return Failed(f"The prompt is longer than the model's context ({said}).", reason=TOO_LONG)
    if status in (400, 422) and _FILTER.search(both):
        return Failed(f"The provider's content filter refuses the prompt ({said}).", reason=CONTENT_FILTER)
    return Fatal(f"The teacher refuses the request ({said}).")


def disconnected(error: BaseException, *, secrets: tuple[str, ...]) -> Again:
    """For an exception of the connection: refused, reset, or closed before the reply was whole."""
    told = short(str(error), *secrets)
    return Again(f"The connection failed: {type(error).__name__}{told and f' ({told})'}.")


def too_slow(seconds: float) -> Again:
    """For a reply that was not whole after so many seconds."""
    return Again(f"No whole reply within {seconds:g} s (--timeout).")


def not_read(error: ValueError, *, secrets: tuple[str, ...]) -> Exception:
    """Where the SDK reads a body that is not JSON; and its word for an argument that it does not take."""
    if isinstance(error, json.JSONDecodeError):
        return Again(f"The reply is not JSON: {short(error.doc, *secrets)!r}")
    return Fatal(f"The SDK refuses the request: {short(str(error), *secrets)}")


def not_text() -> Failed:
    """For a prompt that cannot be encoded."""
    return Failed("The prompt holds half of a surrogate pair, which cannot be sent as UTF-8.", reason="not_text")


def no_reply(what: str, data: object) -> Again:
    """For a body of status 200 without a reply; `what` is what it has instead."""
    try:
        told = json.dumps(data)
    except RecursionError:
        told = "nested too deeply to show"
    return Again(f"The reply has {what}: {short(told)}")


def check_stops(provider: str, stops: tuple[str, ...], *, most: int) -> None:
    """Fatal where there are more stop strings than the provider takes."""
    if len(stops) > most:
        raise Fatal(f"There are {len(stops)} stop strings; {provider} takes at most {most}. Name fewer with --stop.")


def reply(text: Any, *, finish: Any, data: object, **fields: Any) -> Reply:
    """A reply, unless it is empty. One that was cut short before its first word (in thought) is a reply: of no text."""
    finish = STOP if finish is None else _storable(str(finish))
    if finish != LENGTH and not (text and text.strip()):
        raise no_reply("no text", data)
    model = fields["model"]
    return Reply(
        text=_storable(text or ""),
        finish=finish,
        input_tokens=_tokens(fields["input_tokens"]),
        output_tokens=_tokens(fields["output_tokens"]),
        model=_storable(model) if isinstance(model, str) else "",
    )


def _storable(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair, which JSON can bring and no file can hold."""
    return text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _tokens(value: Any) -> int | None:
    """A provider's count; None where it is no number that could be one."""
    return value if type(value) is int and 0 <= value < 2**53 else None


def json_object(content: str | bytes) -> Mapping[str, Any]:
    """The JSON object that a body of status 200 has to be."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        text = content.decode("utf-8", "replace") if isinstance(content, bytes) else content
        raise Again(f"The reply is not a JSON object: {short(text)!r}")
    return value


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds, from `retry-after-ms`, or `retry-after` as a number or as a date; None where neither says."""
    with contextlib.suppress(KeyError, ValueError):
        return _seconds(float(headers["retry-after-ms"]) / 1000)
    told = headers.get("retry-after")
    if told is None:
        return None
    with contextlib.suppress(ValueError):
        return _seconds(float(told))
    with contextlib.suppress(ValueError, TypeError):
        return _seconds(email.utils.parsedate_to_datetime(told).timestamp() - time.time())
    return None


def _seconds(value: float) -> float | None:
    return max(0.0, value) if math.isfinite(value) else None


def short(text: str, *secrets: str) -> str:
    """At most 300 characters of one line, without any of `secrets` and without what looks like one."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, "[key]")
    text = " ".join(_LOOKS_SECRET.sub("[key]", text).split())
    return text if len(text) <= 300 else f"{text[:300]} .."
