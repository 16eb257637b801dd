"""Provider errors as Fatal, Again or Failed: statuses, lost connections, bodies without a reply.

`problem` is the only place that reads an error body, and `_OUTCOMES` the only table. Messages quote the provider on
one line, without the key and without anything that looks like one.
"""

from __future__ import annotations

import contextlib
import email.utils
import json
import logging
import math
import re
import time
import types
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from sbs_jax.teacher.clients import CONTENT_FILTER, LENGTH, STOP, TOO_LONG, Again, Failed, Fatal, Reply

_LONGER = re.compile(
    r"context[ _]length|maximum context|maximum model length|input token count|number of tokens allowed"
    r"|prompt is too long|too many (input )?tokens|input is too long",
    re.IGNORECASE,
)
_FILTER = re.compile(r"content_filter|content_policy|content management policy|content filter", re.IGNORECASE)
_NO_KEY = re.compile(r"api_key|api key (not valid|expired)", re.IGNORECASE)
# Gemini's 429 mentions "quota" for every limit; only "PerDay" and depleted credits last longer than a minute.
_NO_MONEY = re.compile(
    r"insufficient_quota|billing_hard_limit|billing_not_active|credits are depleted|PerDay", re.IGNORECASE
)
_LOOKS_SECRET = re.compile(r"\b(?:sk|pk|rk)-[\w*.-]{6,}|\bAIza[\w*-]{6,}|\bya29\.[\w.-]+|\bBearer\s+\S+")

log = logging.getLogger(__name__)
_PAST_CONTEXT, _FILTERED = partial(Failed, reason=TOO_LONG), partial(Failed, reason=CONTENT_FILTER)
_LIMITED = partial(Again, limited=True)
_ANY = re.compile("")
# Statuses, a pattern of the provider's code and message, the exception, and its text; the first match counts.
_OUTCOMES: tuple[tuple[Collection[int], re.Pattern[str], Callable[[str], Exception], str], ...] = (
    ((402,), _ANY, Fatal, "The account's money or quota is used up ({said})."),
    ((429,), _NO_MONEY, Fatal, "The account's money or quota is used up ({said})."),
    ((429,), _ANY, _LIMITED, "Asked too often ({said})."),
    ((503, 529), _ANY, _LIMITED, "The teacher has a temporary error ({said})."),  # some providers send 529 for 503
    ((408, 409, 425, *range(500, 600)), _ANY, Again, "The teacher has a temporary error ({said})."),
    ((401, 403), _ANY, Fatal, "The teacher refuses the credentials ({said}); check the key and its permissions."),
    ((400,), _NO_KEY, Fatal, "The teacher refuses the credentials ({said}); check the key and its permissions."),
    ((404,), _ANY, Fatal, "There is no such model or address ({said}); check --model and --base_url."),
    ((413,), _ANY, _PAST_CONTEXT, "The prompt is longer than the model's context ({said})."),
    ((400, 422), _LONGER, _PAST_CONTEXT, "The prompt is longer than the model's context ({said})."),
    ((400, 422), _FILTER, _FILTERED, "The provider's content filter refuses the prompt ({said})."),
)

BROKEN = "broken"
# Words for the end of a reply, of OpenAI, Gemini, Mistral, Cohere, Anthropic, TGI, vLLM, llama.cpp and others
# ("MAX_TOKENS", "eos_token", "ERROR_TOXIC", "model_length", "tool_calls"); the first match counts.
_ENDS = tuple(
    (meaning, re.compile(words, re.IGNORECASE))
    for meaning, words in (
        (CONTENT_FILTER, "filter|safety|recitation|block|prohibit|spii|armor|guardrail|sensitiv|toxic|moderat|refus"),
        (LENGTH, "length|max|limit|truncat|context|incomplete|unfinished"),
        (BROKEN, "error|fail|abort|cancel|interrupt|time_?d?_?out|malformed|tool|function|resource|unexpected"
         "|other|language|unspecified|missing|load|image"),
        (STOP, "stop|eos|end|complete|finish|done|success"),
    )
)  # fmt: skip
_unknown_ends: set[str] = set()


class RefusedError(Exception):
    """An answer with a status of 400 or more, as it came; `problem` describes it."""

    def __init__(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        super().__init__(str(status))
        self.status, self.body, self.headers = status, body, headers


def problem(
    status: int, body: object, *, headers: Mapping[str, str] = types.MappingProxyType({}), secrets: tuple[str, ...] = ()
) -> Exception:
    """Returns Fatal, Again or Failed for a status of 400 or more and the body that came with it, of any form.

    The body is bytes, or what they hold already read from JSON.
    """
    fields, message = described(body)
    details = written(fields.get("details") or "")  # Google's
    said = f"{status}: {short(message, *secrets) or 'no reason given'}"
    named = " ".join(
        f"{fields[name]}" for name in ("code", "type", "status") if isinstance(fields.get(name), str | int)
    )
    for statuses, words, outcome, text in _OUTCOMES:
        if min(status, 599) in statuses and words.search(f"{named} {message} {details}"):
            found = outcome(text.format(said=said))
            if isinstance(found, Again):
                found.retry_after = retry_after(headers)
                if found.retry_after is None and (delay := re.search(r'"retryDelay": "(\d+(?:\.\d+)?)s"', details)):
                    found.retry_after = _seconds(float(delay[1]))
            return found
    return Fatal(f"The teacher refuses the request ({said}).")


def described(body: object) -> tuple[Mapping[str, Any], str]:
    """Returns the fields of an error (code, type, ..) and its message: a text if one is found, else all of the body."""
    whole = ""
    if isinstance(body, bytes):
        whole = written(body)
        try:
            body = json.loads(body)
        except (ValueError, RecursionError):
            return {}, whole
    at = body[0] if isinstance(body, list) and len(body) == 1 else body
    while isinstance(at, Mapping) and isinstance(at.get("error"), Mapping):
        at = at["error"]
    if not isinstance(at, Mapping):
        return {}, at if isinstance(at, str) else whole or written(at)
    texts = [at[name] for name in ("error", "message", "detail", "msg") if at.get(name)]
    # OpenRouter's metadata hold the words of the server behind it.
    plain = texts and all(isinstance(text, str) for text in texts) and not at.get("metadata")
    return at, ": ".join(dict.fromkeys(texts)) if plain else whole or written(at)


def disconnected(error: BaseException, *, secrets: tuple[str, ...]) -> Again:
    """Describes a connection that was refused, reset, or closed before the reply was complete."""
    detail = short(str(error), *secrets)
    return Again(f"The connection failed: {type(error).__name__}{detail and f' ({detail})'}.")


def not_read(error: ValueError | RecursionError, *, secrets: tuple[str, ...]) -> Exception:
    """Describes an SDK's exception: a body that is not JSON or nests too deeply, or an argument that it rejects."""
    if isinstance(error, RecursionError):
        return Again("The reply is JSON that nests too deeply.")
    if isinstance(error, json.JSONDecodeError):
        return Again(f"The reply is not JSON: {short(error.doc, *secrets)!r}")
    return Fatal(f"The SDK refuses the request: {short(str(error), *secrets)}")


def no_reply(what: str, data: object) -> Again:
    """Describes a body of status 200 without a reply; `what` describes its contents."""
    return Again(f"The reply has {what}: {short(written(data))}")


def written(value: object) -> str:
    """Writes an answer, bytes or read from JSON, as text."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    try:
        return json.dumps(value, ensure_ascii=False, default=str) if value else ""
    except RecursionError:
        return "nested too deeply to show"


def check_stops(provider: str, stops: tuple[str, ...], *, most: int) -> None:
    """Raises Fatal for more stop strings than the provider takes."""
    if len(stops) > most:
        raise Fatal(
            f"There are {len(stops)} stop strings; {provider} takes at most {most}. Shorten `stops` of the prompt."
        )


def ended(word: object) -> str:
    """Returns the meaning of a provider's word for the end of a reply: `STOP`, `LENGTH`, `CONTENT_FILTER` or `BROKEN`.

    A reply with an unknown word counts as whole, and the log says so once; the word itself is returned.
    """
    if not word:
        return STOP
    said = str(word)[:100]
    for meaning, words in _ENDS:
        if words.search(said):
            return meaning
    said = short(said)
    if said not in _unknown_ends and len(_unknown_ends) < 20:
        _unknown_ends.add(said)
        log.warning("The teacher ended a reply with %r, a word we do not know; such replies count as whole.", said)
    return said


def reply(text: Any, *, finish: Any, data: object, model: Any, input_tokens: Any, output_tokens: Any) -> Reply:
    """Makes a reply, if it is whole or truncated; a truncated one may be empty (all of it was thinking)."""
    end = ended(finish)
    if end == CONTENT_FILTER:
        raise Failed(f"The provider's content filter stopped the reply ({short(str(finish))}).", reason=CONTENT_FILTER)
    if end == BROKEN:
        raise Again(f"The teacher broke the reply off ({short(str(finish))}).")
    if end != LENGTH and not (text and text.strip()):
        raise no_reply("no text", data)
    return Reply(
        text=_storable(text or ""),
        finish=end,
        input_tokens=_tokens(input_tokens),
        output_tokens=_tokens(output_tokens),
        model=_storable(model) if isinstance(model, str) else "",
    )


def _storable(text: str) -> str:
    """Replaces unpaired surrogates (possible in JSON, not in UTF-8) by U+FFFD."""
    return text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _tokens(value: Any) -> int | None:
    """Returns a provider's count, None if it is not a plausible number."""
    return value if type(value) is int and 0 <= value < 2**53 else None


def json_object(content: str | bytes) -> Mapping[str, Any]:
    """Parses a body of status 200; raises Again if it is not a JSON object."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        text = content.decode("utf-8", "replace") if isinstance(content, bytes) else content
        raise Again(f"The reply is not a JSON object: {short(text)!r}")
    return value


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Reads seconds from `retry-after-ms` or `retry-after` (a number or a date); None without a usable one."""
    with contextlib.suppress(KeyError, ValueError):
        return _seconds(float(headers["retry-after-ms"]) / 1000)
    value = headers.get("retry-after")
    if value is None:
        return None
    with contextlib.suppress(ValueError):
        return _seconds(float(value))
    with contextlib.suppress(ValueError, TypeError):
        return _seconds(email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return None


def _seconds(value: float) -> float | None:
    return max(0.0, value) if math.isfinite(value) else None


def short(text: str, *secrets: str) -> str:
    """Returns at most 300 characters on one line, with `secrets` and anything like a key replaced by "[key]"."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, "[key]")
    text = " ".join(_LOOKS_SECRET.sub("[key]", text).split())
    # Without control characters, for terminals, and unpaired surrogates, for files.
    text = "".join(each if each.isprintable() else "\ufffd" for each in text[:302])
    return text if len(text) <= 300 else f"{text[:300]} .."
