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

import asyncio
import dataclasses
import functools
import hashlib
import json
import random
import re
from typing import Any, Protocol, runtime_checkable

from sbs_jax.selection import near_matches
from sbs_jax.teacher.prompts import Message, Prompt

CHAT, COMPLETION = "chat", "completion"
PROVIDERS = ("openai", "gemini", "vertex", "scripted")
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


def make(provider: str, *, base_url: str | None, timeout: float, connections: int) -> Client:
    """The client of a provider; `timeout` is in seconds for a whole reply, `connections` as many as requests in flight.

    openai: OPENAI_API_KEY; another server than OpenAI's through `base_url` or OPENAI_BASE_URL, which may need no key.
    gemini: GEMINI_API_KEY or GOOGLE_API_KEY.
    vertex: GOOGLE_CLOUD_PROJECT, GOOGLE_CLOUD_LOCATION, and Google's application default credentials.
    scripted: the built-in dataset's teacher; asks nobody.

    ValueError names the variable that is missing; ImportError where the SDKs are.
    """
    if provider == "openai":
        from sbs_jax.teacher.openai_client import OpenAI

        return OpenAI(base_url=base_url, timeout=timeout, connections=connections)
    if provider in ("gemini", "vertex"):
        from sbs_jax.teacher.gemini_client import Gemini

        return Gemini(vertex=provider == "vertex", base_url=base_url, timeout=timeout, connections=connections)
    if provider == "scripted":
        return Scripted()
    raise ValueError(
        f"There is no provider {provider!r}; there are {list(PROVIDERS)}.{near_matches(provider, PROVIDERS)}"
    )


class Scripted:
    """The built-in dataset's teacher, without a network: the same reply to the same input and sample, always.

    `latency` is in seconds per reply. Tokens are words.
    """

    def __init__(self, *, latency: float = 0.0) -> None:
        self._latency = latency

    async def ask(self, request: Request) -> Reply:
        from tasks import builtin

        await asyncio.sleep(self._latency)
        asked = request.prompt.messages[-1].content
        try:
            problem_ = builtin.problem_of(asked)
        except ValueError as error:
            raise Fatal(f"The scripted teacher knows the built-in dataset only: {error}") from None
        # Where the label is given away, it is a word of what surrounds the problem.
        hints = [label for label in builtin.LABELS if re.search(rf"\b{label}\b", asked.replace(problem_.text, ""))]
        random_ = random.Random(f"{problem_.text} {hints} {request.sample}")
        text = builtin.teacher_reply(problem_, random_)
        if len(hints) == 1:
            text = f"{problem_.question.claim(problem_.value, hints[0])} {builtin.MARKER} {hints[0]}."
        for stop in request.stops:
            text = text.split(stop)[0]
        words = re.findall(r"\s*\S+", text)
        room = request.parameters.max_tokens
        sent = request.prompt.text if request.form == COMPLETION else asked
        return Reply(
            text="".join(words[:room]),
            finish=STOP if len(words) <= room else LENGTH,
            input_tokens=len(sent.split()),
            output_tokens=min(len(words), room),
            model="scripted",
        )

    async def close(self) -> None:
        pass
