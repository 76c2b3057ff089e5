"""`celery legit …`: an operator's questions to the workers.

In: `celery -A PROJECT`. The answers come by the project's broker. Out: tables for people, in 80 columns, or JSON with
`--json`. If a command fails, it prints one sentence on stderr and sets an exit code.

Each `celery` command imports this package, a worker's too. So the commands are imported when somebody asks for one.
"""

from __future__ import annotations

from importlib import import_module

import click

from legit_worker import control

#: The modules whose commands join the group.
MODULES = ("checks", "dead", "models", "queues", "status", "top")


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        _import_commands()
        return super().list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command; None if there is none of this name."""
        _import_commands()
        return super().get_command(ctx, cmd_name)


@click.group(name="legit", cls=_Lazy, help="Look at legit_worker's workers, and check a machine before one starts.")
def legit() -> None:
    """Group the commands. Celery finds this by the entry point `celery.commands`."""


def _import_commands() -> None:
    for module in MODULES:
        import_module(f"{__name__}.{module}")


# `celery control legit_load` asks this process whether there is such a command.
control.describe()
