"""What hosts can read as resources: the server, models, trainings with their event logs and receipts, and datasets."""

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ResourceError, ResourceNotFoundError

import unslothd
from unslothd_mcp import results
from unslothd_mcp.plain import plain
from unslothd_mcp.session import Ctx, Session, session_of
from unslothd_mcp.tools_trainings import event_view

_JSON = "application/json"
_LISTED = 100
_PAGE_EVENTS = 1000
_RECEIPT = "receipt.json"


def register(server: MCPServer[Session], session: Session) -> None:
    """Adds the resources.

    Args:
        server: Gets them.
        session: For those whose address has no parameter: the SDK gives them no context.
    """

    @server.resource("unslothd://server", title="The server", mime_type=_JSON)
    async def server_info() -> str:  # pyright: ignore[reportUnusedFunction]
        """Versions, devices with memory in bytes, and limits."""
        return await _shown(session.client.server_info())

    @server.resource("unslothd://models", title="Loaded models", mime_type=_JSON)
    async def models() -> str:  # pyright: ignore[reportUnusedFunction]
        """The loaded models by model_id."""
        return _json({model.model_id: results.listed(model) for model in await session.client.list_models()})

    @server.resource("unslothd://trainings", title="Trainings", mime_type=_JSON)
    async def trainings() -> str:  # pyright: ignore[reportUnusedFunction]
        """The newest 100 trainings."""
        found = await session.client.list_trainings(limit=_LISTED)
        return _json([results.training_view(each, brief=True) for each in found])

    @server.resource("unslothd://datasets", title="Stored datasets", mime_type=_JSON)
    async def datasets() -> str:  # pyright: ignore[reportUnusedFunction]
        """The newest 100 stored datasets."""
        return _json([plain(each) for each in await session.client.list_datasets(limit=_LISTED)])

    server.resource("unslothd://trainings/{training_id}", title="A training", mime_type=_JSON)(training)
    server.resource(
        "unslothd://trainings/{training_id}/events{?after_sequence}", title="Event log of a training", mime_type=_JSON
    )(training_events)
    server.resource("unslothd://trainings/{training_id}/receipt", title="Receipt of a training", mime_type=_JSON)(
        training_receipt
    )
    server.resource("unslothd://datasets/{dataset_id}", title="A stored dataset", mime_type=_JSON)(stored_dataset)


async def training(ctx: Ctx, training_id: str) -> str:
    """A training as it is now: state, step, checkpoints, metrics or error, config."""
    return _json(results.training_view(await _found(session_of(ctx).client.get_training(training_id))))


async def training_events(ctx: Ctx, training_id: str, after_sequence: int = 0) -> str:
    """Up to 1000 entries of the event log after a sequence number; `more` says whether there are further ones."""
    client = session_of(ctx).client
    last = (await _found(client.get_training(training_id))).last_sequence
    events: list[dict[str, Any]] = []
    if after_sequence < last:
        run = client.watch(training_id, after_sequence=after_sequence)
        try:
            async for event in run:
                events.append(event_view(event))
                if event.sequence >= last or len(events) == _PAGE_EVENTS:
                    break
        finally:
            run.close()
    read_to = events[-1]["sequence"] if events else after_sequence
    return _json({"training_id": training_id, "events": events, "last_sequence": read_to, "more": read_to < last})


async def training_receipt(ctx: Ctx, training_id: str) -> str:
    """What the result of a training was made of: code, data, config, and hashes of its files."""
    client = session_of(ctx).client
    with tempfile.TemporaryDirectory() as folder:
        (file,) = await _found(client.download((training_id, 0), folder, names=[_RECEIPT]))
        return await asyncio.to_thread(Path(file).read_text)


async def stored_dataset(ctx: Ctx, dataset_id: str) -> str:
    """A stored dataset: name, format, rows, bytes, columns."""
    return await _shown(session_of(ctx).client.get_dataset(dataset_id))


async def _shown(call: Any) -> str:
    return _json(plain(await _found(call)))


async def _found(call: Any) -> Any:
    """Awaits a call; its errors keep their text, which the SDK would hide."""
    try:
        return await call
    except unslothd.errors.NotFound as error:
        raise ResourceNotFoundError(error.message) from error
    except unslothd.UnslothdError as error:
        raise ResourceError(f"{error.reason or error.code.name}: {error.message}") from error


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1)
