"""What a client may have read, from real files and real HTTP servers, and what it may not."""

from __future__ import annotations

import base64
import contextlib
import gzip
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from legit_worker.errors import InvalidInputError
from legit_worker.prep.sources import Limits, read

CONTENT = b"a small picture" * 10
LOOPBACK = ("127.0.0.0/8",)


def refused(source: Any, limits: Limits, match: str) -> None:
    with pytest.raises(InvalidInputError, match=match):
        read(source, limits)


# In the message itself.


@pytest.mark.parametrize("head", ["", "data:image/png;base64,"])
@pytest.mark.parametrize("content", [CONTENT, b"\xff\xd8\xff\xe0 as a JPEG begins"])
def test_base64_is_the_file(head: str, content: bytes) -> None:
    assert read(head + base64.b64encode(content).decode(), Limits()) == content


@pytest.mark.parametrize("text", ["not base64!", "YWJ", "data:image/png,abc", "é"])
def test_what_is_not_base64_is_refused(text: str) -> None:
    refused(text, Limits(), "not base64")


@pytest.mark.parametrize("source", [None, 7, "", [], {}, b"abc"])
def test_what_is_no_text_is_refused(source: Any) -> None:
    refused(source, Limits(), "expected base64")


def test_base64_of_too_much_is_refused() -> None:
    refused(base64.b64encode(b"x" * 101).decode(), Limits(max_bytes=90), "over 90 bytes")


@given(st.text() | st.text().map(lambda text: f"https://{text}") | st.text().map(lambda text: f"/{text}"))
def test_no_text_does_anything_but_be_refused(text: str) -> None:
    limits = Limits(roots=(Path("/nonexistent"),), hosts=("example.org",))
    with contextlib.suppress(InvalidInputError):
        assert isinstance(read(text, limits), bytes)


# Under a folder.


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder that may be read, in one that may not."""
    folder = tmp_path / "may"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a picture.png").write_bytes(CONTENT)
    (tmp_path / "secret").write_bytes(b"secret")
    return folder


def test_a_path_under_a_root_is_read(root: Path) -> None:
    limits = Limits(roots=(root,))
    for name in (f"{root}/inner/a picture.png", "./inner/a picture.png", f"file://{root}/inner/a%20picture.png"):
        assert read(name, limits) == CONTENT


def test_without_a_root_no_path_is_read(root: Path) -> None:
    refused(f"{root}/inner/a picture.png", Limits(), "names no folder")


def test_what_is_not_under_a_root_looks_as_if_it_were_not_there(root: Path) -> None:
    (root / "link").symlink_to(root.parent / "secret")
    (root / "up").symlink_to(root.parent)
    os.mkfifo(root / "fifo")
    names = ("/etc/passwd", f"{root}/../secret", f"{root}/link", f"{root}/up/secret", f"{root}/fifo", f"{root}/inner")
    names += ("/dev/zero", f"{root}/missing", f"{root}/\0", f"file://{root}/%2e%2e/secret", f"{root}2/x")
    for name in names:
        refused(name, Limits(roots=(root,)), "no file under LEGIT_WORKER_PREP_ROOTS")


def test_a_file_of_too_much_is_refused(root: Path) -> None:
    refused("./inner/a picture.png", Limits(roots=(root,), max_bytes=10), "over 10 bytes")


# On a host.

Answer = Callable[[BaseHTTPRequestHandler], None]


def reply(status: int = 200, body: bytes = CONTENT, **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        with contextlib.suppress(OSError):
            handler.wfile.write(body)

    return answer


def drip(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    with contextlib.suppress(OSError):
        for _ in range(100):
            handler.wfile.write(b"x")
            handler.wfile.flush()
            time.sleep(0.1)


def hang(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(5)


ANSWERS: dict[str, Answer] = {
    "/file": reply(),
    "/file?size=2&x=a%20b": reply(),
    "/redirect": reply(302, Location="/file"),
    "/loop": reply(302, Location="/loop"),
    "/nowhere": reply(302),
    "/metadata": reply(302, Location="http://169.254.169.254/latest"),
    "/to-file": reply(302, Location="file:///etc/passwd"),
    "/gzip": reply(body=gzip.compress(CONTENT), Content_Encoding="gzip"),
    "/huge": reply(body=b"x" * 3_000_000),
    "/lies": reply(body=b"x" * 3_000_000, Content_Length="10000000"),
    "/short": reply(body=b"x" * 10, Content_Length="100"),
    "/404": reply(404),
    "/drip": drip,
    "/hang": hang,
}


class Handler(BaseHTTPRequestHandler):
    """Answers by path."""

    def do_GET(self) -> None:
        ANSWERS.get(self.path, reply(404))(self)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Of a server on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()


@pytest.fixture
def local(port: int) -> Limits:
    """That server, and no other, may be asked."""
    return Limits(hosts=(f"http://localhost:{port}",), allow_private=LOOPBACK, max_bytes=1_000_000, seconds=1.0)


@pytest.mark.parametrize("path", ["/file", "/file?size=2&x=a b", "/redirect"])
def test_a_url_on_a_listed_host_is_fetched(port: int, local: Limits, path: str) -> None:
    assert read(f"http://localhost:{port}{path}", local) == CONTENT


REFUSALS = {
    "/loop": "redirects more than 3 times",
    "/nowhere": "redirects more than 3 times",
    "/metadata": "nothing is fetched from 169.254.169.254",
    "/to-file": "not one of https or http",
    "/gzip": "encoding that was not asked for",
    "/huge": "over 1000000 bytes",
    "/lies": "over 1000000 bytes",
    "/short": "90 bytes less",
    "/404": "answered 404",
    "/drip": "TimeoutError",
    "/hang": "TimeoutError|timed out",
}


@pytest.mark.parametrize("path", REFUSALS)
def test_what_a_host_may_not_do(port: int, local: Limits, path: str) -> None:
    started = time.monotonic()
    refused(f"http://localhost:{port}{path}", local, REFUSALS[path])
    assert time.monotonic() - started < 4


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/x",
        "https://localhost:{port}/file",
        "http://localhost/file",
        "http://127.0.0.1:{port}/file",
        "http://localhost.example.org:{port}/file",
        "ftp://localhost:{port}/file",
        "http://user:secret@localhost:{port}/file",
        "http://localhost:{port}@example.org/file",
        "http://[::1]:{port}/file",
        "http://localhost:99999/file",
        "http://",
    ],
)
def test_a_url_that_is_not_on_the_list_is_not_fetched(port: int, local: Limits, url: str) -> None:
    refused(url.format(port=port), local, "not fetched|nothing is fetched|not one of")


def test_by_default_nothing_is_fetched(port: int) -> None:
    refused(f"http://localhost:{port}/file", Limits(), "nothing is fetched")


def test_a_listed_host_in_a_private_network_is_refused(port: int) -> None:
    refused(f"http://localhost:{port}/file", Limits(hosts=(f"http://localhost:{port}",)), "private network")


NOT_PUBLIC = """
127.0.0.1 0.0.0.0 10.1.2.3 100.64.0.1 169.254.169.254 224.0.0.1
::1 fe80::1 fd00::1 ::ffff:10.0.0.1 64:ff9b::a00:1 2002:7f00:1::
"""


@pytest.mark.parametrize("address", NOT_PUBLIC.split())
def test_no_name_leads_to_an_address_that_is_not_public(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(family, socket.SOCK_STREAM, 6, "", (address, 443))])
    refused("https://example.org/x", Limits(hosts=("example.org",)), "private network")


def test_the_address_that_was_checked_is_the_one_that_is_asked(
    monkeypatch: pytest.MonkeyPatch, port: int, local: Limits
) -> None:
    real, asked = socket.getaddrinfo, []

    def once(host: str, *rest: Any, **options: Any) -> Any:
        asked.append(host)
        return real(host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", once)
    assert read(f"http://localhost:{port}/file", local) == CONTENT
    assert asked.count("localhost") == 1


@pytest.mark.parametrize(
    ("entry", "host", "is_covered"),
    [
        ("*.example.org", "a.example.org", True),
        ("*.example.org", "a.b.example.org", True),
        ("*.example.org", "example.org", False),
        ("*.example.org", "badexample.org", False),
        ("example.org", "example.org", True),
        ("example.org", "a.example.org", False),
        ("EXAMPLE.org", "Example.ORG", True),
    ],
)
def test_which_hosts_an_entry_covers(monkeypatch: pytest.MonkeyPatch, entry: str, host: str, is_covered: bool) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("10.0.0.1", 443))])
    refused(f"https://{host}/x", Limits(hosts=(entry,)), "private network" if is_covered else "nothing is fetched")
