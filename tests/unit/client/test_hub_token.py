"""A Hub token is sent to another host by TLS or not at all."""

import asyncio

import pytest

import unslothd
from support.scripted_server import ScriptedServer
from unslothd import errors
from unslothd.v1 import model_pb2, service_pb2

TOKEN = "hf_PlantedOnAPlainConnection"
READY = model_pb2.Model(model_id="gated-unsloth", state=model_pb2.Model.STATE_READY)


@pytest.fixture
def elsewhere(server: ScriptedServer, say) -> str:
    """Leads to the scripted server, but not by an address that is surely of this host."""
    server.script.on("LoadModel", say.messages(service_pb2.LoadModelResponse(model=READY)))
    return f"0.0.0.0:{server.target.rpartition(':')[2]}"


def refused_by(target: str, kind: str) -> errors.UnslothdError:
    """What load_model of a client without TLS raises."""

    def load() -> None:
        with unslothd.Client(target) as client:
            client.load_model("org/gated", token=TOKEN)

    async def load_async() -> None:
        async with unslothd.AsyncClient(target) as client:
            await client.load_model("org/gated", token=TOKEN)

    with pytest.raises(errors.FailedPrecondition) as caught:
        asyncio.run(load_async()) if kind == "async" else load()
    return caught.value


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_to_another_host_in_plain_text_it_is_not_sent(server, elsewhere, kind):
    error = refused_by(elsewhere, kind)
    assert error.reason == "HUB_TOKEN_IN_PLAIN_TEXT"
    assert "would travel in plain text: use TLS" in error.message
    assert TOKEN not in str(vars(error))
    assert server.script.calls("LoadModel") == []


def test_a_load_without_one_goes_there_all_the_same(server, elsewhere):
    with unslothd.Client(elsewhere) as client:
        assert client.load_model("org/open") == READY


def test_to_this_host_it_is_sent_in_plain_text(server, elsewhere):
    with unslothd.Client(server.target) as client:
        assert client.load_model("org/gated", token=TOKEN) == READY
    assert server.script.calls("LoadModel")[0].token == TOKEN
