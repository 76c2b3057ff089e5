"""Answers HTTP: `/metrics`, `/healthz` and `/readyz`.

In: requests. Out: what the collector and health say. If the port is taken, the worker goes on without it, says so, and
has it as soon as it is free.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import isfinite
from typing import Any
from urllib.parse import parse_qs, urlsplit
from weakref import WeakSet

from prometheus_client.exposition import choose_encoder

from legit_worker.metrics.collector import Collector
from legit_worker.metrics.health import ALIVE_SECONDS, Answer, Health

logger = logging.getLogger(__name__)

#: Seconds between two tries to have a port that is taken: soon enough for a rolling restart on one host.
RETRY_SECONDS = 2.0

#: Seconds that a client may take to ask. Each has a thread of its own meanwhile.
CLIENT_SECONDS = 5.0


class Server:
    """A thread of its own, until the process ends. Takes no lock that the main thread waits for."""

    def __init__(self, port: int, collector: Collector, health: Health) -> None:
        #: The port that was asked for, and the one that it has; None before that.
        self._wanted, self.port = port, None
        self._collector = collector
        self._health = health
        self._http: ThreadingHTTPServer | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="legit_worker metrics", daemon=True)

    def __repr__(self) -> str:
        return f"<Server: {'no port yet' if self.port is None else f'port {self.port}'}>"

    def start(self) -> None:
        """Return at once; the log says when the port is open."""
        self._thread.start()

    def close(self) -> None:
        """Give the port back."""
        self._is_over.set()
        if self._http is not None:
            self._http.shutdown()
        self._thread.join()

    def _run(self) -> None:
        listening = self._listen()
        if listening is None:
            return
        self._http = ThreadingHTTPServer(listening.getsockname()[:2], self._handler(), bind_and_activate=False)
        self._http.socket.close()
        self._http.socket = listening
        _listening.add(listening)
        self.port = listening.getsockname()[1]
        logger.info("metrics are at port %d: /metrics, /healthz, /readyz", self.port)
        with self._http:
            self._http.serve_forever()

    def _listen(self) -> socket.socket | None:
        """Return a socket that listens at the port, on all of the host's addresses. None if the worker ends before."""
        is_told = False
        while not self._is_over.is_set():
            try:
                return _listener(self._wanted)
            except OSError as error:
                if not is_told:
                    is_told = True
                    logger.warning(
                        "port %d can't be had (%s): there are no metrics until it is free. Give each worker of a host "
                        "a LEGIT_WORKER_METRICS_PORT of its own, or 0 for any free port",
                        *(self._wanted, error),
                    )
            self._is_over.wait(RETRY_SECONDS)
        return None

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        return type("Handler", (Handler,), {"collector": self._collector, "health": self._health})


class Handler(BaseHTTPRequestHandler):
    """One connection's."""

    timeout = CLIENT_SECONDS
    collector: Collector
    health: Health

    def do_GET(self) -> None:
        """Answer. What goes wrong over it is the client's, and the log's."""
        path = urlsplit(self.path)
        try:
            status, kind, body = self._answer(path.path, parse_qs(path.query))
        except Exception as error:
            logger.exception("%s can't be answered", self.path)
            status, kind, body = HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", f"{error!r}\n".encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815  # as http.server calls it

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet: each probe would be a line."""

    def _answer(self, path: str, query: dict[str, list[str]]) -> tuple[HTTPStatus, str, bytes]:
        match path:
            case "/metrics":
                encode, kind = choose_encoder(self.headers.get("Accept", ""))
                return HTTPStatus.OK, kind, encode(self.collector)  # all that it calls is `collect`
            case "/healthz":
                try:
                    seconds = float(query.get("seconds", [str(ALIVE_SECONDS)])[0])
                except ValueError:
                    seconds = -1.0
                if not seconds > 0 or not isfinite(seconds):
                    return HTTPStatus.BAD_REQUEST, "text/plain", b"seconds should be a number above 0\n"
                return _json(self.health.alive(seconds))
            case "/readyz":
                return _json(self.health.ready())
            case _:
                return HTTPStatus.NOT_FOUND, "text/plain", b"there are /metrics, /healthz and /readyz\n"


def _json(answer: Answer) -> tuple[HTTPStatus, str, bytes]:
    status = HTTPStatus.OK if answer.is_yes else HTTPStatus.SERVICE_UNAVAILABLE
    return status, "application/json", json.dumps({"ok": answer.is_yes, **answer.why}).encode() + b"\n"


def _listener(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


#: This process's sockets. A child must not keep the port when its parent is gone.
_listening: WeakSet[socket.socket] = WeakSet()


def _close_in_child() -> None:
    for listening in list(_listening):
        listening.close()


os.register_at_fork(after_in_child=_close_in_child)
