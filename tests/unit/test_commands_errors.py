"""What `celery legit …` says of an error: the thing that is wrong, and no other."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from celery import Celery
from click.testing import CliRunner

from legit_worker.cli.base import SECONDS, Command
from legit_worker.cli.checks import validate


def said(error: Exception | None, broker: str = "redis://:secret@localhost:1/0") -> str:
    """What the command prints whose code raises this."""

    def fail() -> None:
        if error is not None:
            raise error

    root = click.Group("celery", params=[click.Option(["--app"])], commands=[Command("top", callback=fail)])
    app = Celery(broker=broker, set_as_current=False)
    found = CliRunner().invoke(root, ["--app", "project", "top"], obj=SimpleNamespace(app=app))
    assert found.exit_code == 1
    return found.output


def missing(path: Path) -> Exception:
    with pytest.raises(FileNotFoundError) as caught:
        path.open()
    return caught.value


def test_an_error_of_a_file_is_not_the_brokers(tmp_path: Path) -> None:
    path = tmp_path / "x.svg"
    assert said(missing(path)) == f"Error: {path}: No such file or directory\n"
    assert said(OSError(errno.ENOSPC, "No space left on device")) == "Error: a file: No space left on device\n"


def test_an_error_of_a_connection_is_the_brokers() -> None:
    refused = "Error: the broker redis://:**@localhost:1/0 does not answer: [Errno 111] Connection refused. Start it"
    assert said(ConnectionRefusedError(111, "Connection refused")).startswith(refused)


@pytest.mark.parametrize("url", ["redis://:se/kr#et@localhost:6379/0", "nonsense://x", "redis://[::1/0"])
def test_a_brokers_url_that_cant_be_read_is_told_without_a_part_of_it(url: str) -> None:
    found = said(None, url)
    assert found.startswith("Error: the broker's URL can't be read: it begins like redis://")
    assert "kr" not in found
    assert "se" not in found.replace("sentinel", "")


@pytest.mark.parametrize("option", ["--min-cosine", "--max-difference"])
def test_what_validate_takes_for_equal_is_a_number(option: str) -> None:
    """By nan, all would be equal."""
    run = CliRunner().invoke(validate, ["--model", "a", option, "nan"])
    assert (run.exit_code, "nan is not a finite number" in run.output) == (2, True)


@pytest.mark.parametrize("text", ["nan", "inf", "0", "-1", "soon"])
def test_a_timeout_is_a_number_of_seconds_above_0(text: str) -> None:
    command = click.Command("top", params=[click.Option(["--timeout"], type=SECONDS)], callback=lambda timeout: None)
    assert CliRunner().invoke(command, ["--timeout", text]).exit_code == 2
    assert CliRunner().invoke(command, ["--timeout", "0.5"]).exit_code == 0
