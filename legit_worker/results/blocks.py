"""Sends a group of results in few large blocks.

In: a class of redis-py's connections. Out: the same class, which joins what redis-py cuts up.

redis-py sends each value above 6,000 bytes by itself, with what stands between two values: 600 pieces for 150 vectors.
For each piece the writer's thread waits for the interpreter lock, and the server wakes up. Both would interrupt the
batch that is computed meanwhile on the same cores.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

#: The most bytes of a block: few enough to stay in a core's cache while they are copied.
BLOCK = 256 * 1024


@functools.cache
def sending_blocks(connection: Any) -> Any:
    """Return a subclass of a connection's class that sends blocks."""
    return type(connection.__name__, (_SendsBlocks, connection), {})


class _SendsBlocks:
    def send_packed_command(self, command: bytes | str | Iterable[Any], check_health: bool = True) -> None:
        """Send packed commands (redis-py 4.5 to 8)."""
        blocks = command if isinstance(command, bytes | str) else list(joined(command))
        super().send_packed_command(blocks, check_health)  # type: ignore[misc]


def joined(pieces: Iterable[Any]) -> Iterator[bytes]:
    """Join pieces in their order. A piece that is larger than a block is sent by itself, without a copy of it."""
    block: list[Any] = []
    size = 0
    for piece in pieces:
        if block and size + len(piece) > BLOCK:
            yield b"".join(block)
            block, size = [], 0
        block.append(piece)
        size += len(piece)
    if block:
        yield b"".join(block)
