"""`unslothd generate`: text from a loaded model."""

import sys
from typing import Annotated

import typer

import unslothd
from unslothd._requests import Prompt
from unslothd.cli import options, texts
from unslothd.cli.session import as_dict, session


class GenerationOptions:
    """An option for every field of GenerateRequest that says how to generate."""

    max_new_tokens: Annotated[int | None, typer.Option(help="Most tokens to generate. (default 256)")]
    temperature: Annotated[float | None, typer.Option(help="0 = always the likeliest token. (default 0)")]
    top_p: Annotated[float | None, typer.Option(help="Sample from the likeliest tokens together. (default 1)")]
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling. (default another one each time)")]
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the generation; repeatable.")]
    without_adapter: Annotated[bool | None, typer.Option("--without-adapter", help="Ask the base model, to compare.")]


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("generate", epilog='Example: unslothd generate llama-3.2-1b-instruct-unsloth "What is a GPU?" --chat')(
        generate
    )


@options.takes("how", GenerationOptions)
@options.connects
def generate(
    model_id: Annotated[str, typer.Argument(metavar="MODEL_ID", help="As `unslothd models list` shows it.")],
    prompt: Annotated[str, typer.Argument(help='Text to go on with; "-" reads it from stdin.')],
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's turn: use the chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="System turn before it; implies --chat.")] = None,
    as_json: options.Json = False,
    *,
    how: unslothd.GenerationOptions,
    server: options.Server,
) -> None:
    """Generate text, shown as it is made."""
    text = sys.stdin.read() if prompt == "-" else prompt
    with session(server, as_json) as (client, out):
        stream = client.generate(model_id, _prompt(text, chat, system), **how)
        if as_json:
            answer = stream.text()
            out.json({"text": answer, "summary": as_dict(stream.summary) if stream.summary else None})
            return
        for piece in stream:
            typer.echo(piece, nl=False)
        typer.echo()
        if stream.summary is not None and out.live:
            speed = texts.number(stream.summary.tokens_per_second)
            out.note(f"{stream.summary.completion_tokens} tokens, {speed} tok/s", style="dim")


def _prompt(text: str, chat: bool, system: str | None) -> Prompt:
    if not chat and system is None:
        return text
    turns = [{"role": "system", "content": system}] if system is not None else []
    return [*turns, {"role": "user", "content": text}]
