"""A user's own model, made of a built-in kind: it says when it has prepared an item."""

from __future__ import annotations

from typing import Any

from legit_worker.models.kinds import TextEmbedding


class Telling(TextEmbedding):
    """As the kind `embed`."""

    def preprocess(self, item: Any) -> Any:
        """Says so once it is done."""
        prepared = super().preprocess(item)
        print("prepared an item", flush=True)
        return prepared
