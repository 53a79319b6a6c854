"""Fixtures: a scripted server, and the words of its script."""

from collections.abc import Iterator

import pytest

from support.scripted_server import Say, ScriptedServer


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    running = ScriptedServer()
    yield running
    running.stop()


@pytest.fixture
def say() -> type[Say]:
    return Say
