"""Puts the commands together."""

from typing import Annotated

import typer

from unslothd._version import __version__
from unslothd.cli import (
    artifacts,
    chat,
    datasets,
    generate,
    info,
    models,
    plan,
    receipt,
    server_side,
    tokens,
    top,
    train,
    trainings,
)

_EXIT_CODES = (
    "Exit codes: 0 done; 1 the call or the training failed, or the training was cancelled, or files are not as their "
    "receipt says; 2 wrong usage; 130 detached by Ctrl-C. Every command but serve, doctor and tokens takes --json for "
    "scripts, and --target, --token-file, --ca and --profile for another server: docs/connecting.md."
)

app = typer.Typer(
    name="unslothd",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,  # they may hold tokens
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EXIT_CODES,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"unslothd {__version__}")
        raise typer.Exit


@app.callback()
def unslothd(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Fine-tune language models on a GPU host, and watch every step.

    Start a server with [bold]unslothd serve[/bold], then: [bold]unslothd train --model NAME --dataset rows.jsonl[/bold]
    """


server_side.register(app)
tokens.register(app)
info.register(app)
models.register(app)
train.register(app)
plan.register(app)
trainings.register(app)
top.register(app)
generate.register(app)
chat.register(app)
datasets.register(app)
artifacts.register(app)
receipt.register(app)
