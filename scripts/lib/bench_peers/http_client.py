"""Posts items to a server over HTTP, one per request, many at once. What comes back is read after the clock stops.

In: the server's command and address, and how a request and an answer look. Out: a `Peer`.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import aiohttp
from driver import Item, Peer

#: Requests under way: four batches of 32, so that the server always has one waiting.
AT_ONCE = 128
#: Seconds until the server answers; it loads torch and its model.
START_SECONDS = 150


class Server(Peer):
    def __init__(
        self,
        command: Callable[[int], list[str]],
        path: str,
        request: Callable[[Item], Any],
        answer: Callable[[Any], list[Any]],
    ) -> None:
        port = _free_port()
        self._url, self._request, self._answer = f"http://127.0.0.1:{port}{path}", request, answer
        self._process = subprocess.Popen(command(port))  # in this process group, which ends as a whole
        self._loop = asyncio.new_event_loop()
        self._wait()
        self._session = self._loop.run_until_complete(_session())

    def compute(self, items: Sequence[Item]) -> Any:
        return self._loop.run_until_complete(self._all([json.dumps(self._request(item)).encode() for item in items]))

    def vectors(self, computed: Any) -> list[Any]:
        return [vector for body in computed for vector in self._answer(json.loads(body))]

    async def _all(self, bodies: list[bytes]) -> list[bytes]:
        return await asyncio.gather(*map(self._post, bodies))

    async def _post(self, body: bytes) -> bytes:
        async with self._session.post(self._url, data=body, headers={"Content-Type": "application/json"}) as response:
            response.raise_for_status()
            return await response.read()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        body = json.dumps(self._request("a text")).encode()
        order = urllib.request.Request(self._url, data=body, headers={"Content-Type": "application/json"})
        while time.monotonic() < deadline and self._process.poll() is None:
            with suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(order, timeout=START_SECONDS):
                return
            time.sleep(0.2)
        raise SystemExit(f"the server ended with {self._process.poll()}, or gave no answer in {START_SECONDS} s")


async def _session() -> aiohttp.ClientSession:
    """Made inside the loop, whose connections it keeps."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=AT_ONCE))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
