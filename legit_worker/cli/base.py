"""What all commands share: options, errors in one sentence, tables, and text that a terminal can show.

In: an operator's command line. Out: the classes of commands and groups, their common options, and how they print.
"""

from __future__ import annotations

import errno
from contextlib import AbstractContextManager, nullcontext
from math import isfinite
from typing import Any

import click
from celery import Celery
from celery.bin.base import CeleryCommand
from kombu.exceptions import OperationalError
from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

#: What to say of a server's URL that kombu can't read.
UNREADABLE_URL = (
    "URL can't be read: it begins like redis://, rediss://, sentinel://, amqp:// or amqps://, and has what is special "
    "in a password as %XX"
)

#: What only the writing of a file meets: a full disk, a full quota, a file that grows too large.
_OF_FILES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Plainly(click.Command):
    """Reports an error in one sentence, instead of a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Raises `UsageError` without a project, and `ClickException` for errors that it expects."""
        from legit_worker.errors import LegitWorkerError

        if not ctx.find_root().params.get("app"):
            raise click.UsageError(f"name the project: celery -A yourproject {spelled(ctx)}")
        try:
            with ctx.obj.app.connection_for_read() as connection:
                away = (OperationalError, *connection.connection_errors)
        except (KeyError, TypeError, ValueError):  # which may show a part of the password
            raise click.ClickException(f"the broker's {UNREADABLE_URL}") from None
        try:
            return super().invoke(ctx)
        except LegitWorkerError as error:
            raise click.ClickException(str(error)) from None
        except away as error:
            if isinstance(error, OSError) and (error.filename is not None or error.errno in _OF_FILES):
                raise click.ClickException(f"{error.filename or 'a file'}: {error.strerror}") from None
            seen = str(error).rstrip(".")
            raise click.ClickException(
                f"the broker {connection.as_uri()} does not answer: {seen}. Start it, or correct its URL"
            ) from None


class _Number(click.FloatRange):
    """A number that can be compared with others, and waited for."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


#: The types of `--timeout` and `--wait`, in seconds, and of the tolerances of `validate`.
SECONDS, COSINE, DIFFERENCE = _Number(min=0, min_open=True), _Number(min=-1, max=1), _Number(min=0)

timeout_option = click.option(
    "--timeout", type=SECONDS, default=1.0, show_default=True, help="Seconds to wait for workers."
)
as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class Command(_Plainly, CeleryCommand):
    """A command."""


class Group(_Plainly, click.Group):
    """A command with more commands below it."""


def spelled(ctx: click.Context) -> str:
    """Return the command's words after `celery`."""
    return ctx.command_path.partition(" ")[2]


def reach(app: Celery) -> None:
    """Raise at once if the broker is away."""
    from legit_worker.routing import wires

    with app.connection_for_read() as connection:
        wires.reach(connection)


def taken_queues(app: Celery, timeout: float = 1.0) -> dict[str, list[str]]:
    """Ask the workers from which queues they take tasks. Returns the queues' names, by the worker's name."""
    active = app.control.inspect(timeout=timeout).active_queues() or {}
    return {worker: [queue["name"] for queue in found] for worker, found in sorted(active.items())}


def safe(text: Any) -> Text:
    """Return what a stranger may have written as text that moves no cursor, and is no markup."""
    return Text("".join(one if one.isprintable() or one == "\n" else repr(one)[1:-1] for one in str(text)))


def minute(at: str | None) -> str:
    """Cut a time to its minute."""
    return str(at or "")[:16].replace("T", " ")


def new_table(*columns: Column | str, **options: Any) -> Table:
    """Return a table without lines between its columns, which folds long words."""
    table = Table(*columns, **options, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for column in table.columns:
        column.overflow = "fold"
    return table


def mib(size: int) -> str:
    """Write bytes in MiB."""
    return f"{size / 2**20:,.0f} MiB"


def busy(words: str, *, quiet: bool = False) -> AbstractContextManager[object]:
    """Show on a terminal that something long goes on; nothing if the output is no terminal, or `quiet`."""
    console = Console()
    return console.status(words) if console.is_terminal and not quiet else nullcontext()
