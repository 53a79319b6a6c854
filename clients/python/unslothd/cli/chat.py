"""`unslothd chat`: a conversation with a loaded model on the terminal."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

import unslothd
from unslothd.cli import options
from unslothd.cli.generate import GenerationOptions
from unslothd.cli.session import Output, as_dict, session

_HELP = "/reset forgets the conversation, /quit or Ctrl-D ends, Ctrl-C stops an answer"
_Turn = dict[str, str]


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("chat", epilog="Example: unslothd chat llama-3.2-1b-instruct-unsloth --compare --temperature 0.7")(chat)


@options.takes("how", GenerationOptions)
@options.connects
def chat(
    model_id: Annotated[str, typer.Argument(metavar="MODEL_ID", help="As `unslothd models list` shows it.")],
    system: Annotated[str | None, typer.Option(help="System turn before the conversation.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Answer without and with the adapter; the second is gone on with.")
    ] = False,
    as_json: options.Json = False,
    *,
    how: unslothd.GenerationOptions,
    server: options.Server,
) -> None:
    """Talk to a loaded model. Commands: /reset, /quit. Ctrl-C stops an answer, not the program."""
    with session(server, as_json) as (client, out):
        client.get_model(model_id)  # a wrong id is said before anything is typed
        conversation = _Conversation(client, out, model_id, system, how)
        if sys.stdin.isatty():
            _with_line_editing()
            out.note(_HELP, style="dim")
        for text in _lines(out):
            if text == "/reset":
                conversation.reset()
            elif text.startswith("/"):
                out.note(f"{text.split()[0]} is no command: {_HELP}")
            elif text:
                conversation.ask(text, compare=compare)


class _Conversation:
    """The turns so far, and how the next ones are asked for."""

    def __init__(
        self,
        client: unslothd.Client,
        out: Output,
        model_id: str,
        system: str | None,
        how: unslothd.GenerationOptions,
    ) -> None:
        self._client = client
        self._out = out
        self._model_id = model_id
        self._first = [{"role": "system", "content": system}] if system is not None else []
        self._how = how
        self.reset()

    def reset(self) -> None:
        """Forgets all turns but the system turn."""
        self._turns: list[_Turn] = list(self._first)

    def ask(self, text: str, *, compare: bool) -> None:
        """Shows the answer to a turn and keeps both; an error or an answer that was stopped at once keeps neither."""
        turns = [*self._turns, {"role": "user", "content": text}]
        answer = ""
        try:
            if compare:
                self._answer(turns, {**self._how, "without_adapter": True}, "base")
            answer = self._answer(turns, self._how, "adapter" if compare else "")
        except unslothd.UnslothdError as error:
            self._out.error(error)
        if answer:
            self._turns = [*turns, {"role": "assistant", "content": answer}]

    def _answer(self, turns: list[_Turn], how: unslothd.GenerationOptions, label: str) -> str:
        """Shows an answer as it is made and returns what there is of it at the end or at Ctrl-C."""
        stream = self._client.generate(self._model_id, turns, **how)
        if label and not self._out.as_json:
            self._out.line(f"{label}:", style="dim")
        pieces: list[str] = []
        try:
            for piece in stream:
                pieces.append(piece)
                if not self._out.as_json:
                    typer.echo(piece, nl=False)
        except KeyboardInterrupt:
            stream.close()
            self._out.note(" (stopped)", style="dim")
        if self._out.as_json:
            summary = as_dict(stream.summary) if stream.summary else None
            without = how.get("without_adapter", False)
            self._out.json({"text": "".join(pieces), "without_adapter": without, "summary": summary})
        else:
            typer.echo()
        return "".join(pieces)


def _lines(out: Output) -> Iterator[str]:
    """Yields what is typed, or the lines of stdin, up to /quit or the end."""
    prompt = "> " if sys.stdin.isatty() and not out.as_json else ""
    while True:
        try:
            text = input(prompt).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            out.note(f"\n{_HELP}", style="dim")
            continue
        if text == "/quit":
            return
        yield text


def _with_line_editing() -> None:
    """Gives input() arrow keys and a history where Python has them."""
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module("readline")
