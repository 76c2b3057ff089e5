"""LitServe's server, one worker that batches: as its documentation shows for an embedding model.

In: a port, and MODEL_PATH. Batches of up to 64, gathered for at most 5 ms. The class stands in a module: the server
starts its worker as a new process, which imports it.
"""

import os
import sys
from typing import Any

import litserve
from sentence_transformers import SentenceTransformer


class Embed(litserve.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:
        self.model = SentenceTransformer(os.environ["MODEL_PATH"], device=device)

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # a type would name a part of the query
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


if __name__ == "__main__":
    server = litserve.LitServer(Embed(max_batch_size=64, batch_timeout=0.005), accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
