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
from functools import partial, wraps
from typing import Any

from sbs_jax.teacher.clients import (
    CONTENT_FILTER,
    LENGTH,
    REFUSED,
    STOP,
    TOO_LONG,
    Again,
    Failed,
    Fatal,
    Gone,
    Problem,
    Refused,
    Reply,
)

# These wordings only name a refusal of a row; that it is one, shows in the rows that are answered (`Refused`).
_LONGER = re.compile(
    r"context[ _](length|size|window)|maximum context|maximum model length|input token count|number of tokens allowed"
    r"|(prompt|input) is too long|too many (input )?tokens|tokens?\b.{0,40} must be <",
    re.IGNORECASE,
)
_FILTER = re.compile(
    r"content_filter|content[ _]policy|content management policy|content filter|flagged|moderation|usage polic",
    re.IGNORECASE,
)
_NO_KEY = re.compile(r"api_key|api key (not valid|expired)", re.IGNORECASE)
_NO_FILE = re.compile(r"\bfile\b.*\bmay not exist", re.IGNORECASE)  # Gemini's words for a file that it has removed
# Gemini's 429 mentions "quota" for every limit; only "PerDay" and depleted credits last longer than a minute.
_NO_MONEY = re.compile(
    r"insufficient_quota|insufficient (funds|balance|credits)|billing_hard_limit|billing_not_active"
    r"|credits are depleted|PerDay|credit balance|key limit exceeded",
    re.IGNORECASE,
)
_NO_ACCESS = re.compile(
    r"permission|api[ _]key|credential|not have access|unsupported_country|not been used|is disabled", re.IGNORECASE
)
_LOOKS_SECRET = re.compile(r"\b(?:sk|pk|rk)-[\w*.-]{6,}|\bAIza[\w*-]{6,}|\bya29\.[\w.-]+|\bBearer\s+\S+")

log = logging.getLogger(__name__)
_PAST_CONTEXT, _FILTERED = partial(Refused, reason=TOO_LONG), partial(Refused, reason=CONTENT_FILTER)
_LIMITED, _TIMED_OUT = partial(Again, limited=True), partial(Again, lost=True)
_ANY = re.compile("")
_Reader = Callable[[Mapping[str, Any]], Reply]
_OF_A_ROW = (400, 403, 413, 422)
_MONEY = "The account's money or quota is used up ({said})."
_KEY = "The teacher refuses the credentials ({said}); check the key and its permissions."
# Statuses, a pattern of the provider's code and message, the exception, and its text; the first match counts.
_OUTCOMES: tuple[tuple[Collection[int], re.Pattern[str], Callable[[str], Problem], str], ...] = (
    ((402,), _ANY, Fatal, _MONEY),
    ((400, 403, 429), _NO_MONEY, Fatal, _MONEY),
    ((429,), _ANY, _LIMITED, "Asked too often ({said})."),
    ((503, 529), _ANY, _LIMITED, "The teacher has a temporary error ({said})."),  # some providers send 529 for 503
    # A proxy's time-out: the teacher behind it may have replied.
    ((408, 504, 524), _ANY, _TIMED_OUT, "The teacher has a temporary error ({said})."),
    ((409, 425, *range(500, 600)), _ANY, Again, "The teacher has a temporary error ({said})."),
    ((401,), _ANY, Fatal, _KEY),
    ((400,), _NO_KEY, Fatal, _KEY),
    ((403,), _NO_FILE, Gone, "There is no such file ({said})."),
    ((404, 410), _ANY, Gone, "There is no such model or address ({said}); check --model and --base_url."),
    ((413,), _ANY, _PAST_CONTEXT, "The prompt is longer than the model's context ({said})."),
    (_OF_A_ROW, _LONGER, _PAST_CONTEXT, "The prompt is longer than the model's context ({said})."),
    (_OF_A_ROW, _FILTER, _FILTERED, "The provider's content filter refuses the prompt ({said})."),
    ((403,), _NO_ACCESS, Fatal, _KEY),
    (_OF_A_ROW, _ANY, partial(Refused, reason=REFUSED), "The teacher refuses the request ({said})."),
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
) -> Problem:
    """Returns Fatal, Again or Refused for a status of 400 or more and the body that came with it, of any form.

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
            elif isinstance(found, Refused):
                found.status = status
            return found
    return Fatal(f"The teacher refuses the request ({said}).")


def in_body(data: Mapping[str, Any]) -> Problem | None:
    """Returns the error in a body of status 200, or None."""
    error = data.get("error") or (data if data.get("object") == "error" else None)
    if not error:
        return None
    fields = error if isinstance(error, Mapping) else {"message": str(error)}
    words = " ".join(str(fields.get(name)) for name in ("code", "type", "message"))
    given = (fields.get("code"), fields.get("status"), data.get("code"), data.get("status"))
    codes = (int(code) for code in map(str, given) if re.fullmatch(r"[45]\d\d", code))
    return problem(next(codes, 402 if _NO_MONEY.search(words) else 500), fields)


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


_NOT_SENT = ("ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError", "UnsupportedProtocol")


def disconnected(error: BaseException, *, secrets: tuple[str, ...]) -> Again:
    """Describes a connection that was refused, reset, or closed before the reply was complete."""
    detail, name = short(str(error), *secrets), type(error).__name__
    return Again(f"The connection failed: {name}{detail and f' ({detail})'}.", lost=name not in _NOT_SENT)


def not_read(error: ValueError | RecursionError, *, secrets: tuple[str, ...]) -> Problem:
    """Describes an SDK's exception: a body that is not JSON or nests too deeply, or an argument that it rejects."""
    if isinstance(error, RecursionError):
        return Again("The reply is JSON that nests too deeply.", lost=True)
    if isinstance(error, json.JSONDecodeError):
        return Again(f"The reply is not JSON: {short(error.doc, *secrets)!r}", lost=True)
    return Fatal(f"The SDK refuses the request: {short(str(error), *secrets)}")


def no_reply(what: str, data: object) -> Again:
    """Describes a body of status 200 without a reply; `what` describes its contents."""
    return Again(f"The reply has {what}: {short(written(data))}", lost=True)


def written(value: object) -> str:
    """Writes an answer, bytes or read from JSON, as text."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    try:
        return json.dumps(value, ensure_ascii=False, default=str) if value else ""
    except RecursionError:
        return "nested too deeply to show"


def billed(sent: Any, *received: Any, total: Any) -> tuple[int | None, int | None]:
    """Returns the tokens (sent, received) of a body, None where it has no plausible number.

    Some servers count thinking in `total` alone.
    """
    sent, total = _tokens(sent), _tokens(total)
    known = [count for count in map(_tokens, received) if count is not None]
    got = sum(known) if known else None
    return sent, got if sent is None or total is None else max(got or 0, total - sent)


def counted(usage: Callable[[Mapping[str, Any]], tuple[int | None, int | None]]) -> Callable[[_Reader], _Reader]:
    """Makes a reader of bodies of status 200 say what a body without a reply has cost, by its `usage`."""

    def decorate(read: _Reader) -> _Reader:
        @wraps(read)
        def reader(data: Mapping[str, Any]) -> Reply:
            try:
                return read(data)
            except Problem as problem:
                tokens = usage(data)
                if tokens != (None, None):
                    problem.billed, problem.lost = tokens, False
                raise

        return reader

    return decorate


def check_stops(provider: str, stops: tuple[str, ...], *, most: int) -> None:
    """Raises Fatal for more stop strings than the provider takes."""
    if len(stops) > most:
        raise Fatal(
            f"There are {len(stops)} stop strings; {provider} takes at most {most}. Shorten `stops` of the prompt."
        )


def text_of(content: Any) -> Any:
    """Joins the text parts of a list; returns anything else as it is."""
    if not isinstance(content, list):
        return content
    kept = [part for part in content if part.get("type") not in ("thinking", "reasoning")]
    return "".join(part.get("text") or "" for part in kept)


def ended(word: object) -> str:
    """Returns the meaning of a provider's word for the end of a reply: `STOP`, `LENGTH`, `CONTENT_FILTER` or `BROKEN`.

    A reply with an unknown word counts as whole, and the log says so once; the word itself is returned, or for a list
    or an object its type: as text it may be nested too deeply.
    """
    if not word:
        return STOP
    said = str(word)[:100] if isinstance(word, str | int | float) else type(word).__name__
    for meaning, words in _ENDS:
        if words.search(said):
            return meaning
    said = short(said)
    if said not in _unknown_ends and len(_unknown_ends) < 20:
        _unknown_ends.add(said)
        log.warning("The teacher ended a reply with %r, a word we do not know; such replies count as whole.", said)
    return said


def reply(text: Any, *, finish: Any, data: object, model: Any, tokens: tuple[int | None, int | None]) -> Reply:
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
        input_tokens=tokens[0],
        output_tokens=tokens[1],
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
        raise Again(f"The reply is not a JSON object: {short(text)!r}", lost=True)
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
