"""A model of a user's own with nothing special, for tests to change one method of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Plain:
    """Gives each item in capitals."""

    def load(self, device: str) -> None:
        """Nothing to read."""

    def preprocess(self, item: str) -> Any:
        """As it came."""
        return item

    def cost(self, item: Any) -> int:
        """Any."""
        return 1

    def forward(self, batch: Sequence[Any]) -> Any:
        """Capitals."""
        return [item.upper() for item in batch]

    def postprocess(self, output: Any) -> Any:
        """As it is."""
        return output
