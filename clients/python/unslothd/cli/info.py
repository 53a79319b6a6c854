"""`unslothd info`: what the server is and can do."""

import typer
from rich.table import Table

from unslothd.cli import options, texts
from unslothd.cli.session import Output, session
from unslothd.v1.service_pb2 import GetServerInfoResponse


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("info", epilog="Example: unslothd info --target gpu-host:50051")(info)


@options.connects
def info(as_json: options.Json = False, *, server: options.Server) -> None:
    """Show versions, devices and limits of the server, and whom it takes you for."""
    with session(server, as_json) as (client, out):
        answer = client.server_info()
        if as_json:
            out.json(answer)
        else:
            _show(answer, client.target, out)


def _show(answer: GetServerInfoResponse, target: str, out: Output) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(answer.engine_versions.items()))
    out.line(f"unslothd {answer.server_version} at {target}" + (f" with {versions}" if versions else ""))
    if answer.HasField("caller"):
        out.line(texts.caller(answer.caller))
    table = Table("device", "name", "free", "total", "models")
    for device in answer.devices:
        free, total = texts.size(device.free_memory_bytes), texts.size(device.total_memory_bytes)
        table.add_row(device.device, device.name, free, total, ", ".join(device.model_ids))
    out.console.print(table)
    if answer.warm_workers:
        plural = "s" if answer.warm_workers > 1 else ""
        out.line(f"{answer.warm_workers} warm worker{plural}: so many loads wait for no import")
    limits = answer.limits
    out.line(
        f"limits: {limits.max_loaded_models} models, {limits.max_queued_trainings} queued trainings a model, "
        f"{texts.size(limits.max_inline_bytes)} of inline rows, {texts.size(limits.max_message_bytes)} a message"
        + (f", {texts.size(limits.max_dataset_bytes)} an uploaded dataset" if limits.max_dataset_bytes else "")
    )
    if limits.export_formats:
        out.line(f"exports: {', '.join(texts.export_format(each) for each in limits.export_formats)}")
