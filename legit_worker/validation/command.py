"""`celery legit validate`, as its user sees it.

In: the options. Out: a table and the wrong rows, or JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from celery import Celery
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from legit_worker import golden, settings
from legit_worker.errors import SettingsError
from legit_worker.settings import ModelSettings
from legit_worker.validation import reference
from legit_worker.validation.comparison import Comparison, Finding, Tolerance
from legit_worker.validation.reference import Reference, ValidationError
from legit_worker.validation.run import Outcome, validate

#: The most wrong rows that are listed for each path. JSON has them all.
MAX_LISTED = 20

#: The most characters of a text that a row shows.
SHOWN = 48


def main(
    app: Celery,
    project: str,
    *,
    alias: str,
    against: Path | None,
    target: Path | None,
    texts: Path | None,
    min_cosine: float,
    max_difference: float,
    timeout: float,
    as_json: bool,
) -> int:
    """Run the command. Returns the exit code: 0 if all agree or a file was made, 1 for a difference, 2 for an error."""
    if (against is None) == (target is None) or (texts and not target):
        raise click.UsageError("give either --against FILE, or --make-reference FILE, which --texts FILE belongs to")
    try:
        alias, model = configured(alias)
        if target:
            make_reference(model, target, texts)
            return 0
        assert against
        tolerance = Tolerance(min_cosine=min_cosine, max_difference=max_difference)
        return 0 if compare_with(app, project, alias, model, against, tolerance, timeout, as_json=as_json) else 1
    except ValidationError as error:
        click.echo(f"Error: {error}", err=True)
        return 2


def configured(name: str) -> tuple[str, ModelSettings]:
    """Return the alias and settings of the model of kind embed that this name means. Raises `ValidationError`."""
    try:
        models = settings.load(enabled_by_default=True).models
    except SettingsError as error:
        raise ValidationError(str(error)) from None
    alias = next((alias for alias in models if settings.fold(alias) == settings.fold(name)), None)
    if alias is None:
        known = ", ".join(sorted(models)) or "none"
        raise ValidationError(f"no model is called {name!r}; configured: {known}. Set {settings.path_variable(name)}")
    if models[alias].kind != "embed":
        raise ValidationError(
            f"model {alias!r} is of kind {models[alias].kind!r}, and only kind 'embed' can be compared"
        )
    precision = models[alias].precision
    if precision in ("int8", "uint8"):
        raise ValidationError(
            f"model {alias!r} has PRECISION={precision}, whose scale is taken from the vectors of one task, and texts "
            "are compared one by one: compare an alias of the same model without PRECISION"
        )
    return alias, models[alias]


def make_reference(model: ModelSettings, path: Path, texts: Path | None) -> None:
    """Write a reference file."""
    chosen = reference.read_texts(texts) if texts else golden.texts()
    with _progress() as progress:
        rows = progress.track(reference.make(chosen, model), total=len(chosen), description="vectors by the library")
        reference.write(path, rows, model)
    click.echo(f"{path}: {len(chosen)} texts and their vectors by SentenceTransformer.encode, one by one, on the CPU")


def compare_with(
    app: Celery,
    project: str,
    alias: str,
    model: ModelSettings,
    path: Path,
    tolerance: Tolerance,
    patience: float,
    *,
    as_json: bool,
) -> bool:
    """Compare, and print how well the vectors agree. Returns whether all agree."""
    known = reference.read(path)
    notes = reference.differences(known, model)
    with _progress(quiet=as_json) as progress:
        bar = progress.add_task("answers of a worker, which loads the model first", total=None)

        def tell(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        outcome = validate(app, project, alias, known, tolerance, patience, tell)
    if as_json:
        click.echo(json.dumps(_as_json(alias, known, tolerance, notes, outcome)))
    else:
        _print(alias, known, tolerance, notes, outcome)
    return outcome.agrees


def _progress(*, quiet: bool = False) -> Progress:
    """Return a bar that is shown on a terminal, and is gone at its end. Elsewhere nothing is shown."""
    console = Console()
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)


def _as_json(alias: str, known: Reference, tolerance: Tolerance, notes: list[str], outcome: Outcome) -> dict[str, Any]:
    paths = {path: asdict(comparison) for path, comparison in outcome.comparisons.items()}
    for figures in paths.values():
        for finding in figures["findings"]:
            finding["text"] = _start(known.texts[finding["row"] - 1])
    return {
        "model": alias,
        "agrees": outcome.agrees,
        "tolerance": asdict(tolerance),
        "notes": notes,
        "skipped": outcome.skipped,
        "batches": outcome.batches,
        "items": outcome.items,
        "backend": outcome.backend,
        "paths": paths,
    }


def _print(alias: str, known: Reference, tolerance: Tolerance, notes: list[str], outcome: Outcome) -> None:
    console = Console(soft_wrap=True, highlight=False)
    console.print(_table(alias, known, outcome))
    for note in notes:
        console.print(f"note: {escape(note)}")
    for path, reason in outcome.skipped.items():
        console.print(f"{path}: skipped, {reason}")
    for path, comparison in outcome.comparisons.items():
        for line in _listed(path, comparison, known):
            console.print(escape(line))
    console.print(_verdict(tolerance, outcome))


def _table(alias: str, known: Reference, outcome: Outcome) -> Table:
    title = f"{alias}: {len(known.texts)} texts by {len(outcome.comparisons)} paths"
    if outcome.batches:
        title += f", {outcome.items} items in {outcome.batches} batches by {outcome.backend}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading in ("path", "rows", "worst cosine", "mean cosine", "most off", "length off", "order", "wrong"):
        table.add_column(heading, justify="left" if heading == "path" else "right")
    for path, comparison in outcome.comparisons.items():
        table.add_row(path, *_cells(comparison))
    return table


def _cells(comparison: Comparison) -> Iterator[str]:
    yield f"{comparison.compared} of {comparison.rows}"
    for cosine in (comparison.worst_cosine, comparison.mean_cosine):
        yield "" if cosine is None else f"{cosine:.6f}"
    for difference in (comparison.max_difference, comparison.max_norm_difference):
        yield "" if difference is None else f"{difference:.1e}"
    yield "right" if comparison.in_order else "wrong"
    yield str(len(comparison.findings))


def _listed(path: str, comparison: Comparison, known: Reference) -> Iterator[str]:
    for finding in comparison.findings[:MAX_LISTED]:
        yield f"{path}, row {finding.row}, {_start(known.texts[finding.row - 1])!r}: {_described(finding)}"
    if len(comparison.findings) > MAX_LISTED:
        yield f"{path}: and {len(comparison.findings) - MAX_LISTED} more, which --json shows"


def _described(finding: Finding) -> str:
    if finding.cosine is None:
        return finding.problem
    return f"{finding.problem} (cosine {finding.cosine:.6f}, largest difference {finding.difference:.2e})"


def _start(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


def _verdict(tolerance: Tolerance, outcome: Outcome) -> str:
    within = f"cosine at least {tolerance.min_cosine:g}, differences at most {tolerance.max_difference:g}"
    if outcome.agrees:
        return f"All agree with the reference: {within}."
    wrong = sum(len(comparison.findings) for comparison in outcome.comparisons.values())
    return f"{wrong} rows differ from the reference, or are missing: {within}."
