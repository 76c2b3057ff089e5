"""Results in blocks: the server gets the same bytes, in few pieces."""

from __future__ import annotations

from typing import Any

import pytest
from redis.connection import Connection

from legit_worker.results.blocks import BLOCK, joined, sending_blocks


class Socket:
    """Notes what is sent."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def sendall(self, piece: bytes) -> None:
        self.sent.append(piece)


def sent_by(kind: Any, commands: list[tuple[Any, ...]]) -> list[bytes]:
    connection, socket = kind(), Socket()
    connection._sock = socket
    connection.send_packed_command(connection.pack_commands(commands))
    connection._sock = None
    return socket.sent


@pytest.mark.parametrize("size", [10, 8_000, BLOCK, 3 * BLOCK])
def test_the_server_gets_the_same_bytes_in_few_pieces(size: int) -> None:
    commands = [("SETEX", b"key", 10, b"x" * size), ("PUBLISH", b"key", b"x" * size)] * 20
    stock, ours = (sent_by(kind, commands) for kind in (Connection, sending_blocks(Connection)))
    assert b"".join(ours) == b"".join(stock)
    least = -(-sum(map(len, stock)) // BLOCK)
    assert len(ours) <= min(len(stock), 2 * least + 1)


def test_a_single_command_is_one_piece() -> None:
    connection = sending_blocks(Connection)()
    connection._sock = socket = Socket()
    connection.send_command("SET", "key", b"x" * 8_000, check_health=False)
    connection._sock = None
    assert len(socket.sent) == 1


def test_a_large_piece_is_not_copied() -> None:
    large = b"x" * (BLOCK + 1)
    assert [*joined([b"before", large, b"after"])][1] is large
