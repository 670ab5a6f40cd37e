"""A real S3 server on the loopback: moto's, in a thread, behind a switch that makes it fail as networks do.

`tests/conftest.py` names the fixtures, so any test may ask for `s3_bucket`: an empty bucket, `.url` ("s3://..."), and
the variables AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID... set for that test, so that fsspec, boto3 and DALI find the server.
Without moto or s3fs such tests are skipped with the reason. `.requests` lists what was asked; `.fail` makes it fail.
"""

import importlib.util
import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/nonexistent",  # the tester's own configuration has no part in this
    "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
}
_ERRORS = {403: ("InvalidAccessKeyId", "403 Forbidden"), 503: ("SlowDown", "503 Slow Down")}
_names = itertools.count(1)

Environ = dict[str, Any]
Application = Callable[[Environ, Callable[..., Any]], Iterable[bytes]]


@dataclass
class Fault:
    """Answer `times` requests of `method` whose path contains `path` (and whose Range header contains `part`) with an
    error status, or a cut or changed body."""

    path: str
    # An HTTP status of _ERRORS, "cut" (half the body, then the connection closes), "flip" (a byte) or "hold" (no answer
    # until `released` is set; then what `kind` has become meanwhile)
    kind: int | str
    times: int
    method: str = "GET"
    part: str = ""
    reached: threading.Event = field(default_factory=threading.Event)  # a request is held
    released: threading.Event = field(default_factory=threading.Event)

    def meets(self, method: str, path: str, part: str) -> bool:
        return bool(self.times) and self.method == method and self.path in path and self.part in part


@dataclass
class Switch:
    """WSGI middleware between the server and its application. `requests`: (method, path, Range header) of each."""

    application: Application
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        request = environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_RANGE", "")
        with self.lock:
            self.requests.append(request)
            fault = next((fault for fault in self.faults if fault.meets(*request)), None)
            if fault:
                fault.times -= 1
        if fault is not None and fault.kind == "hold":
            fault.reached.set()
            fault.released.wait()
            fault = None if fault.kind == "hold" else fault
        if fault is None:
            return self.application(environ, start_response)
        if isinstance(fault.kind, int):
            code, status = _ERRORS[fault.kind]
            body = f"<Error><Code>{code}</Code><Message>a fault of the test</Message></Error>".encode()
            start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body]
        body = b"".join(self.application(environ, start_response))  # headers, Content-Length too, are already told
        return [body[: len(body) // 2]] if fault.kind == "cut" else [bytes([body[0] ^ 1]) + body[1:]]


@dataclass
class Bucket:
    """An empty bucket of its own for one test."""

    name: str
    endpoint: str
    client: Any
    switch: Switch

    @property
    def url(self) -> str:
        return f"s3://{self.name}"

    @property
    def requests(self) -> list[tuple[str, str, str]]:
        return self.switch.requests

    def fail(self, path: str, kind: int | str, times: int = 10**9, method: str = "GET", part: str = "") -> Fault:
        """Let the next `times` requests whose path contains `path` fail; see Fault. `.times` of it counts down."""
        fault = Fault(path, kind, times, method, part)
        self.switch.faults.append(fault)
        return fault

    def upload(self, folder: Path, prefix: str) -> str:
        """Every file of `folder` under `prefix`, not counted among the requests; returns the URL of that prefix."""
        for path in sorted(folder.iterdir()):
            if path.is_file():
                self.client.put_object(Bucket=self.name, Key=f"{prefix}/{path.name}", Body=path.read_bytes())
        self.requests.clear()
        return f"{self.url}/{prefix}"


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[tuple[str, Switch]]:
    """The server for the whole run: its address and its switch."""
    for module, package in (("moto.server", "moto[server]"), ("s3fs", "s3fs")):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            pytest.skip(f"no S3 server: pip install '{package}'")
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request else, before every failure
    switch = Switch(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, switch, threaded=True, request_handler=MotoRequestHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", switch
    server.shutdown()
    thread.join()


@pytest.fixture(scope="session")
def s3_client(s3_endpoint: tuple[str, Switch]) -> Any:
    """boto3's client for the server; made once, since that takes half a second."""
    import boto3

    keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=s3_endpoint[0], **keys)


@pytest.fixture
def s3_bucket(s3_endpoint: tuple[str, Switch], s3_client: Any, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """An empty bucket, and the environment by which every S3 client finds it."""
    endpoint, switch = s3_endpoint
    switch.requests.clear()
    switch.faults.clear()
    for variable, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": endpoint, "NO_PROXY": "127.0.0.1"}.items():
        monkeypatch.setenv(variable, value)
    for variable in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    name = f"bucket-{next(_names)}"
    s3_client.create_bucket(Bucket=name)
    switch.requests.clear()
    return Bucket(name, endpoint, s3_client, switch)
