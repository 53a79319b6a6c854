"""Real Unsloth on a tiny random Llama; the libraries are imported once for all tests of this folder."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import engine_runs
from support.engine_runs import Loaded, LoadTiny, Row
from support.plain_transformers import Reader, plain_transformers
from support.tiny_model import build_tiny_llama
from unslothd_server.engine.unsloth_engine import UnslothEngine

# As in a worker, and before torch reads it: without it these tests take minutes more beside anything else that runs.
os.environ.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="1000")


@pytest.fixture(scope="session")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The heavy import, in a folder where Unsloth may write what it likes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("cwd"))
        yield UnslothEngine().import_libraries()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def in_plain_transformers() -> Iterator[Reader]:
    with plain_transformers() as reader:
        yield reader


@pytest.fixture
def load(versions: dict[str, str], tiny: Path, tmp_path: Path) -> LoadTiny:
    """Loads a model; the tiny one unless another source is given."""

    def load_model(source: Path | str | None = None, **options: Any) -> Loaded:
        return engine_runs.load(source or tiny, tmp_path, **options)

    return load_model


@pytest.fixture
def prepared(load: LoadTiny) -> Loaded:
    """The tiny model with an adapter."""
    loaded = load()
    loaded.prepare()
    return loaded


@pytest.fixture
def texts() -> list[Row]:
    """Eight rows of different lengths."""
    return [{"text": "The quick brown fox jumps over the lazy dog. " * (1 + number % 3)} for number in range(8)]
