"""`celery legit …` for an operator: what fits a terminal, and what stands in the way in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from commands import COMMAND_SECONDS, celery
from harness import SIMULATED, Broker, StartWorker, celery_command, project_environment

#: Columns of the narrowest terminal.
COLUMNS = 80

#: Nobody listens there.
NOWHERE = {"CELERY_BROKER_URL": "redis://localhost:1/0", "CELERY_RESULT_BACKEND": "redis://localhost:1/0"}

APPS = {"LEGIT_WORKER_APPS__ALPHA__RESULT_ROUTING": "on", "LEGIT_WORKER_APPS__BETA__WEIGHT": "2"}

COMMANDS = [
    "status",
    *("models", "models load sim", "queues", "top"),
    *("results list", "results replay alpha", "results drop alpha"),
    *("dead list", "dead show alpha", "dead replay alpha", "dead drop alpha"),
]


def legit(broker: Broker, words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return celery("project", "legit", *words.split(), broker=broker, settings=variables, columns=COLUMNS)


def alone(broker: Broker, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """As a shell runs it."""
    return subprocess.run(
        command,
        env=project_environment(broker, variables) | {"COLUMNS": str(COLUMNS)},
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        check=False,
    )


def test_a_broker_that_does_not_answer_is_one_sentence(broker: Broker) -> None:
    for words in COMMANDS:
        told = legit(broker, words, **NOWHERE, **APPS)
        assert (told.returncode, told.stdout) == (1, ""), (words, told.stderr)
        assert "localhost:1/0 does not answer" in told.stderr, words
        assert len(told.stderr.splitlines()) == 1, words
    told = alone(broker, *celery_command("project", "legit", COMMANDS[0]), **NOWHERE)
    assert (told.returncode, told.stdout) == (1, "")
    assert len(told.stderr.splitlines()) == 1


def test_a_command_without_a_project_says_how_to_name_one(broker: Broker) -> None:
    for words in (*COMMANDS, "doctor", "validate --model tiny --against file"):
        told = celery(None, "legit", *words.split(), broker=broker)
        assert told.returncode, words
        assert "celery -A yourproject legit" in told.stderr, words
    told = alone(broker, str(Path(sys.executable).with_name("celery")), "legit", "status")
    assert told.returncode != 0
    assert "celery -A yourproject legit" in told.stderr
    assert "Traceback" not in told.stderr


def test_an_unknown_app_is_refused_with_those_that_there_are(broker: Broker) -> None:
    for what in ("list", "replay", "drop"):
        told = legit(broker, f"results {what} nosuch", **APPS)
        assert told.returncode, what
        assert "'nosuch'" in told.stderr, what
        assert "alpha, beta" in told.stderr, what
        assert len(told.stderr.splitlines()) == 1, what


def test_without_any_app_the_list_says_how_to_have_one(broker: Broker) -> None:
    finished = legit(broker, "results list")
    assert finished.returncode == 0
    assert "LEGIT_WORKER_APPS__<APP>__RESULT_ROUTING=on" in finished.stderr


def test_a_model_of_settings_without_workers_has_the_default_queue(broker: Broker) -> None:
    """Nobody takes tasks from a queue of its own, and none are sent there."""
    models = json.loads(legit(broker, "queues --json", **SIMULATED).stdout)["models"]
    assert models["sim"] == {"queue": broker.queue, "workers": [], "running": []}
    told = legit(broker, "queues", **SIMULATED)
    assert told.returncode == 0
    assert "workers" not in told.stdout
    assert told.stderr == "no worker answered within 1.0 s: `running` is unknown\n"


def assert_fits(text: str) -> None:
    assert text.strip()
    assert all(len(line) <= COLUMNS for line in text.splitlines()), text
    assert "…" not in text


def test_the_tables_of_a_worker_and_of_dead_letters_fit_a_terminal(start_worker: StartWorker) -> None:
    unreachable = {"LEGIT_WORKER_APPS__ALPHA__URL": "redis://localhost:1/0", "LEGIT_WORKER_RESULT_RETRY_SECONDS": "0"}
    apps = APPS | unreachable
    worker = start_worker(environment=SIMULATED | apps | {"LEGIT_WORKER_ENABLED": "1"})
    sent = [worker.client.send_task("one", [number], headers={"app": "alpha"}) for number in range(3)]
    worker.answers(sent)
    status = legit(worker.broker, "status --timeout 5")
    assert status.returncode == 0, status.stderr
    assert "resident" in status.stdout
    assert_fits(status.stdout)
    letters = legit(worker.broker, "results list alpha", **apps)
    assert all(result.id in letters.stdout for result in sent)
    assert_fits(letters.stdout)


def doctor(broker: Broker, project: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return alone(broker, *celery_command(project, "legit", "doctor", *words), **variables)


def test_the_doctor_says_what_it_is_doing(broker: Broker) -> None:
    finished = doctor(broker, "legit_worker")
    assert finished.returncode == 0, finished.stdout
    steps = [line for line in finished.stdout.splitlines() if line.startswith("[")]
    assert steps[:3] == ["[1/8] settings", "[2/8] versions", "[3/8] broker"]
    assert_fits(finished.stdout)


def test_the_doctor_imports_no_torch_where_neither_a_gpu_nor_a_model_asks_for_it(
    broker: Broker, tmp_path: Path
) -> None:
    folder, imported = tmp_path / "torch", tmp_path / "imported"
    folder.mkdir()
    (folder / "__init__.py").write_text(f"open({str(imported)!r}, 'w')")
    variables = project_environment(broker)
    finished = doctor(broker, "legit_worker", "--json", PYTHONPATH=f"{tmp_path}:{variables['PYTHONPATH']}")
    assert not imported.exists()
    (gpu,) = (one for one in json.loads(finished.stdout) if one["about"] == "gpu")
    assert gpu["level"] == "ok"
    assert gpu["fix"] == ""


def test_the_doctor_names_what_has_to_be_installed(broker: Broker) -> None:
    """In a Python without torch, whatever the probes say after that."""
    finished = doctor(
        broker, "without_torch", "--json", LEGIT_WORKER_ENABLED="1", LEGIT_WORKER_MODELS__M__PATH="/nowhere"
    )
    assert finished.returncode == 1
    assert any("pip install 'legit-worker[" in one["seen"] for one in json.loads(finished.stdout))
