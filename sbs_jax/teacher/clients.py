"""Requests to a teacher, its replies, and the interface that every client has.

`await client.ask(request)` sends one request once. It returns a `Reply` or raises one of three exceptions, which say
what to do next:

    Fatal   stop the run: wrong key, wrong model, no money
    Again   wait and retry: 429, 5xx, timeout, reset connection, malformed or empty reply
    Failed  record the reason and go on: content filter, prompt longer than the context, other refusals of a request

Clients and their SDKs never retry: the caller does, because it counts requests and money. Credentials come from the
environment or the platform and appear in no message.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from typing import Any, Protocol, runtime_checkable

from sbs_jax.teacher.prompts import Message, Prompt

CHAT, COMPLETION = "chat", "completion"
# Values of `Reply.finish`.
STOP, LENGTH = "stop", "length"
CONTENT_FILTER, TOO_LONG, REFUSED = "content_filter", "too_long", "refused"
# Names in a body that the sampler sets: what is asked, how often, and how much a reply may cost.
_ASKED = {"model", "messages", "prompt", "contents", "systemInstruction"}
_LIMITS = {"stream", "n", "candidateCount", "max_tokens", "max_completion_tokens", "maxOutputTokens"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameters:
    """Sampling parameters.

    `stops` replace the stop strings of a completion's prompt. `more` is a JSON object that is merged into the body of
    each request (null removes a name), or "".
    """

    temperature: float
    max_tokens: int
    stops: tuple[str, ...] = ()
    top_p: float | None = None
    more: str = ""

    def __post_init__(self) -> None:
        if not self.more:
            return
        try:
            value = json.loads(self.more)
        except (ValueError, RecursionError):
            value = None
        inner = value.get("generationConfig") if isinstance(value, dict) else None
        names = {*(value or ()), *(inner if isinstance(inner, dict) else ())} & (_ASKED | _LIMITS)
        if not isinstance(value, dict) or names:
            raise ValueError(
                f"The parameters are {self.more[:200]!r}; expected a JSON object such as "
                f'{{"reasoning_effort": "low", "seed": null}}, without {" or ".join(sorted(names or _LIMITS))}.'
            )
        object.__setattr__(self, "more", json.dumps(value, sort_keys=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One request; `form` is "chat" or "completion".

    `sample` (0, 1, ..) distinguishes several replies to one prompt, and is the seed where the temperature is above 0.
    """

    prompt: Prompt
    model: str
    parameters: Parameters
    form: str
    sample: int

    @property
    def stops(self) -> tuple[str, ...]:
        """Returns the stop strings to send: the parameters', else those of a completion's prompt."""
        return self.parameters.stops or (self.prompt.stops if self.form == COMPLETION else ())

    @functools.cached_property
    def key(self) -> str:
        """Hashes everything that shapes the reply, but not provider or code; 64 hexadecimal digits."""
        if self.form == CHAT:
            head, last = self.prompt.messages[:-1], [self.prompt.messages[-1].role, self.prompt.messages[-1].content]
        else:
            head, last = (), [self.prompt.text]
        whole = self._hashed(head)
        whole.update(json.dumps([last, self.sample]).encode())
        return whole.hexdigest()

    def _hashed(self, head: tuple[Message, ...]) -> Any:
        """Hashes the part that all rows of a dataset share; cached, because a run needs it for every row."""
        which = (self.form, self.model, self.parameters, self.stops)
        known = _heads.get(which)
        # The messages are the template's own objects, so this compares no text.
        if known is None or known[0] != head:
            drawn = self.parameters
            shared = [self.form, self.model, float(drawn.temperature), drawn.max_tokens, drawn.top_p, self.stops]
            shared += [drawn.more] if drawn.more else []  # not without, so that replies of older versions are found
            texts = [(message.role, message.content) for message in head]
            known = _heads[which] = head, hashlib.sha256(json.dumps([shared, texts]).encode())
        return known[1].copy()


_heads: dict[Any, tuple[tuple[Message, ...], Any]] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """A reply. `finish` is "stop", "length" (truncated), or a word of the provider that we do not know.

    Token counts are the provider's; thinking tokens count as output, because they are billed so.
    """

    text: str
    finish: str
    input_tokens: int | None
    output_tokens: int | None
    model: str


class Problem(Exception):  # noqa: N818  # its kinds say what to do, not what happened
    """A request without a usable reply, which may have been billed all the same.

    `billed` is (tokens sent, tokens received) where the provider gives them. `lost`: it gives none and may have billed
    the request, because an answer was begun or the connection was lost.
    """

    billed: tuple[int | None, int | None] | None = None
    lost = False


class Fatal(Problem):
    """Stop: every request would fail like this one (key, model, permission, money)."""


class Gone(Fatal):
    """Stop: a model, an address, a job or a file that was named is not there."""


class Again(Problem):
    """Retry later. `limited`: the provider asks us to slow down; `retry_after`: seconds to wait."""

    def __init__(
        self, message: str, *, retry_after: float | None = None, limited: bool = False, lost: bool = False
    ) -> None:
        super().__init__(message)
        self.retry_after, self.limited, self.lost = retry_after, limited, lost


class Failed(Problem):
    """Give this request up; `reason` is a word such as "content_filter" or "too_long"."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class Refused(Failed):
    """Give this request up, if any other is answered: if none is, the model, the account or a parameter is at fault.

    `status` is 400, 403, 413 or 422.
    """

    status = 400


@runtime_checkable
class Client(Protocol):
    """A teacher that can be asked."""

    async def ask(self, request: Request) -> Reply:
        """Sends one request once. Raises Fatal, Again or Failed."""
        ...

    async def close(self) -> None: ...
