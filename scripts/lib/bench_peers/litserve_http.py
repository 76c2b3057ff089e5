"""LitServe, one worker that batches: as its documentation shows for an embedding model.

In: MODEL_PATH. Batches of up to 64, gathered for at most 5 ms. With an argument `serve PORT`, this is the server.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from driver import Item, serve
from http_client import Server


def _serve(port: int) -> None:
    import litserve
    from sentence_transformers import SentenceTransformer

    class Embed(litserve.LitAPI):  # type: ignore[misc]
        def setup(self, device: str) -> None:
            self.model = SentenceTransformer(os.environ["MODEL_PATH"], device=device)

        def decode_request(self, request: Any) -> Any:
            return request["input"]

        def batch(self, inputs: list[Any]) -> list[Any]:
            return [[one] if isinstance(one, str) else one for one in inputs]

        def predict(self, inputs: list[Any]) -> list[Any]:
            rows = iter(self.model.encode([text for texts in inputs for text in texts], show_progress_bar=False))
            return [[next(rows) for _ in texts] for texts in inputs]

        def unbatch(self, output: list[Any]) -> list[Any]:
            return output

        def encode_response(self, output: Any) -> Any:
            return {"vectors": [vector.tolist() for vector in output]}

    api = Embed(max_batch_size=64, batch_timeout=0.005)
    litserve.LitServer(api, accelerator="cpu", workers_per_device=1).run(
        host="127.0.0.1", port=port, generate_client_file=False, log_level="warning"
    )


def _command(port: int) -> list[str]:
    return [sys.executable, __file__, "serve", str(port)]


def _request(item: Item) -> Any:
    return {"input": item}


def _answer(body: Any) -> list[Any]:
    vectors: list[Any] = body["vectors"]
    return vectors


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _serve(int(sys.argv[2]))
    else:
        serve(Server(_command, "/predict", _request, _answer))
