"""LitServe over HTTP: `litserve_server.py`, and a client that sends one item per request."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from driver import Item, serve
from http_client import Server


def _command(port: int) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name("litserve_server.py")), str(port)]


def _request(item: Item) -> Any:
    return {"input": item}


def _answer(body: Any) -> list[Any]:
    vectors: list[Any] = body["vectors"]
    return vectors


if __name__ == "__main__":
    serve(Server(_command, "/predict", _request, _answer))
