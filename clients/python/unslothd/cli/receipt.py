"""`unslothd receipt`: what a run says of itself, and whether it is still so."""

import json
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

import unslothd
from unslothd._artifacts import checkpoint
from unslothd._receipt import RECEIPT
from unslothd.cli import options
from unslothd.cli.session import FAILED, Output, Session, session

Source = Annotated[
    str, typer.Argument(metavar="PATH_OR_TRAINING_ID", help="Folder with a receipt.json, that file, or a training.")
]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    receipt = typer.Typer(no_args_is_help=True)
    receipt.command("show", epilog="Example: unslothd receipt show training-20261124-120000-abcdef")(show)
    receipt.command("verify", epilog="Example: unslothd receipt verify my-adapter --data rows.jsonl")(verify)
    app.add_typer(receipt, name="receipt", help="Show a run's receipt and check it against files and data.")


@options.connects
def show(source: Source, as_json: options.Json = False, *, server: options.Server) -> None:
    """Show what went into a run and what came out of it."""
    with session(server, as_json) as opened, _told(opened.out):
        receipt = _read(source, opened)
        if as_json:
            opened.out.json(receipt)
        else:
            opened.out.line(json.dumps(receipt, indent=2, ensure_ascii=False))


@options.connects
def verify(
    source: Source,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Rows that were trained on, to check them too.")
    ] = None,
    as_json: options.Json = False,
    *,
    server: options.Server,
) -> None:
    """Check files, and data with --data, against a receipt. Exits with 1 if anything differs.

    The files of a training are read from the server, and not kept.
    """
    with session(server, as_json) as (client, out), _told(out):
        on_server = _is_training(source)
        findings = client.verify_receipt(source, data=data) if on_server else unslothd.verify_receipt(source, data=data)
        if as_json:
            found = [{"kind": each.kind, "subject": each.subject, "text": each.text} for each in findings]
            out.json({"verified": not findings, "findings": found})
        elif findings:
            for each in findings:
                out.line(each.text, style="red")
        else:
            out.line(f"{source} is as its receipt says" + (f", and so is {data}" if data else ""), style="green")
        if findings:
            raise typer.Exit(FAILED)


def _is_training(source: str) -> bool:
    return not Path(source).exists() and checkpoint(source) is not None


def _read(source: str, opened: Session) -> dict[str, Any]:
    if not _is_training(source):
        return unslothd.read_receipt(source)
    with tempfile.TemporaryDirectory() as folder:
        opened.client.download(source, folder, names=[RECEIPT])
        return unslothd.read_receipt(folder)


@contextmanager
def _told(out: Output) -> Generator[None]:
    """Ends the command with the text of a receipt that cannot be read."""
    try:
        yield
    except unslothd.ReceiptError as error:
        out.note(str(error), style="red")
        raise typer.Exit(FAILED) from error
