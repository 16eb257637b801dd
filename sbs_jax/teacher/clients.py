"""Who is asked: any OpenAI-compatible server, Gemini with a key or on Vertex AI, the built-in dataset's own teacher.

A client asks once, `await client.ask(request)`, and answers with a `Reply` or raises one of three exceptions, which say
what to do next:

    Fatal   nothing will work (wrong key, wrong model, no money): stop the run
    Again   this may pass (429, 5xx, time-out, reset connection, malformed or empty reply): wait, and ask again
    Failed  this request has no reply (content filter, longer than the context): note the reason, and go on

It never repeats a request of its own accord, and neither do the SDKs underneath: whoever counts requests and money is
the one that repeats. A credential comes from the environment or from the platform, and stands in no message.

The clients of hosted teachers are in `openai_client` and `gemini_client`; both use `connections`, and `refusals` for
what goes wrong.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from typing import Any, Protocol, runtime_checkable

from sbs_jax.teacher.prompts import Message, Prompt

CHAT, COMPLETION = "chat", "completion"
# How a reply ended. Any other word is the provider's own.
STOP, LENGTH = "stop", "length"
CONTENT_FILTER, TOO_LONG = "content_filter", "too_long"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameters:
    """How a reply is drawn. `max_tokens` is its room; `stops` replace the prompt's own, which completions end at."""

    temperature: float
    max_tokens: int
    stops: tuple[str, ...] = ()
    top_p: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One thing to ask. `form` is "chat" or "completion"; `sample` tells k replies to one prompt apart, 0, 1, ...

    Where the temperature is above 0, `sample` is also the seed that is sent.
    """

    prompt: Prompt
    model: str
    parameters: Parameters
    form: str
    sample: int

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings that are sent: the parameters', else those that a completion of this prompt needs."""
        return self.parameters.stops or (self.prompt.stops if self.form == COMPLETION else ())

    @functools.cached_property
    def key(self) -> str:
        """64 hexadecimal digits of all that decides about the reply; neither the provider nor our code is in it."""
        if self.form == CHAT:
            head, last = self.prompt.messages[:-1], [self.prompt.messages[-1].role, self.prompt.messages[-1].content]
        else:
            head, last = (), [self.prompt.text]
        whole = self._hashed(head)
        whole.update(json.dumps([last, self.sample]).encode())
        return whole.hexdigest()

    def _hashed(self, head: tuple[Message, ...]) -> Any:
        """The hash so far, of all that the rows of a dataset share; it is kept, as a run over many rows needs it."""
        which = (self.form, self.model, self.parameters, self.stops)
        known = _heads.get(which)
        # The messages are the template's own objects, so that this looks at no text.
        if known is None or known[0] != head:
            drawn = self.parameters
            shared = [self.form, self.model, float(drawn.temperature), drawn.max_tokens, drawn.top_p, self.stops]
            texts = [(message.role, message.content) for message in head]
            known = _heads[which] = head, hashlib.sha256(json.dumps([shared, texts]).encode())
        return known[1].copy()


_heads: dict[Any, tuple[tuple[Message, ...], Any]] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back. `finish` is "stop", "length" (cut short) or the provider's word; tokens are the provider's count.

    Tokens that the teacher thought with count as output, as they do on the bill.
    """

    text: str
    finish: str
    input_tokens: int | None
    output_tokens: int | None
    model: str


class Fatal(Exception):  # noqa: N818  # says what to do, not what happened
    """Nothing can be asked: wrong key, wrong model, no permission, no money. It would be the same for every request."""


class Again(Exception):  # noqa: N818  # says what to do, not what happened
    """It may work later. `limited`: we are asked to slow down; `retry_after`: seconds that we are asked to wait."""

    def __init__(self, message: str, *, retry_after: float | None = None, limited: bool = False) -> None:
        super().__init__(message)
        self.retry_after, self.limited = retry_after, limited


class Failed(Exception):  # noqa: N818  # says what to do, not what happened
    """This one request is hopeless; `reason` is a word such as "content_filter" or "too_long"."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@runtime_checkable
class Client(Protocol):
    """Whoever can be asked."""

    async def ask(self, request: Request) -> Reply:
        """One request, sent once. Raises Fatal, Again or Failed."""
        ...

    async def close(self) -> None: ...
