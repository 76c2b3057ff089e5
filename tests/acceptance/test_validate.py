"""`celery legit validate` through the real command: agreement is 0, a difference is 1, and it leaves nothing behind."""

from __future__ import annotations

import json
import signal
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
import tiny_models
from commands import celery
from harness import ANSWER_SECONDS, Broker, celery_command, hear_ctrl_c, poll, project_environment
from terminal import write_to_terminal

from legit_worker.settings import ModelSettings
from legit_worker.validation.command import make_reference

#: A worker starts, loads a model, and embeds the golden texts by five paths.
SECONDS = 3 * ANSWER_SECONDS


@pytest.fixture(scope="module")
def reference(tiny_paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, servers: Any) -> Path:
    """A file made by the command, on a terminal, which shows how far it is."""
    path = tmp_path_factory.mktemp("validate") / "reference.jsonl"
    shown = write_to_terminal(command("--make-reference", str(path)), environment(servers.fresh(), tiny_paths))
    texts = len(path.read_text().splitlines()) - 1
    assert f"{texts}/{texts}" in shown
    return path


def validate(
    broker: Broker, tiny_paths: dict[str, Path], *options: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*options),
        env=environment(broker, tiny_paths) | variables,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def command(*options: str) -> list[str]:
    return celery_command("legit_worker", "legit", "validate", "--model", "tiny", *options)


def environment(broker: Broker, tiny_paths: dict[str, Path]) -> dict[str, str]:
    return project_environment(broker, {"LEGIT_WORKER_MODELS__TINY__PATH": str(tiny_paths["embed"])})


def test_all_formats_agree_and_nothing_is_left(broker: Broker, tiny_paths: dict[str, Path], reference: Path) -> None:
    done = validate(broker, tiny_paths, "--against", str(reference), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["agrees"]
    assert len(report["paths"]) == 5
    assert all(path["compared"] == path["rows"] >= 80 and path["in_order"] for path in report["paths"].values())
    if broker.url.startswith("redis"):
        with redis.Redis.from_url(broker.url) as client:
            assert [key for key in client.scan_iter() if not key.startswith((b"_kombu", b"legit.beat"))] == []


#: Texts of several lengths, two of them alike.
TEXTS = ["red apple", "the old dog sat on a mat", "The cat sat.", "the cat sat", "a cat is old " * 9, "river", "¿qué?"]

#: Each kind of answer, and the servers that carry its tasks: a broker's fixture, and a result backend of its own.
ANSWERS: dict[str, tuple[str, str | None]] = {
    "image": ("broker", None),
    "rerank": ("rabbitmq", "rpc://"),
    "sparse": ("rabbitmq", None),
    "multi": ("broker", None),
    "classify": ("broker", None),
}


def reference_of(model: Path, kind: str, folder: Path) -> Path:
    """The library's answers for a few texts."""
    texts, reference = folder / "texts.txt", folder / "reference.jsonl"
    texts.write_text("\n".join(TEXTS), encoding="utf-8")
    make_reference(ModelSettings(kind=kind, path=str(model)), reference, texts)
    return reference


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_of_every_kind_agree_on_all_servers(
    request: pytest.FixtureRequest, tiny_paths: dict[str, Path], tmp_path: Path, answer: str
) -> None:
    servers, backend = ANSWERS[answer]
    broker: Broker = request.getfixturevalue(servers)
    broker = replace(broker, backend=backend or broker.backend)
    builders = {"multi": tiny_models.build_multi, "classify": partial(tiny_models.build_cross_encoder, labels=3)}
    model = builders[answer](tmp_path / "model") if answer in builders else tiny_paths[answer]
    kind = "rerank" if answer == "classify" else answer
    own = {"LEGIT_WORKER_MODELS__TINY__PATH": str(model), "LEGIT_WORKER_MODELS__TINY__KIND": kind}
    against = str(reference_of(model, kind, tmp_path))
    done = validate(broker, tiny_paths, "--against", against, "--json", **own)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert (len(report["paths"]), report["skipped"]) == (5, {})
    assert all(path["compared"] == path["rows"] > 0 and path["in_order"] for path in report["paths"].values())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_when_it_is_stopped_nothing_is_left(
    broker: Broker, tiny_paths: dict[str, Path], reference: Path, number: signal.Signals
) -> None:
    running = subprocess.Popen(
        command("--against", str(reference)),
        env=environment(broker, tiny_paths),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=hear_ctrl_c,
    )
    with redis.Redis.from_url(broker.url) as server:
        poll(lambda: children(running.pid), "its worker")
        poll(lambda: list(server.scan_iter()), "its tasks")
        started = children(running.pid)
        running.send_signal(number)
        assert running.wait(timeout=ANSWER_SECONDS) != 0
        poll(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started), "its worker's end")
        assert [key for key in server.scan_iter() if not key.startswith((b"_kombu", b"legit.beat"))] == []


def children(pid: int) -> list[int]:
    """The processes that a process started."""
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_row_that_was_changed_is_named_on_each_path_that_there_is(
    broker: Broker, tiny_paths: dict[str, Path], tmp_path: Path
) -> None:
    """Without a result backend, the app's queues are looked at alone."""
    lines = reference_of(tiny_paths["embed"], "embed", tmp_path).read_text().splitlines()
    place, row = next((place, row) for place, row in enumerate(map(json.loads, lines)) if row.get("text") == "river")
    row["vector"] = [-number for number in row["vector"]]
    tampered = tmp_path / "tampered.jsonl"
    tampered.write_text("\n".join([*lines[:place], json.dumps(row), *lines[place + 1 :]]) + "\n")
    done = validate(replace(broker, backend="disabled://"), tiny_paths, "--against", str(tampered))
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.startswith("tiny: "), "no bar where there is no terminal"
    assert done.stdout.count("skipped, the project has no result backend") == 1
    assert done.stdout.count(f", row {place}, 'river': ") == done.stdout.count(", row ") == 4


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--against", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--model", "other", "--against", "x"), "tiny"),
        ((), "--against"),
    ],
)
def test_wrong_use_is_two_and_says_why(
    broker: Broker, tiny_paths: dict[str, Path], options: tuple[str, ...], word: str
) -> None:
    settings = {"LEGIT_WORKER_MODELS__TINY__PATH": str(tiny_paths["embed"])}
    words = ("legit", "validate", "--model", "tiny", *options)
    done = celery("legit_worker", *words, broker=broker, settings=settings)
    assert done.returncode == 2
    assert word in done.stderr
