"""bespokelabs-curator's side of scripts/bench_teacher.py, for an interpreter that has it and nothing of ours.

Its limits are raised so that only the number of requests in flight binds; it tells nobody that it runs. It counts the
tokens of what it sends with tiktoken, which downloads its vocabulary; offline they are guessed from the length, which
is less work for it.
"""

import importlib
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


class _Guess:
    def encode(self, text, **_):
        return range(len(text) // 4)


def _tokens_can_be_counted() -> bool:
    """Whether tiktoken has its vocabulary; it is stood in for where not."""
    tiktoken: Any = importlib.import_module("tiktoken")
    try:
        tiktoken.get_encoding("cl100k_base")
    except OSError:
        tiktoken.get_encoding = lambda name: _Guess()
        return False
    return True


def main() -> int:
    given = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    os.environ |= {"TELEMETRY_ENABLED": "false", "CURATOR_DISABLE_RICH_DISPLAY": "1", "CURATOR_VIEWER": "0"}
    os.environ |= {"OPENAI_API_KEY": "none", "HF_HUB_OFFLINE": "1"}
    curator = importlib.import_module("bespokelabs.curator")
    counted = _tokens_can_be_counted()
    head = given["head"]

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
            "base_url": f"{given['url']}/v1",
            "max_requests_per_minute": 100_000_000,
            "max_tokens_per_minute": 1_000_000_000_000,
            "max_concurrent_requests": given["concurrency"],
        },
    )
    data = [{"last": text} for text in given["last"]]
    start = time.perf_counter()
    made = asker(data)
    seconds = time.perf_counter() - start
    count = len(made.dataset if hasattr(made, "dataset") else made)
    if count != given["requests"]:
        raise RuntimeError(f"curator gave {count} replies to {given['requests']} requests.")
    version = importlib.metadata.version("bespokelabs-curator")
    print(json.dumps({"whole_per_second": count / seconds, "version": version, "counted": counted}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
