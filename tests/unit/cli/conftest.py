"""Fixtures: a scripted server, the words of its script, and the command line that talks to it."""

from collections.abc import Callable, Iterator

import pytest
from typer.testing import CliRunner, Result

from support.scripted_server import Say, ScriptedServer
from unslothd.cli.app import app


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    running = ScriptedServer()
    yield running
    running.stop()


@pytest.fixture
def say() -> type[Say]:
    return Say


@pytest.fixture
def cli(server: ScriptedServer) -> Callable[..., Result]:
    def run(*arguments: str, **more: object) -> Result:
        return CliRunner().invoke(app, [*arguments, "--target", server.target], catch_exceptions=False, **more)

    return run
