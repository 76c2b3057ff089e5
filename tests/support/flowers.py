"""Flower, the monitor that most Celery users have, as they start it.

In: a broker and a folder. Out: a running `celery flower`, and what its HTTP API says.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import START_SECONDS, Broker, celery_command, poll, project_environment

#: Seconds until Flower's HTTP server answers. It asks workers, who answer between two batches.
HTTP_SECONDS = 30


class Flower:
    """A running one."""

    def __init__(self, url: str) -> None:
        self._url = url

    def get(self, path: str, **query: Any) -> Any:
        """What a path of the API answers, as JSON."""
        return json.loads(self.text(path, **query))

    def text(self, path: str, **query: Any) -> str:
        """What any path answers."""
        return self._open(f"{self._url}/{path}?{urllib.parse.urlencode(query)}")

    def post(self, path: str, **body: Any) -> Any:
        """Tell it to do something, with a body of JSON."""
        return json.loads(self._open(f"{self._url}/{path}", json.dumps(body).encode()))

    @staticmethod
    def _open(url: str, data: bytes | None = None) -> str:
        with urllib.request.urlopen(url, data, timeout=HTTP_SECONDS) as answer:
            text: str = answer.read().decode()
        return text


@contextlib.contextmanager
def running_flower(broker: Broker, folder: Path) -> Iterator[Flower]:
    """One that is gone when the block ends."""
    log = folder / "flower.log"
    command = celery_command("controlled", "flower", "--address=127.0.0.1", "--port=0", "--inspect_timeout=10000")
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=project_environment(broker) | {"FLOWER_UNAUTHENTICATED_API": "true"},
            cwd=folder,
        )

    def url() -> str | None:
        assert process.poll() is None, log.read_text(errors="replace")
        found = re.search(r"Visit me at (http://\S+)", log.read_text(errors="replace"))
        return found and found[1]

    try:
        yield Flower(poll(url, "Flower to start", START_SECONDS))
    finally:
        process.kill()
        process.wait()
