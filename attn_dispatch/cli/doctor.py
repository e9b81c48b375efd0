"""`attn-dispatch doctor`: what this machine is, what is installed, what runs, and what to do about the rest."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from attn_dispatch import dispatch
from attn_dispatch.cli.options import spec_of
from attn_dispatch.cli.probe import Report, ask
from attn_dispatch.errors import AttentionDispatchError

__all__ = ["doctor"]

_SIGNS = {"ok": "[green]runs[/]", "absent": "[yellow]not here[/]", "broken": "[bold red]BROKEN[/]"}
_ANSWERS = {"yes": "[green]yes[/]", "no": "[yellow]no[/]", "?": "[bold red]?[/]"}

# For whoever has a device and nothing installed for it: platform -> what brings a backend.
_ADVICE = {
    "cpu": "pip install attn-dispatch-cpu",
    "cuda": "pip install attn-dispatch-cuda (or attn-dispatch-triton, attn-dispatch-torch)",
    "rocm": "pip install attn-dispatch-rocm (or attn-dispatch-triton, attn-dispatch-torch)",
    "xpu": "pip install attn-dispatch-torch with torch's XPU build",
    "tpu": "pip install attn-dispatch-tpu",
}


def doctor(
    heads: Annotated[int, typer.Option(help="Query heads of the layer to ask about.")] = 32,
    kv_heads: Annotated[int, typer.Option(help="Its key/value heads.")] = 8,
    head_size: Annotated[int, typer.Option(help="Its head size.")] = 128,
    dtype: Annotated[str, typer.Option(help="Its type.")] = "bfloat16",
    block_size: Annotated[int, typer.Option(help="Tokens in a cache block.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show the machine, each backend with what it needs, and who would run a layer."""
    spec = spec_of(heads, kv_heads, head_size, dtype, block_size)
    installed, machine = dispatch.registry(), dispatch.machine()
    with ThreadPoolExecutor(max_workers=4) as pool:
        reports = list(pool.map(ask, installed.names()))
    problem, explanation = "", None
    broken = {report.name for report in reports if report.state == "broken" and "killed by" in report.reason}
    if broken:
        problem = f"{', '.join(sorted(broken))} crashes when it is loaded or used: no backend was asked in this process"
    else:
        try:
            explanation = dispatch.explain(spec)
        except AttentionDispatchError as error:
            problem = str(error)
    if as_json:
        data = {
            "machine": {"name": machine.name, "description": machine.description, "facts": dict(machine.facts)},
            "platforms": {name: installed.ranked(name) for name in _ADVICE},
            "backends": [asdict(report) for report in reports],
            "problems": [*installed.problems, *([problem] if problem else [])],
            "explanation": explanation.as_dict() if explanation else None,
        }
        typer.echo(json.dumps(data, indent=2, default=str))
    else:
        Console(highlight=False).print(_page(reports, problem, explanation))
    if problem or any(report.state == "broken" for report in reports):
        raise typer.Exit(1)


def _page(reports: list[Report], problem: str, explanation: dispatch.Explanation | None) -> Group:
    installed, machine = dispatch.registry(), dispatch.machine()
    parts: list[object] = [f"[bold]Machine[/]  {machine.name}: {escape(machine.description)}"]
    parts += [
        f"  [yellow]![/] {escape(str(note))}" for key in ("problems", "notes") for note in machine.facts.get(key, ())
    ]
    parts += ["\n[bold]Platforms[/]", _platforms(dispatch.platform()), "\n[bold]Backends[/]", _backends(reports)]
    parts += [f"[yellow]![/] {escape(text)}" for text in installed.problems]
    if problem:
        parts.append(f"[bold red]![/] {escape(problem)}")
    if explanation is not None:
        parts.append(f"\n[bold]Who runs[/] {explanation.spec}")
        table = Table(box=None, padding=(0, 2, 0, 0))
        for column in ("backend", "", "why"):
            table.add_column(column, overflow="fold")
        for v in explanation.verdicts:
            chosen = " [bold green]<[/]" if v.backend == explanation.chosen else ""
            table.add_row(f"{v.backend}{chosen}", _ANSWERS[v.answer], "" if str(v) == "yes" else escape(str(v)))
        parts.append(table)
        parts.append(
            f"[bold]{explanation.chosen}[/] would run, by {explanation.source}."
            if explanation.chosen
            else "[bold red]Nothing can run this layer.[/]"
        )
    return Group(*[part if isinstance(part, Table) else str(part) for part in parts])


def _platforms(here: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("platform", "backends, in order of choice", "to have one"):
        table.add_column(column, overflow="fold")
    for name, advice in _ADVICE.items():
        found = dispatch.registry().ranked(name)
        mark = " [bold green]<[/]" if name == here else ""
        table.add_row(f"{name}{mark}", ", ".join(found) or "[dim]none installed[/]", "" if found else advice)
    return table


def _backends(reports: list[Report]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("backend", "state", "version", "found, and what to do"):
        table.add_column(column, overflow="fold")
    for report in reports:
        text = ". ".join(part.rstrip(".") for part in (report.reason, report.remedy) if part)
        if report.state == "broken" and report.details:
            text = f"{text}\n{report.details.splitlines()[-1]}"
        table.add_row(report.name, _SIGNS[report.state], report.version, escape(text))
    return table
