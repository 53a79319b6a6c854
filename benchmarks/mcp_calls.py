"""What the MCP adapter adds: the round trip of a tool call beside that of its RPC, and progress notifications a second.

The adapter is a process of its own, as hosts start it; the SDK's client speaks to it over stdio. The server is real,
its workers are scripted. A training without pauses makes steps faster than they can be told, so that the adapter is
what bounds them; steps are counted, none may be missing.
"""

import argparse
import tempfile
import time
from pathlib import Path

import anyio
from _common import Figures, columns, options_parser, run, say, spread

import unslothd
from support.mcp_agents import Agent, agent, scripted_row
from support.running_server import RunningServer


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = options_parser(__doc__)
    options.add_argument("--calls", type=int, default=300, help="calls of each kind")
    options.add_argument("--steps", type=int, default=3000, help="steps of the training")
    return options


def measure(options: argparse.Namespace) -> Figures:
    """Starts a server and measures."""
    with tempfile.TemporaryDirectory() as folder, RunningServer(Path(folder), fake_workers=True) as server:
        model = server.model_root / "tiny"
        model.mkdir()
        (model / "config.json").write_text("{}")
        return anyio.run(_measure, server.target, options)


async def _measure(target: str, options: argparse.Namespace) -> Figures:
    figures: Figures = {"calls": options.calls, "steps": options.steps}
    async with unslothd.AsyncClient(target) as client:
        model = await client.prepare(await client.load_model("tiny"), logging_steps=1, save_steps=10**6)
        say(f"mcp: {options.calls} calls of each kind")
        figures["rpc_ms"] = spread(await _round_trips(client.list_models, options.calls))
        for mode in ("auto", "legacy"):
            started = time.perf_counter()
            async with agent(target, mode=mode) as host:
                figures[f"start_seconds_{mode}"] = round(time.perf_counter() - started, 2)
                call = host.client.call_tool
                figures[f"tool_ms_{mode}"] = spread(
                    await _round_trips(lambda call=call: call("unsloth_list_models"), options.calls)
                )
                say(f"mcp: {options.steps} steps, {mode}")
                figures[f"steps_{mode}"] = await _steps(host, model.model.model_id, options.steps)
        say(f"mcp: {options.steps} steps, gRPC")
        figures["steps_grpc"] = await _steps_by_grpc(client, model.model.model_id, options.steps)
    return figures


async def _round_trips(call, count: int) -> list[float]:
    """Milliseconds of each call; the first few open connections and are left out."""
    taken = []
    for number in range(count + 10):
        begin = time.perf_counter()
        await call()
        if number >= 10:
            taken.append(1000 * (time.perf_counter() - begin))
    return taken


async def _steps(host: Agent, model_id: str, steps: int) -> Figures:
    host.progress.clear()
    begin = time.perf_counter()
    await host.call("unsloth_train", model_id=model_id, train_dataset=[scripted_row(steps=steps)])
    seconds = time.perf_counter() - begin
    assert [done for done, _, _ in host.progress] == list(range(1, steps + 1))
    return {"seconds": round(seconds, 2), "per_second": round(steps / seconds)}


async def _steps_by_grpc(client: unslothd.AsyncClient, model_id: str, steps: int) -> Figures:
    begin = time.perf_counter()
    count = 0
    async for event in await client.train(model_id, [scripted_row(steps=steps)]):
        count += event.HasField("step")
    seconds = time.perf_counter() - begin
    assert count == steps
    return {"seconds": round(seconds, 2), "per_second": round(steps / seconds)}


def table(figures: Figures) -> str:
    """For people."""
    trips = [
        [name, *(figures[key][part] for part in ("median", "p95", "max"))]
        for name, key in (
            ("RPC ListModels", "rpc_ms"),
            ("tool unsloth_list_models, stateless", "tool_ms_auto"),
            ("tool unsloth_list_models, with handshake", "tool_ms_legacy"),
        )
    ]
    steps = [
        [name, figures[key]["per_second"], figures[key]["seconds"]]
        for name, key in (
            ("gRPC events", "steps_grpc"),
            ("MCP progress, stateless", "steps_auto"),
            ("MCP progress, with handshake", "steps_legacy"),
        )
    ]
    return (
        columns(["", "median ms", "p95", "max"], trips)
        + "\n\n"
        + columns([f"{figures['steps']} steps", "a second", "seconds"], steps)
        + f"\n\nstart of the adapter to the first answer: {figures['start_seconds_auto']} s stateless, "
        f"{figures['start_seconds_legacy']} s with handshake"
    )


if __name__ == "__main__":
    run(measure, table, parser())
