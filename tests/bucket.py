"""A bucket over loopback: the part of Google Cloud Storage's JSON API that reading needs, served from a folder."""

import contextlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def served(folder: Path, *, bucket: str) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Yields the environment under which TensorStore reads gs://<bucket>/ from this folder, and the requested paths."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # otherwise a body waits 40 ms for the acknowledgment of its headers

        def do_GET(self) -> None:
            asked.append(self.path)
            url = urllib.parse.urlsplit(self.path)
            options = dict(urllib.parse.parse_qsl(url.query))
            objects = f"/storage/v1/b/{bucket}/o"
            if url.path == objects:
                self._answer(200, json.dumps({"items": list(self._listed(options.get("prefix", "")))}).encode())
                return
            file = folder / urllib.parse.unquote(url.path.removeprefix(objects + "/"))
            if not url.path.startswith(objects + "/") or not file.is_file():
                self._answer(404, b"{}")
                return
            contents = file.read_bytes()
            span = self.headers.get("Range")
            if span is None:
                self._answer(200, contents)
                return
            first, last = span.removeprefix("bytes=").split("-")
            if first:
                start, stop = int(first), int(last) + 1 if last else len(contents)
            else:
                start, stop = max(0, len(contents) - int(last)), len(contents)
            stop = min(stop, len(contents))
            headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(contents)}"}
            self._answer(206, contents[start:stop], headers)

        def _listed(self, prefix: str) -> Iterator[dict[str, str]]:
            for file in sorted(folder.rglob("*")):
                name = file.relative_to(folder).as_posix()
                if file.is_file() and name.startswith(prefix):
                    yield {"name": name, "generation": "1", "size": str(file.stat().st_size)}

        def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), "x-goog-generation": "1", **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://localhost:{server.server_address[1]}"
    # Uses and looks up no credentials of the machine.
    silent = {"GCE_METADATA_ROOT": "localhost:1", "GOOGLE_APPLICATION_CREDENTIALS": "", "HOME": str(folder)}
    try:
        yield {"TENSORSTORE_GCS_HTTP_URL": address, **silent}, asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
