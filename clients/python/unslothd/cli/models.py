"""`unslothd models`: load, prepare, list and unload."""

from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Column, Table

import unslothd
from unslothd.cli import options, texts
from unslothd.cli.session import Output, session

ModelId = Annotated[str, typer.Argument(metavar="MODEL_ID", help="As `unslothd models list` shows it.")]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    models = typer.Typer(no_args_is_help=True)
    models.command("list", epilog="Example: unslothd models list --json | jq -r .model_id")(list_models)
    models.command("load", epilog="Example: unslothd models load unsloth/Llama-3.2-1B-Instruct --max-seq-length 4096")(
        load
    )
    models.command(
        "prepare", epilog="Example: unslothd models prepare llama-3.2-1b-instruct-unsloth --lora-r 8 --max-steps 60"
    )(prepare)
    models.command("unload", epilog="Example: unslothd models unload llama-3.2-1b-instruct-unsloth")(unload)
    app.add_typer(models, name="models", help="Load, prepare, list and unload models.")


@options.connects
def list_models(as_json: options.Json = False, *, server: options.Server) -> None:
    """List the models that are loaded."""
    with session(server, as_json) as (client, out):
        found = client.list_models()
        if as_json:
            for model in found:
                out.json(model)
        elif found:
            out.console.print(_table(found))
        else:
            out.note("No model is loaded. Load one: unslothd models load NAME")


def _table(models: list[unslothd.Model]) -> Table:
    """Two lines a model, so that on 80 columns ids and numbers stay whole; names are folded."""
    heads = ("model id\nname", "state", "weights\ndevice", "parameters\ntrainable", "memory")
    table = Table(
        *(Column(head, no_wrap=True) for head in heads), box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
    for model in models:
        table.add_row(
            f"{escape(model.model_id)}\n[dim]{escape(model.model_name)}[/]",
            texts.model_state(model),
            f"{'4-bit' if model.load_in_4bit else model.dtype}\n{model.device}",
            f"{texts.number(model.total_params)}\n{texts.number(model.trainable_params)}",
            texts.size(model.memory_bytes),
        )
    return table


@options.takes("load_options", options.LoadOptions)
@options.connects
def load(
    model_name: Annotated[
        str,
        typer.Argument(
            help="Hub id, folder or .gguf file on the server, saved adapter, training:ID, "
            "or training:ID/checkpoint-STEP."
        ),
    ],
    as_json: options.Json = False,
    *,
    load_options: unslothd.LoadOptions,
    server: options.Server,
) -> None:
    """Load a model and wait until it is ready."""
    with session(server, as_json) as opened:
        model = opened.load_model(model_name, load_options)
        if as_json:
            opened.out.json(model)
        else:
            show_loaded(model, opened.out)


def show_loaded(model: unslothd.Model, out: Output) -> None:
    """Says what was loaded, with the server's warnings."""
    weights = "4-bit" if model.load_in_4bit else model.dtype
    out.line(
        f"{model.model_id}: {texts.number(model.total_params)} parameters, {weights}, on {model.device}, "
        f"{texts.size(model.memory_bytes)}"
    )
    for warning in model.warnings:
        out.note(f"warning: {warning}", style="yellow")


@options.takes("config", options.ConfigOptions)
@options.takes("lora", options.LoraOptions)
@options.connects
def prepare(
    model_id: ModelId,
    as_json: options.Json = False,
    *,
    lora: unslothd.LoraOptions,
    config: unslothd.TrainingOptions,
    server: options.Server,
) -> None:
    """Attach trainable parameters and set the config of a model's trainings."""
    with session(server, as_json) as (client, out):
        prepared = client.prepare(model_id, lora=lora or None, **config)
        if as_json:
            out.json(prepared)
            return
        model = prepared.model
        adapter = f", LoRA r={prepared.lora.r} on {', '.join(prepared.lora.target_modules)}" if model.lora.r else ""
        out.line(
            f"{model.model_id}: {texts.number(model.trainable_params)} of {texts.number(model.total_params)} "
            f"parameters are trained{adapter}"
        )


@options.connects
def unload(
    model_id: ModelId,
    force: Annotated[bool, typer.Option("--force", help="Cancel its trainings instead of refusing.")] = False,
    as_json: options.Json = False,
    *,
    server: options.Server,
) -> None:
    """End a model's worker and give its memory back."""
    with session(server, as_json) as (client, out):
        freed = client.unload_model(model_id, force=force)
        if as_json:
            out.json({"freed_memory_bytes": freed})
        else:
            out.line(f"{model_id} is unloaded; {texts.size(freed)} given back")
