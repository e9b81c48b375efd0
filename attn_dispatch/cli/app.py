"""The commands, and what their exit status means: 0 well, 1 a check failed, 2 the request was wrong."""

from __future__ import annotations

import sys
import warnings
from importlib.metadata import EntryPoint

import typer
from rich.console import Console
from rich.markup import escape

from attn_dispatch.cli import doctor, verify
from attn_dispatch.dispatch import registry
from attn_dispatch.errors import AttentionDispatchError

__all__ = ["app", "run"]

app = typer.Typer(
    name="attn-dispatch",
    help="One paged-attention contract over every vendor runtime.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command(
    "doctor", context_settings={"ignore_unknown_options": True, "allow_extra_args": True}, add_help_option=False
)
def _doctor(context: typer.Context) -> None:
    """Show the machine, each backend with what it needs, and who would run a layer."""
    raise typer.Exit(doctor.main(context.args))


app.command("verify")(verify.verify)


def _add(command: EntryPoint) -> None:
    """Add a plug-in's command; one that cannot be loaded says so when it is asked for, and not before."""
    try:
        app.command(command.name)(command.load())
    except Exception as error:
        reason = f"{command.name} cannot be loaded ({command.value}): {type(error).__name__}: {error}"

        @app.command(command.name, help=reason)
        def _broken() -> None:
            typer.echo(f"error: {reason}", err=True)
            raise typer.Exit(2)


for _command in registry().commands:
    _add(_command)


def run() -> None:
    """Run a command; an error of the library is told in one paragraph, without a traceback."""
    warnings.showwarning = _show_warning
    try:
        app()
    except AttentionDispatchError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(2)


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    Console(stderr=True, soft_wrap=True).print(f"[yellow]{category.__name__}:[/] {escape(str(message))}")
