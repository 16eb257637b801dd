"""Clients by provider: hosted models, compatible servers, and a scripted teacher that needs no network."""

import asyncio
import re

from sbs_jax.checks import nearest
from sbs_jax.teacher.batches import BatchClient
from sbs_jax.teacher.clients import COMPLETION, LENGTH, STOP, Client, Fatal, Reply, Request

PROVIDERS = ("openai", "gemini", "vertex", "scripted")
BATCH_PROVIDERS = ("openai", "gemini", "vertex")


def check(provider: str, *, base_url: str | None, batch: bool, ask: bool) -> None:
    """Checks a provider's name, address and, if it will be asked (`ask`), credentials in the environment.

    ValueError says what to set or to write. The SDKs are not imported.
    """
    known = BATCH_PROVIDERS if batch else PROVIDERS
    if provider not in known:
        through = (
            " Other models answer through a server that is compatible with OpenAI's API: --provider openai --base_url "
            "URL (docs/teacher.md)."
        )
        what = f"{provider!r} has no batch jobs" if batch else f"There is no provider {provider!r}"
        raise ValueError(f"{what}; expected one of {', '.join(known)}.{nearest(provider, known)}{through}")
    if not ask:
        return
    if provider == "openai":
        from sbs_jax.teacher import openai

        openai.openai_key(openai.address(base_url))
    elif provider in ("gemini", "vertex"):
        from sbs_jax.teacher import gemini

        gemini.credentials_given(vertex=provider == "vertex")


def make(provider: str, *, base_url: str | None, timeout: float, connections: int) -> Client:
    """Makes a provider's client; `timeout` is in seconds per reply, `connections` is the maximum of requests in flight.

    openai: OPENAI_API_KEY; a compatible server through `base_url` or OPENAI_BASE_URL, which may need no key.
    gemini: GEMINI_API_KEY or GOOGLE_API_KEY.
    vertex: GOOGLE_CLOUD_PROJECT, GOOGLE_CLOUD_LOCATION, and Google's application default credentials.
    scripted: the built-in dataset's teacher, without network.

    ValueError names a missing variable; ImportError if the SDKs are missing.
    """
    if provider == "openai":
        from sbs_jax.teacher.openai import OpenAI

        return OpenAI(base_url=base_url, timeout=timeout, connections=connections)
    if provider in ("gemini", "vertex"):
        from sbs_jax.teacher.gemini import Gemini

        return Gemini(vertex=provider == "vertex", base_url=base_url, timeout=timeout, connections=connections)
    if provider == "scripted":
        return Scripted()
    check(provider, base_url=base_url, batch=False, ask=False)
    raise AssertionError(provider)  # `check` refuses it


def make_batch(provider: str, *, base_url: str | None, timeout: float, folder: str | None = None) -> BatchClient:
    """Makes a provider's batch client, with credentials as for `make`; `folder` is Vertex AI's gs:// folder."""
    if provider == "openai":
        from sbs_jax.teacher.openai import OpenAIBatches

        return OpenAIBatches(base_url=base_url, timeout=timeout)
    if provider in ("gemini", "vertex"):
        from sbs_jax.teacher.gemini import GeminiBatches, VertexBatches

        if provider == "gemini":
            return GeminiBatches(base_url=base_url, timeout=timeout)
        return VertexBatches(base_url=base_url, timeout=timeout, folder=folder)
    check(provider, base_url=base_url, batch=True, ask=False)
    raise AssertionError(provider)  # `check` refuses it


class Scripted:
    """The scripted teacher of a dataset (`Dataset.scripted_reply`): one fixed reply per input and sample.

    `latency` is in seconds per reply. Tokens are words.
    """

    def __init__(self, *, latency: float = 0.0) -> None:
        self._latency = latency

    async def ask(self, request: Request) -> Reply:
        from sbs_jax.data import catalogue

        await asyncio.sleep(self._latency)
        asked = request.prompt.messages[-1].content
        text = catalogue.scripted_reply(asked, sample=request.sample)
        if text is None:
            raise Fatal("The scripted teacher knows the built-in dataset only: it has no reply to this input.")
        for stop in request.stops:
            text = text.split(stop)[0]
        words = re.findall(r"\s*\S+", text)
        most = request.parameters.max_tokens
        sent = request.prompt.text if request.form == COMPLETION else asked
        return Reply(
            text="".join(words[:most]),
            finish=STOP if len(words) <= most else LENGTH,
            input_tokens=len(sent.split()),
            output_tokens=min(len(words), most),
            model="scripted",
        )

    async def close(self) -> None:
        pass
