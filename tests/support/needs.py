"""What a test needs and this machine may lack: absent, it skips at a desk and fails in CI."""

from __future__ import annotations

import os

import kombu
import pytest

#: Seconds within which a server that is there answers.
CONNECT_SECONDS = 3


def missing(what: str) -> None:
    """What a test needs is not there."""
    if os.environ.get("CI"):
        pytest.fail(f"{what}. In CI this is a failure.", pytrace=False)
    pytest.skip(what)


def find_server(url: str) -> None:
    """Skip the test at a desk, fail it in CI, where this server does not answer."""
    try:
        with kombu.Connection(url, connect_timeout=CONNECT_SECONDS) as connection:
            connection.ensure_connection(max_retries=1, timeout=CONNECT_SECONDS)
    except Exception as error:
        missing(f"no server answers at {kombu.Connection(url).as_uri()}: {error}")
