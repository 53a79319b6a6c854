"""A worker is told the caller's Hub token, or the operator's where the caller has none; neither is kept on disk."""

import asyncio
from pathlib import Path

from support.app_in_memory import AppInMemory, until, write_model
from unslothd.v1.service_pb2 import LoadModelRequest

OPERATORS, CALLERS = "hf_PlantedByTheOperator", "hf_PlantedByTheCaller"


def app_with_model(folder: Path) -> AppInMemory:
    write_model(folder / "roots" / "m")
    return AppInMemory(folder, hub_token=OPERATORS)


async def load(app: AppInMemory, **fields: str) -> str:
    *_, last = [each async for each in app.lifecycle.load(LoadModelRequest(model_name="m", dtype="bfloat16", **fields))]
    return last.model.model_id


def test_a_callers_token_counts_before_the_operators(tmp_path: Path):
    async def scenario() -> None:
        app = app_with_model(tmp_path)
        await app.start()
        await load(app, token=CALLERS)
        assert app.worker.hub_token == CALLERS

    asyncio.run(scenario())


def test_a_load_without_a_token_gets_the_operators_and_so_does_a_model_that_is_brought_back(tmp_path: Path):
    async def scenario() -> None:
        app = app_with_model(tmp_path)
        await app.start()
        await load(app)
        assert app.worker.hub_token == OPERATORS
        await app.kill_and_start(workers=True)
        await until(lambda: bool(app.host.living) and app.worker.model is not None)
        assert app.worker.hub_token == OPERATORS

    asyncio.run(scenario())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not any(OPERATORS.encode() in path.read_bytes() for path in files)
