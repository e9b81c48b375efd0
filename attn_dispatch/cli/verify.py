"""`attn-dispatch verify`: the conformance kit on this machine, as the support table with its evidence."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from attn_dispatch import dispatch
from attn_dispatch.conformance import (
    CHECKS,
    FEATURES,
    Check,
    Limits,
    Row,
    as_markdown,
    differences,
    report,
    report_text,
    rows_of,
    vanished,
)

__all__ = ["verify"]

_STYLE = {"yes": "green", "no": "yellow", "FAILED": "bold red", "not run": "dim"}


def verify(
    backend: Annotated[list[str] | None, typer.Option(help="Only this one (repeatable).")] = None,
    feature: Annotated[list[str] | None, typer.Option(help="Only checks of this feature (repeatable).")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Leave longer cases out.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="A report: fail where what ran then does not now, or an entry is another.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    markdown: Annotated[Path | None, typer.Option(help="Also write the table to this Markdown file.")] = None,
) -> None:
    """Run every check of the kit against the installed backends; exit 1 if one that said yes failed."""
    names = backend or [name for name, available in dispatch.backends().items() if available]
    for name in names:
        dispatch.registry().entry(name)
    for wanted in feature or []:
        if wanted not in FEATURES:
            raise typer.BadParameter(f"{wanted!r} is not a feature of the kit. Known: {', '.join(sorted(FEATURES))}")
    checks = [check for check in CHECKS if not feature or check.feature in feature]
    limits = None if max_tokens is None else Limits(tokens=max_tokens)
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    rows = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for name in names:
            task = progress.add_task(name, total=len(checks))
            advance = partial(_advance, progress, task)
            rows.append(report.verify(name, limits=limits, checks=checks, progress=advance))
    if as_json:
        machine = dispatch.machine()
        where = {"name": machine.name, "description": machine.description}
        typer.echo(report_text(rows, where, " ".join(["attn-dispatch", *sys.argv[1:]])))
    else:
        for row in rows:
            Console(highlight=False).print(_page(row))
    if markdown is not None:
        markdown.write_text(as_markdown(rows), encoding="utf-8")
    stale = [] if against is None else _stale(against, rows, complete=not feature and max_tokens is None)
    for line in stale:
        console.print(f"[bold red]{against}:[/] {escape(line)}", soft_wrap=True)
    if stale or any(row.failed for row in rows):
        raise typer.Exit(1)


def _stale(against: Path, rows: list[Row], *, complete: bool) -> list[str]:
    """Return where a committed report is not what ran now."""
    committed = {row.backend: row for row in rows_of(against)}
    lines = [f"it has no row of {row.backend}" for row in rows if row.backend not in committed]
    compare = differences if complete else vanished
    return lines + [line for row in rows if row.backend in committed for line in compare(committed[row.backend], row)]


def _advance(progress: Progress, task: TaskID, _: Check) -> None:
    progress.advance(task)


def _page(row: Row) -> Group:
    """One backend: its features, then every reason once, with the features that it concerns."""
    version = f" {row.version}" if row.version else ""
    head = f"\n[bold]{row.backend}[/]{version}  evidence: {row.evidence}"
    if not row.available:
        return Group(head, f"not run: {escape(row.reason)}")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("feature", "", "checks", "mistakes noticed"):
        table.add_column(column)
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in row.entries:
        style = _STYLE[entry.state.partition(",")[0]]
        table.add_row(entry.feature, f"[{style}]{entry.state}[/]", str(len(entry.cases)), str(entry.mutations))
        if entry.detail:
            reasons.setdefault((entry.state, entry.detail), []).append(entry.feature)
    notes = [
        f"[{_STYLE[state.partition(',')[0]]}]{state}[/] {', '.join(features)}: {escape(text)}"
        for (state, text), features in reasons.items()
    ]
    return Group(head, table, *notes)
