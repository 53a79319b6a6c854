"""`unslothd train`: load, prepare and train in one command, watched live."""

import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

import unslothd
from unslothd._requests import DisconnectPolicyName
from unslothd.cli import models, options
from unslothd.cli.follow import follow
from unslothd.cli.session import Output, Session, session

_EXAMPLES = (
    "Example: unslothd train --model unsloth/Llama-3.2-1B-Instruct --dataset rows.jsonl --max-steps 60 --lora-r 8\n\n"
    "Example: unslothd train --model-id llama-3.2-1b-instruct-unsloth --dataset hub:yahma/alpaca-cleaned --json"
)


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("train", epilog=_EXAMPLES)(train)


@dataclass(frozen=True)
class Choice:
    """Which model to train, and how to get it there."""

    model: str | None
    model_id: str | None
    load: unslothd.LoadOptions
    lora: unslothd.LoraOptions

    def __post_init__(self) -> None:
        """Refuses what does not go together."""
        if (self.model is None) == (self.model_id is None):
            raise typer.BadParameter(
                "pass --model NAME to load one, or --model-id ID of a loaded one", param_hint="--model"
            )
        if self.load and self.model is None:
            raise typer.BadParameter(f"{_flags(self.load)} need --model NAME", param_hint="--model-id")


@options.takes("config", options.ConfigOptions)
@options.takes("lora", options.LoraOptions)
@options.takes("load_options", options.LoadOptions)
@options.connects
def train(
    dataset: options.Dataset,
    model: options.ModelToLoad = None,
    model_id: options.LoadedModel = None,
    eval_dataset: options.EvalDataset = None,
    row_format: options.RowLayout = None,
    template: options.Template = "",
    label: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="For your own use; repeatable.")] = None,
    request_id: Annotated[
        str | None, typer.Option(help="Attach to the training that was started with this id, if there is one.")
    ] = None,
    on_disconnect: Annotated[
        DisconnectPolicyName, typer.Option(help="Whether the training goes on without this command.")
    ] = "detach",
    as_json: options.Json = False,
    *,
    config: unslothd.TrainingOptions,
    lora: unslothd.LoraOptions,
    load_options: unslothd.LoadOptions,
    server: options.Server,
) -> None:
    """Train a model on rows and watch it live.

    Ctrl-C detaches: the training goes on, and the command says how to watch, pause or cancel it. Twice: quits hard.
    """
    choice = Choice(model, model_id, load_options, lora)
    rows, eval_rows = parse_dataset(dataset), parse_dataset(eval_dataset) if eval_dataset else None
    labels = options.labels(label or [])
    with session(server, as_json) as opened:
        with prepared(opened, choice, config) as ready:
            run = opened.client.train(
                ready,
                rows,
                eval_rows,
                row_format=row_format,
                template=template,
                labels=labels,
                request_id=request_id,
                disconnect_policy=on_disconnect,
                **config,
            )
        if not as_json:
            opened.out.note(f"training {run.training_id} on {ready}")
        follow(run, opened.out, cancels_when_left=on_disconnect == "cancel")
        if not as_json:
            _say_next(ready, run.training_id, opened.out)


@contextmanager
def prepared(opened: Session, choice: Choice, config: unslothd.TrainingOptions) -> Generator[str]:
    """Gives the id of a model that is ready to be trained; where that is refused, says that the model stays loaded.

    Args:
        opened: The connection.
        choice: The model; one that is named is loaded, once the server takes the options.
        config: That the training will be started with.
    """
    client, out = opened.client, opened.out
    if choice.model is not None:
        _check_options(client, choice.lora, config)
        model = opened.load_model(choice.model, choice.load)
        if not out.as_json:
            models.show_loaded(model, out)
    else:
        model = client.get_model(choice.model_id or "")
    try:
        if choice.lora or model.state == unslothd.Model.STATE_READY:
            client.prepare(model, lora=choice.lora or None)
        yield model.model_id
    except unslothd.UnslothdError:
        say_stays_loaded(model.model_id, choice, out)
        raise


def _check_options(client: unslothd.Client, lora: unslothd.LoraOptions, config: unslothd.TrainingOptions) -> None:
    """Raises what the server refuses of the options, before a load that may take minutes.

    A server checks every field of a request before it looks for the model, and there is none of this name.
    """
    if lora or config:
        with suppress(unslothd.errors.NotFound):
            client.prepare(f"no-model-{uuid.uuid4()}", lora=lora or None, **config)


def say_stays_loaded(model_id: str, choice: Choice, out: Output) -> None:
    """Says how to take a model that was just loaded, so that the next command does not load it once more."""
    if choice.model is not None and not out.as_json:
        out.note(f"{model_id} stays loaded; from now on take it with --model-id {model_id}")


def _say_next(model_id: str, training_id: str, out: Output) -> None:
    out.note(f'Try it: unslothd generate {model_id} "Hello" --chat')
    out.note(f"Fetch it: unslothd download {training_id}")


def _flags(used: unslothd.LoadOptions) -> str:
    return ", ".join(options.HF_FLAG if name == "token" else "--" + name.replace("_", "-") for name in used)


def parse_dataset(text: str) -> unslothd.DatasetLike:
    """Returns the dataset that an argument names.

    Raises:
        typer.BadParameter: It is no file here and has no prefix that says where it is.
    """
    if text.startswith("server:"):
        return unslothd.ServerPath(text.removeprefix("server:"))
    if text.startswith("hub:"):
        name, _, split = text.removeprefix("hub:").partition(":")
        return unslothd.HubDataset(name, split=split)
    if text.startswith("sha256:"):
        return unslothd.UploadedDataset(text)
    path = Path(text).expanduser()
    if not path.is_file():
        raise typer.BadParameter(
            f"{text!r} is no file here; for a file on the server write server:{text}, for a Hub dataset hub:{text}",
            param_hint="--dataset",
        )
    return path
