"""`unslothd export` and `download`: a model in another form, and its files here."""

import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import DownloadColumn, MofNCompleteColumn, TimeRemainingColumn, TransferSpeedColumn

import unslothd
from unslothd._artifacts import ExportFormatName
from unslothd.cli import options, texts
from unslothd.cli.bars import Bars
from unslothd.cli.session import DETACHED, FAILED, Output, session

Step = Annotated[int | None, typer.Option(min=1, help="Checkpoint of a training, in place of its result.")]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command(
        "export", epilog="Example: unslothd export training-20261124-120000-abcdef --format merged_16bit --step 40"
    )(export)
    app.command("download", epilog="Example: unslothd download training-20261124-120000-abcdef --to my-adapter")(
        download
    )


@options.connects
def export(
    source: Annotated[str, typer.Argument(metavar="MODEL_OR_TRAINING", help="Id of a loaded model or of a training.")],
    format: Annotated[ExportFormatName, typer.Option(help="Form to write; `unslothd info` shows the possible ones.")],
    step: Step = None,
    output_dir: Annotated[
        str, typer.Option(metavar="DIR", help="Folder below the server's output root. (default a free name)")
    ] = "",
    gguf_quantization: Annotated[
        str, typer.Option(metavar="NAME", help="With gguf: q4_k_m, q8_0, f16 and so on. (default q8_0)")
    ] = "",
    as_json: options.Json = False,
    *,
    server: options.Server,
) -> None:
    """Write a model, a training's result or a checkpoint in another form, on the server."""
    with session(server, as_json) as (client, out):
        with _interrupted(out, "The export goes on on the server"), Bars(out, MofNCompleteColumn()) as bars:
            artifact = client.export(
                source if step is None else (source, step),
                format,
                gguf_quantization=gguf_quantization,
                output_dir=output_dir,
                on_progress=lambda progress: bars.show(progress.phase, progress.done, progress.total),
            )
        if as_json:
            out.json(artifact)
        else:
            _show(artifact, out)


def _show(artifact: unslothd.Artifact, out: Output) -> None:
    out.line(f"{artifact.artifact_id}: {texts.export_format(artifact.format)}, on the server in {artifact.path}")
    for file in artifact.files:
        out.line(f"  {texts.size(file.num_bytes):>10}  {file.name}")
    out.note(f"Fetch it: unslothd download {artifact.artifact_id}")


@options.connects
def download(
    source: Annotated[
        str, typer.Argument(metavar="ARTIFACT_OR_TRAINING", help="Id that export printed, or of a training.")
    ],
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Only these files.")] = None,
    step: Step = None,
    to: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder here. (default one named by the id)")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of other content.")] = False,
    as_json: options.Json = False,
    *,
    server: options.Server,
) -> None:
    """Fetch files, checked by their hashes. Run it again after a break: it goes on where it stopped."""
    folder = to if to is not None else Path(_folder_name(source, step))
    with session(server, as_json) as (client, out):
        try:
            columns = DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
            with _interrupted(out, f"What has come is kept in {folder}"), Bars(out, *columns) as bars:
                paths = client.download(
                    source if step is None else (source, step),
                    folder,
                    names=names or [],
                    overwrite=overwrite,
                    on_progress=lambda progress: bars.show(progress.name, progress.done, progress.num_bytes),
                )
        except OSError as error:
            out.note(f"{error.filename or folder}: {error.strerror or error}", style="red")
            raise typer.Exit(FAILED) from error
        for path in paths:
            if as_json:
                out.json({"path": str(path), "num_bytes": path.stat().st_size})
            else:
                out.line(str(path))


def _folder_name(source: str, step: int | None) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", source).lstrip(".") or "download"
    return name if step is None else f"{name}-checkpoint-{step}"


@contextmanager
def _interrupted(out: Output, what_is_left: str) -> Generator[None]:
    """Says at Ctrl-C that the same command goes on from there."""
    try:
        yield
    except KeyboardInterrupt:
        out.note(f"Interrupted. {what_is_left}; the same command again goes on with it.")
        raise typer.Exit(DETACHED) from None
