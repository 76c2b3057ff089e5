"""`celery legit validate`, as an operator uses it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from harness import START_SECONDS, Broker, celery_command, project_environment


class Operator:
    """Types commands in one folder."""

    def __init__(self, broker: Broker, model: Path, folder: Path) -> None:
        self.file = folder / "reference.jsonl"
        self._folder = folder
        settings = {"LEGIT_WORKER_MODELS__TINY__PATH": str(model), "LEGIT_WORKER_DEVICE": "cpu", "COLUMNS": "160"}
        self._environment = project_environment(broker, settings)

    def validate(self, *options: str, model: str = "tiny") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            celery_command("legit_worker", "legit", "validate", f"--model={model}", *options),
            env=self._environment,
            cwd=self._folder,
            capture_output=True,
            text=True,
            timeout=4 * START_SECONDS,
            check=False,
        )


@pytest.fixture
def operator(broker: Broker, tiny_paths: dict[str, Path], tmp_path: Path) -> Operator:
    return Operator(broker, tiny_paths["embed"], tmp_path)


def test_all_paths_agree_with_encode_until_the_reference_is_tampered_with(operator: Operator) -> None:
    made = operator.validate(f"--make-reference={operator.file}")
    assert made.returncode == 0, made.stderr
    agreed = operator.validate(f"--against={operator.file}", "--json")
    assert agreed.returncode == 0, agreed.stdout + agreed.stderr
    report = json.loads(agreed.stdout)
    assert set(report["paths"]) == {"result backend", "json", "json, base64", "celery", "laravel"}
    assert all(path["compared"] == path["rows"] > 0 and path["in_order"] for path in report["paths"].values())
    assert report["batches"] < report["items"]

    lines = operator.file.read_text().splitlines()
    row = json.loads(lines[7])
    lines[7] = json.dumps(row | {"vector": [-number for number in row["vector"]]})
    operator.file.write_text("\n".join(lines))
    differed = operator.validate(f"--against={operator.file}")
    assert differed.returncode == 1, differed.stdout + differed.stderr
    for path in report["paths"]:
        assert f"{path}, row 7, " in differed.stdout


def test_wrong_use_is_one_sentence_and_exit_code_2(operator: Operator) -> None:
    missing = operator.validate(f"--against={operator.file}")
    unknown = operator.validate(f"--make-reference={operator.file}", model="nobody")
    assert (missing.returncode, unknown.returncode, operator.validate().returncode) == (2, 2, 2)
    assert "can't be read" in missing.stderr
    assert "no model is called 'nobody'; configured: tiny" in unknown.stderr
