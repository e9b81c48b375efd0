"""The commands, and what their exit status means: 0 well, 1 a check failed, 2 the request was wrong."""

from __future__ import annotations

import sys
import warnings
from importlib.metadata import entry_points

import typer
from rich.console import Console
from rich.markup import escape

from attn_dispatch.cli import doctor, verify
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
for _command in entry_points(group="attn_dispatch.commands"):
    app.command(_command.name)(_command.load())


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
