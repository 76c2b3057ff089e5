"""Infinity's own server, as `infinity_emb v2` starts it, and its OpenAI form with base64, as OpenAI's client asks.

In: MODEL_PATH. The engine is that of `infinity_inside.py`.
"""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path
from typing import Any

import numpy
from driver import Item, serve
from http_client import Server

NAME = "minilm"


def _command(port: int) -> list[str]:
    program = str(Path(sys.executable).with_name("infinity_emb"))
    model = ["--model-id", os.environ["MODEL_PATH"], "--served-model-name", NAME, "--batch-size", "32"]
    engine = ["--engine", "torch", "--device", "cpu", "--dtype", "float32", "--no-bettertransformer"]
    return [program, "v2", *model, *engine, "--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"]


def _request(item: Item) -> Any:
    return {"model": NAME, "input": item, "encoding_format": "base64"}


def _answer(body: Any) -> list[Any]:
    return [numpy.frombuffer(base64.b64decode(row["embedding"]), numpy.float32).tolist() for row in body["data"]]


if __name__ == "__main__":
    serve(Server(_command, "/embeddings", _request, _answer))
