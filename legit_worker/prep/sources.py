"""Files that a client names: in the message itself, under a folder, or on a host.

In: a string that anyone may have sent. Out: the file's bytes, or `InvalidInputError`. A string with `scheme://` is a
URL, one that begins with `/`, `./` or `file:` is a path, all else is base64; and so is what begins with `/9j/`, as
every JPEG does. Nothing is read from a folder or a host
that the operator did not name, and by default there is none.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import http.client
import ipaddress
import os
import re
import socket
import ssl
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from legit_worker.errors import InvalidInputError

#: Bytes read at a time.
CHUNK = 1 << 16

#: The schemes of a URL, and their ports.
PORTS = {"https": 443, "http": 80}

_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_DATA = re.compile(r"data:[^,]*;base64,")


@dataclass(frozen=True)
class Limits:
    """What may be read."""

    max_bytes: int = 32 * 2**20
    #: Folders that files may be under.
    roots: tuple[Path, ...] = ()
    #: `images.example.org`, or `*.example.org` for all below it, with `:port` where it is not the scheme's own. https,
    #: unless it is written `http://images.internal`.
    hosts: tuple[str, ...] = ()
    #: Networks that are not the Internet's and that those hosts may be in nevertheless.
    allow_private: tuple[str, ...] = ()
    #: For the whole of one file, redirects and all.
    seconds: float = 10.0
    redirects: int = 3


def read(source: Any, limits: Limits) -> bytes:
    """The file's bytes. Raises `InvalidInputError`."""
    if not isinstance(source, str) or not source:
        raise InvalidInputError(f"expected base64, a path or a URL, got {type(source).__name__}")
    if _is_path(source):
        return _read_path(source, limits)
    if is_remote(source):
        return _read_url(source, limits)
    return _read_base64(source, limits)


def is_remote(source: str) -> bool:
    """Whether it says where the file is, instead of being it."""
    return bool(_REMOTE.match(source)) or _is_path(source)


def _is_path(source: str) -> bool:
    return source.startswith(("/", "./", "file:")) and not source.startswith("/9j/")


def _read_base64(text: str, limits: Limits) -> bytes:
    head = _DATA.match(text[:256])
    text = text[head.end() :] if head else text
    if len(text) > limits.max_bytes * 4 / 3 + 4:
        raise _too_large(limits)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidInputError(f"this is not base64: {error}") from None


def _read_path(source: str, limits: Limits) -> bytes:
    if not limits.roots:
        raise InvalidInputError("files are not read from paths here: LEGIT_WORKER_PREP_ROOTS names no folder")
    path = unquote(urlsplit(source).path) if source.startswith("file:") else source
    roots = [root.resolve() for root in limits.roots]
    try:
        # One descriptor for the check and for the reading: nobody can put another file between them.
        file = os.open(os.path.join(roots[0], path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        raise _not_there(source) from None
    try:
        real = Path(os.readlink(f"/proc/self/fd/{file}"))
        if not stat.S_ISREG(os.fstat(file).st_mode) or not any(real.is_relative_to(root) for root in roots):
            raise _not_there(source)
        with open(file, "rb", closefd=False) as opened:
            content = opened.read(limits.max_bytes + 1)
    finally:
        os.close(file)
    if len(content) > limits.max_bytes:
        raise _too_large(limits)
    return content


def _read_url(source: str, limits: Limits) -> bytes:
    deadline = monotonic() + limits.seconds
    for _ in range(limits.redirects + 1):
        url = _checked(source, limits)
        try:
            with _connected(url, limits, deadline) as connection:
                connection.request("GET", _target(url), headers={"Accept-Encoding": "identity"})
                response = connection.getresponse()
                if response.status in (301, 302, 303, 307, 308):
                    source = urljoin(source, response.headers.get("Location", ""))
                    continue
                return _body(response, connection, limits, deadline, url)
        except (OSError, http.client.HTTPException) as error:
            raise InvalidInputError(f"{url.hostname} did not give the file: {type(error).__name__}") from None
    raise InvalidInputError(f"the URL redirects more than {limits.redirects} times")


def _checked(source: str, limits: Limits) -> SplitResult:
    """The URL's parts, if its host may be asked."""
    try:
        url = urlsplit(source)
        port = url.port or PORTS[url.scheme]
    except (ValueError, KeyError):
        raise InvalidInputError("the URL is not one of https or http") from None
    if url.username is not None or url.password is not None:
        raise InvalidInputError("a URL with a user name or a password is not fetched")
    if not any(_covers(entry, url, port) for entry in limits.hosts):
        raise InvalidInputError(
            f"nothing is fetched from {url.hostname} here: LEGIT_WORKER_PREP_HOSTS does not name it"
        )
    return url


def _covers(entry: str, url: SplitResult, port: int) -> bool:
    allowed = urlsplit(entry if "://" in entry else f"https://{entry}")
    name, host = allowed.hostname or "", url.hostname or ""
    matches = host.endswith(name[1:]) if name.startswith("*.") else host == name
    return matches and allowed.scheme == url.scheme and (allowed.port or PORTS.get(allowed.scheme)) == port


@contextlib.contextmanager
def _connected(url: SplitResult, limits: Limits, deadline: float) -> Iterator[http.client.HTTPConnection]:
    """A connection to an address of the host that was checked; its name is resolved once."""
    host, port = url.hostname or "", url.port or PORTS[url.scheme]
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(address[0]) for *_, address in found]
    if not all(_is_allowed(address, limits) for address in addresses):
        raise InvalidInputError(f"{host} is in a private network, which LEGIT_WORKER_PREP_PRIVATE does not name")
    connection = http.client.HTTPConnection(host, port)
    plain = socket.create_connection((addresses[0], port), timeout=_left(deadline))
    with contextlib.closing(plain):
        secure = (
            ssl.create_default_context().wrap_socket(plain, server_hostname=host) if url.scheme == "https" else None
        )
        connection.sock = secure or plain
        with contextlib.closing(connection):
            yield connection


def _is_allowed(address: str, limits: Limits) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        ip = ip.ipv4_mapped or ip.sixtofour or ip
    if any(ip in ipaddress.ip_network(network, strict=False) for network in limits.allow_private):
        return True
    return ip.is_global and not ip.is_multicast and ip not in ipaddress.ip_network("64:ff9b::/96")


def _target(url: SplitResult) -> str:
    """The path and query, with what a request line can't hold escaped."""
    path = quote(url.path or "/", safe="/%:@!$&'()*+,;=~-._")
    return f"{path}?{quote(url.query, safe='/%:@!$&()*+,;=~-._?')}" if url.query else path


def _body(
    response: http.client.HTTPResponse,
    connection: http.client.HTTPConnection,
    limits: Limits,
    deadline: float,
    url: SplitResult,
) -> bytes:
    if response.status != 200:
        raise InvalidInputError(f"{url.hostname} answered {response.status}")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise InvalidInputError(f"{url.hostname} sent the file in an encoding that was not asked for")
    content = bytearray()
    while True:
        if connection.sock is not None:
            connection.sock.settimeout(_left(deadline))
        chunk = response.read1(CHUNK)
        if not chunk:
            break
        content += chunk
        if len(content) > limits.max_bytes:
            raise _too_large(limits)
        _left(deadline)
    if response.length:
        raise InvalidInputError(f"{url.hostname} sent {response.length} bytes less than it had said")
    return bytes(content)


def _left(deadline: float) -> float:
    """Seconds. Raises `TimeoutError` when there are none."""
    left = deadline - monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _too_large(limits: Limits) -> InvalidInputError:
    return InvalidInputError(f"the file has over {limits.max_bytes} bytes, the most that one may have")


def _not_there(source: str) -> InvalidInputError:
    return InvalidInputError(f"no file under LEGIT_WORKER_PREP_ROOTS is named {source[:200]!r}")
