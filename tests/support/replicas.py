"""A Redis with a replica, and a Sentinel that watches both.

In: a folder. Out: real `redis-server` processes, which change their roles as an operator would have them.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import redis
from harness import START_SECONDS, poll
from needs import missing
from ownserver import free_port

#: The name by which Sentinel knows the master.
MASTER = "legit"


@dataclass
class RedisServer:
    """One `redis-server`."""

    folder: Path
    arguments: tuple[str, ...] = ()
    port: int = field(default_factory=free_port)

    def start(self) -> None:
        """At the same address each time, with what it had on disk."""
        if shutil.which("redis-server") is None:
            missing("redis-server is not there")
        self.folder.mkdir(exist_ok=True)
        command = ["redis-server", "--port", str(self.port), "--dir", str(self.folder), "--save", ""]
        command += ["--repl-diskless-sync-delay", "0", *self.arguments]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        poll(self._is_up, f"redis-server on {self.port}", START_SECONDS)

    def end(self) -> None:
        """Whatever state it is in."""
        with contextlib.suppress(Exception):
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(START_SECONDS)

    @property
    def client(self) -> redis.Redis:
        """A client of its own."""
        return redis.Redis(port=self.port, decode_responses=True)

    @property
    def url(self) -> str:
        """Where it is."""
        return f"redis://127.0.0.1:{self.port}/0"

    def replicate(self, other: RedisServer) -> None:
        """Become a replica of another, which keeps up from then on."""
        self.client.replicaof("127.0.0.1", other.port)
        poll(lambda: self.client.info("replication").get("master_link_status") == "up", "the replica to catch up")

    def promote(self) -> None:
        """Become a master."""
        self.client.replicaof("NO", "ONE")

    def _is_up(self) -> bool:
        with contextlib.suppress(redis.ConnectionError):
            return bool(self.client.ping())
        return False


class Sentinel(RedisServer):
    """One that watches a master, and decides alone."""

    def watch(self, master: RedisServer) -> None:
        """Begin. It fails over a second after it has lost sight of the master."""
        self.folder.mkdir(exist_ok=True)
        config = self.folder / "sentinel.conf"
        config.write_text(
            f"port {self.port}\ndir {self.folder}\nsentinel monitor {MASTER} 127.0.0.1 {master.port} 1\n"
            f"sentinel down-after-milliseconds {MASTER} 1000\nsentinel failover-timeout {MASTER} 5000\n"
        )
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(["redis-server", str(config), "--sentinel"], stdout=log, stderr=log)
        poll(self._is_up, f"the Sentinel on {self.port}", START_SECONDS)
        poll(lambda: self.client.sentinel_slaves(MASTER), "the Sentinel to find the replica")

    def fail_over(self) -> None:
        """As an operator would have it, with the master alive."""
        self.client.execute_command("SENTINEL", "FAILOVER", MASTER)
