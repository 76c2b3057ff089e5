"""`celery legit models`: what is in each worker's memory, and `load`, `unload`, `pin`, `unpin`.

In: an alias. Out: a table, or one sentence for each worker that has the model, once the change is made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from time import monotonic, sleep
from typing import Any

import click
from celery import Celery
from celery.bin.base import COMMA_SEPARATED_LIST, handle_preload_options
from rich.console import Console
from rich.table import Column

from legit_worker.cli import legit
from legit_worker.cli.base import (
    SECONDS,
    Command,
    Group,
    as_json_option,
    busy,
    mib,
    new_table,
    reach,
    safe,
    timeout_option,
)

#: Seconds between two questions whether the change is made.
LOOK = 0.2

#: What Celery answers for a worker that does not have the command.
UNKNOWN_COMMAND = "KeyError('legit_"

#: By action: whether a model's state says that it is done.
IS_DONE: dict[str, Callable[[dict[str, Any]], bool]] = {
    "load": lambda model: model["state"] == "resident",
    "unload": lambda model: not model["is_leaving"],
    "pin": lambda model: model["state"] == "resident" and model["pinned"],
    "unpin": lambda model: not model["pinned"],
}

Replies = dict[str, dict[str, Any]]

_destination = click.option(
    "--destination", type=COMMA_SEPARATED_LIST, help="The names of the workers to ask, with commas; by default all."
)


@legit.group(cls=Group, invoke_without_command=True)
@timeout_option
@_destination
@as_json_option
@click.pass_context
@handle_preload_options
def models(ctx: click.Context, timeout: float, destination: list[str] | None, as_json: bool) -> None:
    """Show each worker's models, or change what is in memory. Exit code 1 if no worker answers."""
    if ctx.invoked_subcommand is not None:
        return
    reach(ctx.obj.app)
    replies = ask(ctx.obj.app, "legit_models", destination, timeout)
    told = {name: reply for name, reply in replies.items() if "models" in reply}
    if as_json:
        click.echo(json.dumps(told))
    else:
        for name, reply in told.items():
            _print(name, reply["models"])
    _tell_errors(replies)
    if not told:
        _end(ctx, f"no worker told of its models within {timeout} s")


def ask(app: Celery, command: str, destination: Iterable[str] | None, timeout: float, **arguments: Any) -> Replies:
    """Return each worker's reply to a remote control command. Some workers may not answer in time."""
    found = app.control.broadcast(
        command,
        arguments=arguments,
        destination=None if destination is None else list(destination),
        reply=True,
        timeout=timeout,
        # Otherwise Celery waits for the whole time, though all have answered.
        limit=None if destination is None else len(list(destination)),
    )
    replies = {name: reply for one in found or () for name, reply in one.items()}
    return {name: _in_words(reply) for name, reply in sorted(replies.items())}


def _in_words(reply: dict[str, Any]) -> dict[str, Any]:
    if UNKNOWN_COMMAND in str(reply.get("error")):
        return {"error": "legit_worker is not enabled in this worker, or older than this command"}
    return reply


def _tell_errors(replies: Replies) -> None:
    for name, reply in replies.items():
        if "error" in reply:
            click.echo(safe(f"{name}: {reply['error']}"), err=True)


def _end(ctx: click.Context, sentence: str) -> None:
    click.echo(sentence, err=True)
    ctx.exit(1)


def _print(name: str, found: dict[str, Any]) -> None:
    numbers = (Column(heading, justify="right") for heading in ("MiB", "users", "waiting", "last used", "loads"))
    table = new_table("model", "state", *numbers, title=safe(name), title_justify="left")
    for alias, model in found.items():
        table.add_row(
            safe(", ".join(model["aliases"] or [alias])),
            f"{model['state']}{', pinned' if model['pinned'] else ''}{', leaves' if model['is_leaving'] else ''}",
            mib(model["weights"]).removesuffix(" MiB"),
            *(str(model[key]) for key in ("users", "waiting")),
            ago(model["unused_seconds"]),
            str(model["loads"]),
        )
    Console().print(table)


def ago(seconds: float | None) -> str:
    """Write how long ago something was."""
    if seconds is None:
        return "never"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _action(name: str, help_line: str) -> None:
    """Make one of the commands that change something."""

    @models.command(name, cls=Command, help=help_line)
    @click.argument("alias")
    @click.option("--wait", type=SECONDS, default=60.0, show_default=True, help="Seconds to wait until it is done.")
    @timeout_option
    @_destination
    @as_json_option
    @click.pass_context
    @handle_preload_options
    def change(ctx: click.Context, alias: str, **options: Any) -> None:
        _change(ctx, name, alias, **options)


_action("load", "Load a model before a task asks for it. Exit code 1 if a worker could not.")
_action("unload", "Take a model out of memory once the calls that use it are done. A later call loads it again.")
_action("pin", "Load a model, and keep it in memory until it is unpinned or the worker ends.")
_action("unpin", "Let a pinned model leave memory again.")


def _change(
    ctx: click.Context, name: str, alias: str, wait: float, timeout: float, destination: list[str] | None, as_json: bool
) -> None:
    app = ctx.obj.app
    reach(app)
    replies = ask(app, f"legit_{name}", destination, timeout, alias=alias)
    begun = {worker for worker, reply in replies.items() if "ok" in reply}
    if begun:  # others may have other models
        replies = {worker: reply for worker, reply in replies.items() if not reply.get("is_unknown")}
    if not as_json:
        for worker in sorted(begun):
            click.echo(safe(f"{worker}: {replies[worker]['ok']}"))
    with busy(f"{name} {alias} …", quiet=as_json):
        replies |= _finish(app, name, alias, begun, wait, timeout)
    if as_json:
        click.echo(json.dumps(replies))
    _tell_errors(replies)
    if not begun or any("error" in reply for reply in replies.values()):
        _end(ctx, "" if replies else f"no worker answered within {timeout} s")


def _finish(app: Celery, name: str, alias: str, begun: set[str], wait: float, timeout: float) -> Replies:
    """Wait until the change is made. Returns the replies of the workers that did not make it, or were not done."""
    until, left, outcome = monotonic() + wait, set(begun), dict[str, dict[str, Any]]()
    while left:
        found = ask(app, "legit_models", left, timeout)
        for worker, reply in found.items():
            model = _named(alias, reply.get("models", {}))
            if model is None or IS_DONE[name](model):
                left.discard(worker)
            elif model["error"] and model["state"] == "failed":
                outcome[worker] = {"error": model["error"]}
                left.discard(worker)
        if left and monotonic() > until:
            return outcome | {worker: {"error": f"not done after {wait:g} s; it goes on"} for worker in left}
        sleep(LOOK if left else 0)
    return outcome


def _named(alias: str, found: dict[str, Any]) -> dict[str, Any] | None:
    from legit_worker.settings import fold

    model: dict[str, Any] | None
    for key, model in found.items():
        if fold(alias) in map(fold, (key, *model["aliases"])):
            return model
    return None
