"""What a client may have read, from real files and real HTTP servers, and what it may not."""

from __future__ import annotations

import base64
import contextlib
import gzip
import os
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
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


heads = st.sampled_from(
    ["", "/", "./", "file:", "file://", "file:///", "https://", "https://a.example.org/", "http://["]
)


@given(heads, st.text(st.characters()))
@example("file://", "[")
@example("https://", "a" * 64 + ".example.org/")
@example("https://", "a..example.org/")
@example("https://a.example.org/", "\ud800")
def test_no_text_does_anything_but_be_refused(head: str, text: str) -> None:
    limits = Limits(roots=(Path("/usr/share"),), hosts=("*.example.org",), seconds=0.001)
    with contextlib.suppress(InvalidInputError):
        assert isinstance(read(head + text, limits), bytes)


parts = st.lists(
    st.sampled_from(["..", ".", "inner", "up", "link", "secret", "a picture.png", "", "%2e%2e"]), max_size=6
)


@given(st.sampled_from(["./", "/", "file:///", "file:"]), parts)
def test_no_path_leads_out_of_its_root(head: str, names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = make_root(Path(folder))
        (root / "up").symlink_to(root.parent)
        (root / "link").symlink_to(root.parent / "secret")
        for prefix in (head, head + str(root).lstrip("/") + "/"):
            with contextlib.suppress(InvalidInputError):
                assert read(prefix + "/".join(names), Limits(roots=(root,))) == CONTENT


# Under a folder.


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder that may be read, in one that may not."""
    return make_root(tmp_path)


def make_root(outside: Path) -> Path:
    folder = outside / "may"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a picture.png").write_bytes(CONTENT)
    (outside / "secret").write_bytes(b"secret")
    return folder


def test_a_second_root_is_looked_at_too(root: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    assert read("./inner/a picture.png", Limits(roots=(tmp_path / "other", root))) == CONTENT


def test_what_is_outside_is_not_even_opened(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("it was opened"))
    for name in ("/dev/null", "/etc/passwd", f"{root}/../secret", "file://elsewhere/etc/passwd"):
        refused(name, Limits(roots=(root,)), "no file under")


def test_a_path_under_a_root_is_read(root: Path) -> None:
    limits = Limits(roots=(root,))
    for name in (f"{root}/inner/a picture.png", "./inner/a picture.png", f"file://{root}/inner/a%20picture.png"):
        assert read(name, limits) == CONTENT


def test_a_path_is_read_where_there_is_no_proc(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS."""
    monkeypatch.setattr(os, "readlink", lambda path: Path("/nowhere/at/all").stat())
    limits = Limits(roots=(root.resolve(),))
    assert read(f"{root}/inner/a picture.png", limits) == CONTENT


def test_without_a_root_no_path_is_read(root: Path) -> None:
    refused(f"{root}/inner/a picture.png", Limits(), "names no folder")


def test_what_is_not_under_a_root_looks_as_if_it_were_not_there(root: Path) -> None:
    (root / "link").symlink_to(root.parent / "secret")
    (root / "up").symlink_to(root.parent)
    os.mkfifo(root / "fifo")
    names = ("/etc/passwd", f"{root}/../secret", f"{root}/link", f"{root}/up/secret", f"{root}/fifo", f"{root}/inner")
    names += ("/dev/zero", f"{root}/missing", f"file://{root}/%2e%2e/secret", f"{root}2/x")
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


def drip_lines(line: bytes, before: bytes = b"HTTP/1.1 200 OK\r\n") -> Answer:
    """So that no single wait is long."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        with contextlib.suppress(OSError):
            handler.wfile.write(before)
            for _ in range(40):
                handler.wfile.write(line)
                handler.wfile.flush()
                time.sleep(0.2)

    return answer


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def goes_silent(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\nthe beginning")
    time.sleep(5)


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
    "/drip-header": drip_lines(b"X: y\r\n"),
    "/drip-continue": drip_lines(b"HTTP/1.1 100 Continue\r\n\r\n", b""),
    "/drip-size": drip_lines(b"0", CHUNKED),
    "/drip-trailer": drip_lines(b"X: y\r\n", CHUNKED + b"1\r\nx\r\n0\r\n"),
    "/silent": goes_silent,
    "/broken": reply(302, Location="http://[bad"),
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
    "/metadata": "nothing is fetched from where localhost redirects to",
    "/broken": "neither a path nor a URL|not one of https",
    "/drip-header": "did not give the file",
    "/drip-continue": "did not give the file",
    "/drip-size": "did not give the file",
    "/drip-trailer": "did not give the file",
    "/silent": "did not give the file",
    "/to-file": "not one of https or http",
    "/gzip": "encoding that was not asked for",
    "/huge": "over 1000000 bytes",
    "/lies": "over 1000000 bytes",
    "/short": "90 bytes less",
    "/404": "answered 404",
    "/drip": "TimeoutError",
    "/hang": "did not give the file",
}


@pytest.mark.parametrize("path", REFUSALS)
def test_what_a_host_may_not_do(port: int, local: Limits, path: str) -> None:
    started = time.monotonic()
    refused(f"http://localhost:{port}{path}", local, REFUSALS[path])
    assert time.monotonic() - started < 2.5


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
::1 fe80::1 fec0::1 fd00::1 ::ffff:10.0.0.1 ::10.0.0.1 64:ff9b::a00:1 64:ff9b:1::a00:1 2002:7f00:1::
"""


@pytest.mark.parametrize("address", NOT_PUBLIC.split())
def test_no_name_leads_to_an_address_that_is_not_public(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(family, socket.SOCK_STREAM, 6, "", (address, 443))])
    refused("https://example.org/x", Limits(hosts=("example.org",)), "private network")


def test_a_resolver_that_takes_long_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(5))
    started = time.monotonic()
    refused("https://example.org/x", Limits(hosts=("example.org",), seconds=0.5), "TimeoutError")
    assert time.monotonic() - started < 2


def test_a_certificate_that_nobody_signed_is_refused(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*make, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    limits = Limits(hosts=(f"localhost:{server.server_port}",), allow_private=LOOPBACK)
    refused(f"https://localhost:{server.server_port}/file", limits, "SSLCertVerificationError")
    server.shutdown()


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
