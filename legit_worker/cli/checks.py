"""`celery legit doctor` and `celery legit validate`: is this machine ready, and are the vectors right?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from celery.bin.base import handle_preload_options
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from legit_worker.cli import legit
from legit_worker.cli.base import COSINE, DIFFERENCE, SECONDS, Command, as_json_option

#: How `doctor` marks a finding: a character and its colour.
MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "failure": ("✗", "red")}


@legit.command(cls=Command)
@click.option("--model", "alias", required=True, help="The alias of a model of a built-in kind.")
@click.option("--against", type=click.Path(path_type=Path), help="Compare a worker's answers with those in this file.")
@click.option("--make-reference", "target", type=click.Path(path_type=Path), help="Write that file, without a worker.")
@click.option("--texts", type=click.Path(path_type=Path), help="Texts for --make-reference, one a line; by default 82.")
@click.option("--min-cosine", type=COSINE, help="The least cosine that agrees; by default by the model's type.")
@click.option("--max-difference", type=DIFFERENCE, help="The most that a number or a length may differ; likewise.")
@click.option("--timeout", type=SECONDS, default=120.0, show_default=True, help="Seconds to wait for the next answer.")
@as_json_option
@click.pass_context
@handle_preload_options
def validate(ctx: click.Context, **options: Any) -> None:
    """Compare a worker's answers, by every result format, with what sentence-transformers computes.

    Starts a private worker on a private queue. Exit code 1 if answers differ, 2 if they can't be compared.
    """
    from legit_worker.validation.command import main

    ctx.exit(main(ctx.obj.app, str(ctx.find_root().params["app"] or ctx.obj.app.main), **options))


@legit.command(cls=Command)
@as_json_option
@click.pass_context
@handle_preload_options
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Look at settings, versions, broker, models, GPUs, the prep role and batches, and say what to do.

    Exit code 1 if a check fails.
    """
    from legit_worker.doctor.checks import examine

    found = []
    for step in examine(ctx.obj.app):
        if isinstance(step, str):
            if not as_json:
                click.echo(step)
            continue
        found.append(step)
        if not as_json:
            mark, colour = MARKS[step.level]
            lines = Table.grid(Column(width=3), Column(overflow="fold"), padding=(0, 1, 0, 0))
            lines.add_row(Text(f"  {mark}", style=colour), Text(step.seen))
            if step.fix:
                lines.add_row("", Text(f"→ {step.fix}"))
            Console(highlight=False).print(lines)
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in found]))
    ctx.exit(int(any(finding.level == "failure" for finding in found)))
