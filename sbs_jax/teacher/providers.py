"""The clients by provider: hosted models, compatible servers, and scripted teachers that need no network."""

import asyncio
import re

from sbs_jax.checks import nearest
from sbs_jax.teacher.clients import COMPLETION, LENGTH, STOP, Client, Fatal, Reply, Request

PROVIDERS = ("openai", "gemini", "vertex", "scripted")


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
    raise ValueError(f"There is no provider {provider!r}; there are {list(PROVIDERS)}.{nearest(provider, PROVIDERS)}")


class Scripted:
    """A dataset's own teacher (`Dataset.scripted_reply`): the same reply to the same input and sample, always.

    `latency` is in seconds per reply. Tokens are words.
    """

    def __init__(self, *, latency: float = 0.0) -> None:
        self._latency = latency

    async def ask(self, request: Request) -> Reply:
        from sbs_jax.data import registry

        await asyncio.sleep(self._latency)
        asked = request.prompt.messages[-1].content
        text = registry.scripted_reply(asked, sample=request.sample)
        if text is None:
            raise Fatal("The scripted teacher knows the built-in dataset only: it has no reply to this input.")
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
