"""A stand-in for the Hugging Face Hub over loopback: what `huggingface_hub` asks to list and download a model."""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

_ASKED = re.compile(r"/(?:api/models/)?(?P<name>[^/]+/[^/]+?)(?:/(?P<what>revision|tree|resolve)/(?P<rest>.*))?")


@dataclasses.dataclass
class Hub:
    """The hub's models: {name: folder}; the commit of each follows from its contents."""

    address: str
    models: dict[str, Path]
    gated: set[str] = dataclasses.field(default_factory=set)
    status: int | None = None  # answer to everything, if set
    asked: list[str] = dataclasses.field(default_factory=list)  # "GET /path"

    def environment(self, home: Path) -> dict[str, str | None]:
        """Returns the environment of a command that uses this hub, with an own cache."""
        own = {"HF_ENDPOINT": self.address, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
        return {**own, "HF_TOKEN": None, "HF_HUB_OFFLINE": None, "HF_HUB_CACHE": None, "HF_HUB_DISABLE_XET": "1"}

    def commit(self, name: str) -> str:
        """Returns the newest commit of a model."""
        files = sorted(self.models[name].iterdir())
        return hashlib.sha1(b"".join(each.name.encode() + each.read_bytes() for each in files)).hexdigest()

    def downloaded(self) -> list[str]:
        """Returns the names of the files that were downloaded so far, sorted."""
        return sorted(
            {each.rpartition("/")[2] for each in self.asked if each.startswith("GET") and "/resolve/" in each}
        )


@contextlib.contextmanager
def served(models: dict[str, Path]) -> Iterator[Hub]:
    """Serves folders as models."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            url = urllib.parse.urlsplit(self.path)
            match = _ASKED.fullmatch(urllib.parse.unquote(url.path))
            name = match["name"] if match else ""
            if hub.status is not None:
                self._answer(hub.status, b"{}")
            elif name in hub.gated:
                self._answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
            elif match is None or name not in hub.models:
                self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            else:
                self._model(name, match["what"], match["rest"] or "")

        def do_HEAD(self) -> None:
            self.do_GET()

        def _model(self, name: str, what: str | None, rest: str) -> None:
            folder, commit = hub.models[name], hub.commit(name)
            revision, _, path = rest.partition("/")
            if what is not None and revision not in ("main", commit):
                self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                return
            files = sorted(each.name for each in folder.iterdir())
            if what == "tree":
                listed = [
                    {"type": "file", "path": each, "size": (folder / each).stat().st_size, "oid": _oid(folder / each)}
                    for each in files
                ]
                self._answer(200, json.dumps(listed).encode())
            elif what == "resolve":
                if path not in files:
                    self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
                    return
                headers = {"X-Repo-Commit": commit, "ETag": f'"{_oid(folder / path)}"'}
                self._answer(200, (folder / path).read_bytes(), headers)
            else:
                siblings = [{"rfilename": each} for each in files]
                self._answer(200, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode())

        def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub = Hub(f"http://127.0.0.1:{server.server_port}", models)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield hub
        server.shutdown()


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
