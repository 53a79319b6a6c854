"""Prints docs/cli.md: every command of `unslothd` with its purpose and an example, from the commands themselves."""

import inspect
import re
from collections.abc import Iterator

import typer
from typer.models import CommandInfo

from unslothd.cli.app import app

_HEAD = """# The command line

Made by `scripts/cli_page.py` from the commands themselves; `unslothd COMMAND --help` has every option. Each command but
`serve`, `doctor` and `tokens` takes `--json`, for one JSON object a line with the names of the contract, and `--target
HOST:PORT`, `--token-file`, `--ca`, `--client-cert`, `--client-key`, `--tls` and `--profile` for another server than
the one on 127.0.0.1:50051: [connecting](connecting.md).

Exit codes: 0 done; 1 the call or the training failed, or the training was cancelled, or files are not as their receipt
says; 2 wrong usage; 130 detached by Ctrl-C.

| Command | What it does | Example |
| --- | --- | --- |
"""


def page() -> str:
    """Returns the page."""
    return _HEAD + "".join(f"{_row(name, command)}\n" for name, command in sorted(_commands(app)))


def _commands(group: typer.Typer, path: str = "") -> Iterator[tuple[str, CommandInfo]]:
    """Yields every command with its whole name."""
    for command in group.registered_commands:
        yield f"{path}{command.name}", command
    for inner in group.registered_groups:
        yield from _commands(inner.typer_instance, f"{path}{inner.name} ")


def _row(name: str, command: CommandInfo) -> str:
    purpose = inspect.getdoc(command.callback).partition("\n\n")[0].replace("\n", " ")
    example = re.search(r"Example: (.*)", command.epilog)[1]
    return " | ".join([f"| `{name}`", _cell(purpose), f"`{_cell(example)}` |"])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
