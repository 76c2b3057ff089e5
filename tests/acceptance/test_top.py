"""`celery legit top`: one frame where the output is no terminal, live in a terminal of any size, until Ctrl-C."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import subprocess
import termios
from pathlib import Path

import pytest
from commands import celery
from harness import (
    ANSWER_SECONDS,
    SIMULATED,
    START_SECONDS,
    Broker,
    StartWorker,
    Worker,
    celery_command,
    hear_ctrl_c,
    poll,
    project_environment,
)


@pytest.fixture(scope="module")
def one(start_module_worker: StartWorker) -> Worker:
    worker = start_module_worker("project", environment=SIMULATED | {"LEGIT_WORKER_ENABLED": "1"})
    worker.wait_until_it_hears()
    return worker


def top(broker: Broker, *words: str) -> subprocess.CompletedProcess[str]:
    return celery("project", "legit", "top", *words, broker=broker, settings=SIMULATED, columns=100)


def test_without_a_terminal_it_prints_one_frame(one: Worker, tmp_path: Path) -> None:
    one.answers([one.send("one", number) for number in range(20)])
    picture = tmp_path / "top.svg"
    found = top(one.broker, "--timeout", "3", "--svg", str(picture))
    assert found.returncode == 0, found.stderr
    for text in (one.name, "tasks/s", "sim", "resident", f"queues   {one.broker.queue} 0", "no dead letters"):
        assert text in found.stdout
    assert all(len(line) <= 100 for line in found.stdout.splitlines())
    assert picture.read_text().startswith("<svg")
    assert "@font-face" not in picture.read_text(), "a picture fetches nothing"


def test_if_no_worker_answers_the_frame_says_so(broker: Broker) -> None:
    found = top(broker, "--once", "--timeout", "0.5")
    assert found.returncode == 1
    assert "no worker with ModelPool answered" in found.stdout


def resize(terminal: int, lines: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))


def test_in_a_terminal_it_draws_on_through_a_resize_until_ctrl_c(one: Worker) -> None:
    ours, its = pty.openpty()
    resize(its, 40, 100)
    kept = {name: text for name, text in project_environment(one.broker, SIMULATED).items() if name != "COLUMNS"}
    process = subprocess.Popen(
        celery_command("project", "legit", "top", "--timeout", "1"),
        env=kept | {"TERM": "xterm"},
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
        preexec_fn=hear_ctrl_c,
    )
    os.close(its)
    os.set_blocking(ours, False)
    drawn = b""

    def frames() -> int:
        nonlocal drawn
        try:
            drawn += os.read(ours, 1 << 20)
        except BlockingIOError:
            assert process.poll() is None, drawn.decode(errors="replace")
        return drawn.count(b"tasks/s")

    try:
        poll(lambda: frames() >= 2, "two frames", START_SECONDS)
        resize(ours, 30, 70)
        seen = frames()
        poll(lambda: frames() >= seen + 2, "more frames", START_SECONDS)
        process.send_signal(signal.SIGINT)
        assert process.wait(ANSWER_SECONDS) == 0
        assert b"Traceback" not in drawn
    finally:
        process.kill()
        process.wait()
        os.close(ours)
