"""`unslothd datasets`: rows that the server keeps."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Column, Table

import unslothd
from unslothd._upload_sources import FormatName
from unslothd.cli import options, texts
from unslothd.cli.bars import Bars
from unslothd.cli.session import Output, session

DatasetId = Annotated[str, typer.Argument(metavar="DATASET_ID", help="As `unslothd datasets list` shows it.")]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    datasets = typer.Typer(no_args_is_help=True)
    datasets.command("upload", epilog='Example: unslothd datasets upload rows.jsonl --name "support chats"')(upload)
    datasets.command("list", epilog="Example: unslothd datasets list --limit 5")(list_datasets)
    datasets.command("get", epilog="Example: unslothd datasets get sha256:0f3c… --json")(get)
    datasets.command("delete", epilog="Example: unslothd datasets delete sha256:0f3c…")(delete)
    app.add_typer(datasets, name="datasets", help="Upload rows once, to train on them any number of times.")


@options.connects
def upload(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .jsonl, .json, .csv, .parquet or .arrow file.")],
    name: Annotated[str, typer.Option(help="For people; need not be unique. (default the name of the file)")] = "",
    format: Annotated[FormatName | None, typer.Option(help="Of a file whose name does not say it.")] = None,
    as_json: options.Json = False,
    *,
    server: options.Server,
) -> None:
    """Store a file of rows on the server, checked on the way. Rows that the server has already are not sent."""
    with session(server, as_json) as (client, out):
        with Bars(out, DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as bars:
            dataset = client.upload_dataset(
                file,
                name=name or file.name,
                format=format,
                on_progress=lambda progress: bars.show(file.name, progress.done, progress.total),
            )
        _show(dataset, out)
        if not as_json:
            out.note(f"Train on it: unslothd train --model NAME --dataset {dataset.dataset_id}")


@options.connects
def list_datasets(
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    as_json: options.Json = False,
    *,
    server: options.Server,
) -> None:
    """List stored datasets, newest first."""
    with session(server, as_json) as (client, out):
        found = client.list_datasets(limit=limit)
        if as_json:
            for dataset in found:
                out.json(dataset)
        elif found:
            out.console.print(_table(found))
        else:
            out.note("No dataset is stored. Store one: unslothd datasets upload rows.jsonl")


def _table(datasets: list[unslothd.Dataset]) -> Table:
    # An id has 71 characters; folded, each part of it can still be copied.
    table = Table(Column("dataset id", overflow="fold", min_width=37), "name", "rows", "size", "created")
    for dataset in datasets:
        rows, size = texts.number(dataset.num_rows), texts.size(dataset.num_bytes)
        table.add_row(dataset.dataset_id, dataset.name, rows, size, texts.moment(dataset.create_time))
    return table


@options.connects
def get(dataset_id: DatasetId, as_json: options.Json = False, *, server: options.Server) -> None:
    """Show one stored dataset."""
    with session(server, as_json) as (client, out):
        _show(client.get_dataset(dataset_id), out)


def _show(dataset: unslothd.Dataset, out: Output) -> None:
    if out.as_json:
        out.json(dataset)
        return
    lines = {
        "dataset": dataset.dataset_id,
        "name": dataset.name,
        "format": texts.data_format(dataset.format),
        "rows": texts.number(dataset.num_rows),
        "size": texts.size(dataset.num_bytes),
        "columns": ", ".join(dataset.columns),
        "created": texts.moment(dataset.create_time),
    }
    for name, value in lines.items():
        if value:
            out.line(f"{name:12}{value}")


@options.connects
def delete(dataset_id: DatasetId, as_json: options.Json = False, *, server: options.Server) -> None:
    """Remove a stored dataset; refused while a training that is not over reads it."""
    with session(server, as_json) as (client, out):
        client.delete_dataset(dataset_id)
        if not as_json:
            out.note(f"{dataset_id} is gone")
