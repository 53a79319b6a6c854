"""The `unslothd` commands that a Markdown page shows, run as they stand there."""

import re
import shlex
from collections.abc import Iterator, Mapping

from typer.testing import CliRunner

from support.pages import ROOT, to_run
from support.running_server import RunningServer
from unslothd.cli.app import app


def cli_commands(page: str) -> Iterator[str]:
    """Each `unslothd` command of a page that talks to a server, without its first word and what it is piped into.

    Args:
        page: Path below the repository, e.g. "docs/training.md".
    """
    for block in to_run(ROOT / page, "sh"):
        for line in block.splitlines():
            command = re.match(r"(?:\.venv/bin/)?unslothd ((?!serve)[^|]+)", line)
            if command is not None:
                yield command[1]


def run_command(server: RunningServer, command: str, names: Mapping[str, str]) -> None:
    """Runs a command of a page, which must end well.

    Args:
        server: A server that has what the page speaks of.
        command: Words after `unslothd`.
        names: What the page calls things, and what they are called here.
    """
    real = command
    for name, here in names.items():
        real = real.replace(name, here)
    words = [*shlex.split(real, comments=True), "--target", server.target]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, f"{command}\n{done.output}"
