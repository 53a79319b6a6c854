"""Runs one command of the server's side of `unslothd`, whose client side only hands the arguments over."""

from collections.abc import Callable

import typer


def run_command(command: Callable[..., None], name: str, argv: list[str]) -> int:
    """Runs a typer command with its arguments. Returns the exit code: the command's own, 2 wrong usage, 130 aborted.

    Args:
        command: The command.
        name: As its users write it, for the usage text.
        argv: Its arguments.
    """
    app = typer.Typer(add_completion=False, rich_markup_mode=None)  # a table would cut long flags
    app.command()(command)
    try:
        code = app(args=argv, prog_name=name, standalone_mode=False)
    except typer.Abort:
        return 130
    except Exception as error:
        if not hasattr(error, "show"):
            raise
        error.show()  # type: ignore[attr-defined] - click's usage errors print themselves
        return 2
    return code or 0
