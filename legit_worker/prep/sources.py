"""Files that a client sends in its message, or names by a path or a URL.

In: a string from any sender. Out: the file's bytes, or `InvalidInputError`. A string with `scheme://` is a URL. A
string that begins with `/`, `./` or `file:` is a path, unless it begins with `/9j/`, as every JPEG in base64 does. Any
other string is base64. Only the folders and hosts that the operator named are read; by default there are none.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import os
import queue
import re
import socket
import ssl
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from legit_worker.errors import InvalidInputError
from legit_worker.inputs.images import bytes_of

#: Bytes read at a time.
CHUNK = 1 << 16

#: The most characters of a path or a URL: what servers take, and what a file system takes.
MOST_CHARACTERS = 4096

#: The schemes of a URL, and their ports.
PORTS = {"https": 443, "http": 80}

_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class Limits:
    """The bounds on what a client may have read."""

    max_bytes: int = 32 * 2**20
    #: The folders that files may be in, at any depth.
    roots: tuple[Path, ...] = ()
    #: `images.example.org`, or `*.example.org` for all hosts below it, with `:port` if it is not the scheme's own. The
    #: scheme is https, unless the entry is written `http://images.internal`.
    hosts: tuple[str, ...] = ()
    #: Private networks that a host of `hosts` may be in.
    allow_private: tuple[str, ...] = ()
    #: The time for one file, with all its redirects.
    seconds: float = 10.0
    redirects: int = 3


def read(source: Any, limits: Limits) -> bytes:
    """Read the file's bytes. Raises `InvalidInputError`."""
    if not isinstance(source, str) or not source:
        raise InvalidInputError(f"expected base64, a path or a URL, got {type(source).__name__}")
    try:
        if is_remote(source):
            _check_address(source)
        if _is_path(source):
            return _read_path(source, limits)
        if is_remote(source):
            return _read_url(source, limits)
    except InvalidInputError:
        raise
    except ValueError:  # no address has this form: brackets, surrogates, names of 64 letters
        raise InvalidInputError("this is neither a path nor a URL that could be read") from None
    return bytes_of(source, limits.max_bytes)


def _check_address(source: str) -> None:
    """Raise `ValueError` for what is no address, and would not be shown in an error either."""
    if len(source) > MOST_CHARACTERS:
        raise InvalidInputError(f"a path or a URL has at most {MOST_CHARACTERS} characters, and this has {len(source)}")
    source.encode()


def is_remote(source: str) -> bool:
    """Tell whether the string is a path or a URL, and not the file itself."""
    return bool(_REMOTE.match(source)) or _is_path(source)


def _is_path(source: str) -> bool:
    return source.startswith(("/", "./", "file:")) and not source.startswith("/9j/")


def _read_path(source: str, limits: Limits) -> bytes:
    if not limits.roots:
        raise InvalidInputError("files are not read from paths here: LEGIT_WORKER_PREP_ROOTS names no folder")
    named = urlsplit(source) if source.startswith("file:") else None
    if named is not None and named.hostname not in (None, "localhost"):
        raise _not_there(source)
    path = unquote(named.path) if named is not None else source
    roots = [root.resolve() for root in limits.roots]
    candidates = (Path(root, path).resolve() for root in roots)
    for found in candidates:
        if _is_file(found) and any(found.is_relative_to(root) for root in roots):
            return _read_file(found, roots, limits)
    raise _not_there(source)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is longer than names are
        return False


def _read_file(path: Path, roots: list[Path], limits: Limits) -> bytes:
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        raise _not_there(str(path)) from None
    try:
        # Check the open file again: from now on nobody can put another file in its place.
        real = _real(file, path)
        if not stat.S_ISREG(os.fstat(file).st_mode) or not any(real.is_relative_to(root) for root in roots):
            raise _not_there(str(path))
        with open(file, "rb", closefd=False) as opened:
            content = opened.read(limits.max_bytes + 1)
    finally:
        os.close(file)
    if len(content) > limits.max_bytes:
        raise _too_large(limits)
    return content


def _real(file: int, path: Path) -> Path:
    """Return where an open file is."""
    try:
        return Path(os.readlink(f"/proc/self/fd/{file}"))
    except FileNotFoundError:  # macOS has no /proc
        real = path.resolve()
        if not os.path.samestat(os.stat(real), os.fstat(file)):
            raise _not_there(str(path)) from None
        return real


def _read_url(source: str, limits: Limits) -> bytes:
    """Fetch a file. Errors name the client's host, and never a host that this one redirects to."""
    deadline = monotonic() + limits.seconds
    host = urlsplit(source).hostname or ""
    for _ in range(limits.redirects + 1):
        url = _checked(source, limits, host)
        try:
            with _connected(url, limits, deadline, host) as connection:
                connection.request("GET", _target(url), headers={"Accept-Encoding": "identity"})
                response = connection.getresponse()
                if response.status in (301, 302, 303, 307, 308):
                    source = urljoin(source, response.headers.get("Location", ""))
                    continue
                content = _body(response, limits, host)
                _left(deadline)  # a socket that was shut down looks like the end of the file
                return content
        except (OSError, http.client.HTTPException) as error:
            raise InvalidInputError(f"{host} did not give the file: {type(error).__name__}") from None
    raise InvalidInputError(f"the URL redirects more than {limits.redirects} times")


def _checked(source: str, limits: Limits, named: str) -> SplitResult:
    """Return the URL's parts, if the settings allow its host."""
    try:
        url = urlsplit(source)
        port = url.port or PORTS[url.scheme]
    except (ValueError, KeyError):
        raise InvalidInputError("the URL is not one of https or http") from None
    if url.username is not None or url.password is not None:
        raise InvalidInputError("a URL with a user name or a password is not fetched")
    if not any(_covers(entry, url, port) for entry in limits.hosts):
        where = named if url.hostname == named else f"where {named} redirects to"
        raise InvalidInputError(f"nothing is fetched from {where} here: LEGIT_WORKER_PREP_HOSTS does not name it")
    return url


def _covers(entry: str, url: SplitResult, port: int) -> bool:
    allowed = urlsplit(entry if "://" in entry else f"https://{entry}")
    name, host = allowed.hostname or "", url.hostname or ""
    matches = host.endswith(name[1:]) if name.startswith("*.") else host == name
    return matches and allowed.scheme == url.scheme and (allowed.port or PORTS.get(allowed.scheme)) == port


@contextlib.contextmanager
def _connected(url: SplitResult, limits: Limits, deadline: float, named: str) -> Iterator[http.client.HTTPConnection]:
    """Connect to a checked address of the host, whose name is resolved once.

    A timer shuts the socket down at the deadline. A socket's own timeout starts again with each byte that a slow server
    sends.
    """
    host, port = url.hostname or "", url.port or PORTS[url.scheme]
    addresses = _resolved(host, port, deadline)
    if not all(_is_allowed(address, limits) for address in addresses):
        where = named if host == named else f"where {named} redirects to"
        raise InvalidInputError(f"{where} is in a private network, which LEGIT_WORKER_PREP_PRIVATE does not name")
    is_secure = url.scheme == "https"
    connection = (http.client.HTTPSConnection if is_secure else http.client.HTTPConnection)(host, port)
    sock = socket.create_connection((addresses[0], port), timeout=_left(deadline))
    if is_secure:
        context = ssl.create_default_context()
        sock = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
    watch = threading.Timer(_left(deadline), _shut_down, (sock,))
    watch.daemon = True
    watch.start()
    try:
        if isinstance(sock, ssl.SSLSocket):
            sock.do_handshake()
        connection.sock = sock
        yield connection
    finally:
        watch.cancel()
        connection.close()
        sock.close()


def _shut_down(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _resolved(host: str, port: int, deadline: float) -> list[str]:
    """Return the addresses of a name. The system's resolver has no time limit, so a thread asks it."""
    answer: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answer.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, ValueError) as error:
            answer.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        found = answer.get(timeout=_left(deadline))
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(found, Exception):
        raise found
    return [str(address[0]) for *_, address in found]


#: IPv6 networks that lead to any IPv4 address, private ones too.
TRANSLATED = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "::/96")))


def _is_allowed(address: str, limits: Limits) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        ip = ip.ipv4_mapped or ip.sixtofour or ip
    if any(ip in ipaddress.ip_network(network, strict=False) for network in limits.allow_private):
        return True
    if ip.is_multicast or getattr(ip, "is_site_local", False) or any(ip in network for network in TRANSLATED):
        return False
    return ip.is_global


def _target(url: SplitResult) -> str:
    """Return the path and query, and escape characters that a request line can't hold."""
    path = quote(url.path or "/", safe="/%:@!$&'()*+,;=~-._")
    return f"{path}?{quote(url.query, safe='/%:@!$&()*+,;=~-._?')}" if url.query else path


def _body(response: http.client.HTTPResponse, limits: Limits, host: str) -> bytes:
    if response.status != 200:
        raise InvalidInputError(f"{host} answered {response.status}")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise InvalidInputError(f"{host} sent the file in an encoding that was not asked for")
    content = bytearray()
    while chunk := response.read1(CHUNK):
        content += chunk
        if len(content) > limits.max_bytes:
            raise _too_large(limits)
    if response.length:
        raise InvalidInputError(f"{host} sent {response.length} bytes less than it had said")
    return bytes(content)


def _left(deadline: float) -> float:
    """Return the seconds until the deadline. Raises `TimeoutError` if there are none."""
    left = deadline - monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _too_large(limits: Limits) -> InvalidInputError:
    return InvalidInputError(f"the file has over {limits.max_bytes} bytes, the most that one may have")


def _not_there(source: str) -> InvalidInputError:
    return InvalidInputError(f"no file under LEGIT_WORKER_PREP_ROOTS is named {source[:200]!r}")
