"""What each command starts with: a client, a way to print, and one place where errors become text and exit codes."""

import json
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import NamedTuple

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.text import Text

import unslothd
from unslothd._connection import ConnectionOptions
from unslothd.cli import texts
from unslothd.v1.model_pb2 import LoadProgress

FAILED = 1
USAGE = 2
DETACHED = 130


class Output:
    """Prints results to stdout and everything else to stderr.

    Args:
        as_json: One JSON object a line instead of text for people.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
        self.notes = Console(stderr=True, highlight=False, soft_wrap=True)

    @property
    def live(self) -> bool:
        """True when a person is looking: a bar may move."""
        return self.console.is_terminal and not self.as_json

    def json(self, message: Message | dict[str, object]) -> None:
        """Prints one JSON line; scripts see it at once."""
        print(json.dumps(as_dict(message) if isinstance(message, Message) else message), flush=True)  # noqa: T201

    def line(self, text: str, style: str = "") -> None:
        """Prints a result line as it is: nothing in it is markup."""
        self.console.print(Text(text, style=style))

    def note(self, text: str, style: str = "") -> None:
        """Prints a line for people to stderr."""
        self.notes.print(Text(text, style=style))

    @contextmanager
    def waiting(self, text: str) -> Generator[None]:
        """Says on stderr what is waited for; on a terminal it moves, and goes away when that is over.

        With --json it says nothing, so that all there is on stderr is an error to parse.
        """
        if self.notes.is_terminal and not self.as_json:
            with self.notes.status(Text(text)):
                yield
            return
        if not self.as_json:
            self.note(text)
        yield

    def error(self, error: unslothd.UnslothdError) -> None:
        """Prints an error to stderr: its text, or with --json all of it."""
        if self.as_json:
            print(json.dumps({"error": _error_dict(error)}), file=sys.stderr, flush=True)  # noqa: T201
            return
        title = f"{error.code.name} {error.reason}".rstrip()
        if len(error.field_violations) < 2:  # noqa: PLR2004 - more than one is a list
            self.note(f"{title}: {error.message}", style="red")
            return
        what = "rows cannot be used" if error.reason == "DATASET_ROW" else "fields are wrong"
        self.note(f"{title}: {len(error.field_violations)} {what}", style="red")
        for each in error.field_violations:
            self.note(f"  {each.field}: {each.description}", style="red")


def as_dict(message: Message) -> dict[str, object]:
    """Returns a message as protobuf JSON, with the field names of the contract and fields that are zero."""
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def _error_dict(error: unslothd.UnslothdError) -> dict[str, object]:
    return {
        "code": error.code.name,
        "reason": error.reason,
        "message": error.message,
        "metadata": error.metadata,
        "retry_after": error.retry_after,
        "field_violations": [{"field": each.field, "description": each.description} for each in error.field_violations],
    }


class Session(NamedTuple):
    """A connection to the server, and where to print."""

    client: unslothd.Client
    out: Output

    def load_model(self, model_name: str, options: unslothd.LoadOptions) -> unslothd.Model:
        """Loads a model and shows the progress on stderr."""
        if not self.out.notes.is_terminal or self.out.as_json:
            shown: set[int] = set()

            def tell(progress: LoadProgress) -> None:
                if progress.phase not in shown:
                    shown.add(progress.phase)
                    self.out.note(texts.load_progress(model_name, progress))

            return self.client.load_model(model_name, on_progress=tell, **options)
        with self.out.notes.status(Text(f"loading {model_name}")) as status:

            def show(progress: LoadProgress) -> None:
                status.update(Text(texts.load_progress(model_name, progress)))

            return self.client.load_model(model_name, on_progress=show, **options)


@contextmanager
def session(server: ConnectionOptions, as_json: bool) -> Generator[Session]:
    """Opens a session; errors of calls end the command with their text and exit code 1, Ctrl-C with 130.

    Settings that reach no server are wrong usage: 2.
    """
    out = Output(as_json)
    with _client(server, out) as client:
        try:
            yield Session(client, out)
        except unslothd.UnslothdError as error:
            out.error(error)
            raise typer.Exit(FAILED) from error
        except KeyboardInterrupt:
            out.note(
                "Interrupted. What the server has begun goes on; see `unslothd models list`, `unslothd trainings list`."
            )
            raise typer.Exit(DETACHED) from None


def _client(server: ConnectionOptions, out: Output) -> unslothd.Client:
    try:
        return unslothd.Client(**server)
    except ValueError as error:
        out.note(str(error), style="red")
        raise typer.Exit(USAGE) from None
