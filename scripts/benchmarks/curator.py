"""Asks with bespokelabs-curator, for the suite teacher; the interpreter needs curator, but nothing of this project.

Curator's limits are raised, so that only the number of requests in flight limits it; its telemetry is off. It counts
tokens with tiktoken, which downloads a vocabulary; offline they are guessed from the length, which is less work.
"""

import importlib
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from typing import Any


def ask(*, url: str, concurrency: int, head: list[dict[str, str]], last: list[str]) -> dict[str, Any]:
    """Asks one request per text of `last`, each after the messages of `head`."""
    os.environ |= {"TELEMETRY_ENABLED": "false", "CURATOR_DISABLE_RICH_DISPLAY": "1", "CURATOR_VIEWER": "0"}
    os.environ |= {"OPENAI_API_KEY": "none", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CURATOR_CACHE_DIR"] = folder
        curator = importlib.import_module("bespokelabs.curator")
        counted = _tokens_can_be_counted()

        class Asker(curator.LLM):
            def prompt(self, row):
                return [*head, {"role": "user", "content": row["last"]}]

            def parse(self, row, response):
                return {"last": row["last"], "reply": response}

        asker = Asker(
            model_name="some-model",
            backend="openai",
            generation_params={"temperature": 0.0, "max_tokens": 256},
            backend_params={
                "base_url": f"{url}/v1",
                "max_requests_per_minute": 100_000_000,
                "max_tokens_per_minute": 1_000_000_000_000,
                "max_concurrent_requests": concurrency,
            },
        )
        start = time.perf_counter()
        made = asker([{"last": text} for text in last])
        seconds = time.perf_counter() - start
        count = len(made.dataset if hasattr(made, "dataset") else made)
    if count != len(last):
        raise RuntimeError(f"curator gave {count} replies to {len(last)} requests.")
    version = importlib.metadata.version("bespokelabs-curator")
    return {"whole_per_second": count / seconds, "version": version, "counted": counted}


def _tokens_can_be_counted() -> bool:
    """Returns True if tiktoken has its vocabulary; replaces it by a guess otherwise."""

    class Guess:
        def encode(self, text, **_):
            return range(len(text) // 4)

    tiktoken: Any = importlib.import_module("tiktoken")
    try:
        tiktoken.get_encoding("cl100k_base")
    except OSError:
        tiktoken.get_encoding = lambda name: Guess()
        return False
    return True


if __name__ == "__main__":
    print(json.dumps(ask(**json.load(sys.stdin))))
