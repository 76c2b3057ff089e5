"""What `celery legit …` says of an error: the thing that is wrong, and no other."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from celery import Celery
from click.testing import CliRunner

from legit_worker.cli.base import Command


def said(error: Exception) -> str:
    """What the command prints whose code raises this."""

    def fail() -> None:
        raise error

    root = click.Group("celery", params=[click.Option(["--app"])], commands=[Command("top", callback=fail)])
    app = Celery(broker="redis://:secret@localhost:1/0", set_as_current=False)
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
