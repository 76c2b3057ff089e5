"""Programs in other languages, as the tests run them: PHP and Node, with one JSON argument and one line of JSON a word.

In: a script and what it is given. Out: what it said. Where a runtime, or something that the scripts load, is not there,
the test is skipped at a desk and fails in CI.
"""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from harness import ANSWER_SECONDS
from needs import missing

FOLDER = Path(__file__).parents[1] / "acceptance"

#: What the PHP scripts load, and the Debian package that has it.
NEEDED = """
foreach (['redis' => 'php-redis', 'pdo_sqlite' => 'php-sqlite3'] as $extension => $package) {
    extension_loaded($extension) or exit($package);
}
$packages = ['Illuminate/Queue', 'Illuminate/Redis', 'Illuminate/Events', 'PhpAmqpLib'];
foreach ($packages as $package) {
    stream_resolve_include_path("$package/autoload.php") or exit($package);
}
"""

#: Every byte length of UTF-8, a quote, a backslash, and what JSON must escape.
UNICODE = 'naïve café — 東京 🚆 "\\" \u2028\t𝔘'


@functools.cache
def php() -> str:
    """The command."""
    command = shutil.which("php")
    if command is None:
        missing("php is not on PATH")
    assert command
    lacks = subprocess.run([command, "-r", NEEDED], capture_output=True, text=True, check=True).stdout
    if lacks:
        missing(f"php lacks {lacks}")
    return command


@functools.cache
def node() -> str:
    """The command."""
    command = shutil.which("node")
    if command is None:
        missing("node is not on PATH")
    assert command
    if not (FOLDER / "node" / "node_modules" / "celery-node").exists():
        missing("celery-node is not installed: npm ci --prefix tests/acceptance/node")
    return command


def start_php(script: str, **given: Any) -> subprocess.Popen[str]:
    """Start a script, and don't wait for it."""
    # E_DEPRECATED off: Debian's Laravel is older than its PHP, and says so in a hundred lines.
    settings = ["-d", "error_reporting=E_ALL & ~E_DEPRECATED", "-d", "display_errors=stderr"]
    return _start([php(), *settings, str(FOLDER / "php" / script)], given)


def run_php(script: str, **given: Any) -> list[dict[str, Any]]:
    """Run a script to its end."""
    return finish(start_php(script, **given))


def run_node(script: str, **given: Any) -> list[dict[str, Any]]:
    """Run a script to its end."""
    return finish(_start([node(), str(FOLDER / "node" / script)], given))


def _start(command: list[str], given: dict[str, Any]) -> subprocess.Popen[str]:
    return subprocess.Popen([*command, json.dumps(given)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """What a script said, line by line."""
    try:
        out, errors = process.communicate(timeout=ANSWER_SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0, f"{out}\n{errors}"
    return [json.loads(line) for line in out.split("\n") if line]  # U+2028 ends no line


def redis_server(url: str) -> dict[str, Any]:
    """Where a script finds the server."""
    parts = urlsplit(url)
    return {"host": parts.hostname, "port": parts.port, "database": int(parts.path.strip("/") or 0)}


def amqp_server(url: str) -> dict[str, Any]:
    """The same, for RabbitMQ."""
    parts = urlsplit(url)
    return {
        "host": parts.hostname,
        "port": parts.port or 5672,
        "user": parts.username or "guest",
        "password": parts.password or "guest",
        "vhost": unquote(parts.path[1:]) or "/",
    }
