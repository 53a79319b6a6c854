"""`unslothd plan`: what a training would do, before it costs anything."""

from typing import Annotated

import typer
from google.protobuf.json_format import MessageToDict
from rich.text import Text

import unslothd
from unslothd.cli import options, texts
from unslothd.cli.session import Output, session
from unslothd.cli.train import Choice, parse_dataset, prepared, say_stays_loaded
from unslothd.v1.training_pb2 import RenderedRow

_PLANNING = "reading the rows as the training would"
_MEASURING = "reading the rows and measuring passes on the model's device; this may take a minute"
_LONGEST_SHOWN = 4000
_NAME_WIDTH = 12
# Control characters would act on the terminal; their pictures have the same length, so that spans still fit.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(
        "plan",
        epilog="Example: unslothd plan --model-id llama-3.2-1b-instruct-unsloth --dataset rows.jsonl --measure",
    )(plan)


@options.takes("config", options.ConfigOptions)
@options.takes("lora", options.LoraOptions)
@options.takes("load_options", options.LoadOptions)
@options.connects
def plan(
    dataset: options.Dataset,
    model: options.ModelToLoad = None,
    model_id: options.LoadedModel = None,
    eval_dataset: options.EvalDataset = None,
    row_format: options.RowLayout = None,
    template: options.Template = "",
    measure: Annotated[bool, typer.Option("--measure", help="Run a short probe for memory and speed.")] = False,
    preview_rows: Annotated[int, typer.Option(min=1, max=100, help="Rows to show as the model sees them.")] = 3,
    as_json: options.Json = False,
    *,
    config: unslothd.TrainingOptions,
    lora: unslothd.LoraOptions,
    load_options: unslothd.LoadOptions,
    server: options.Server,
) -> None:
    """Show what `unslothd train` would do with the same options: config, rows, tokens, memory, and what carries loss.

    Nothing is trained. The model is loaded and prepared, as by train, and stays so.
    """
    choice = Choice(model, model_id, load_options, lora)
    rows, eval_rows = parse_dataset(dataset), parse_dataset(eval_dataset) if eval_dataset else None
    with session(server, as_json) as opened:
        with prepared(opened, choice, config) as ready, opened.out.waiting(_MEASURING if measure else _PLANNING):
            found = opened.client.plan(
                ready,
                rows,
                eval_rows,
                measure=measure,
                preview_rows=preview_rows,
                row_format=row_format,
                template=template,
                **config,
            )
        if as_json:
            opened.out.json(found)
        else:
            show(found, opened.out)
            say_stays_loaded(ready, choice, opened.out)


def show(plan: unslothd.TrainingPlan, out: Output) -> None:
    """Shows a plan: figures, warnings, config and rows."""
    for name, value in figures(plan).items():
        if value:
            out.line(f"{name:{_NAME_WIDTH}}{value}")
    for warning in plan.warnings:
        out.note(f"warning: {warning}", style="yellow")
    for number, row in enumerate(plan.preview, start=1):
        cut = ", cut at max_seq_length" if row.truncated else ""
        out.line(f"\nrow {number}: {row.num_tokens} tokens{cut}", style="underline")
        out.console.print(rendered(row, styled=out.console.is_terminal))
    if plan.preview:
        how = "Dimmed text carries" if out.console.is_terminal else "Text outside of ⟦ ⟧ carries"
        out.note(f"\n{how} no loss: the model sees it, but does not learn to write it.", style="dim")


def figures(plan: unslothd.TrainingPlan) -> dict[str, str]:
    """Returns the lines of a plan by name; empty ones have nothing to say."""
    layout = plan.row_format.WhichOneof("layout") or ""
    part = f"{plan.loss_tokens / plan.num_tokens:.0%}" if plan.num_tokens else "none"
    return {
        "layout": layout + (", loss on the answers only" if plan.row_format.completion_only_loss else ""),
        "rows": texts.number(plan.num_rows) + _left_out(plan),
        "eval rows": texts.number(plan.num_eval_rows) if plan.num_eval_rows else "",
        "tokens": f"{texts.number(plan.num_tokens)} a pass, {texts.number(plan.mean_row_tokens)} a row, "
        f"{texts.number(plan.longest_row_tokens)} in the longest",
        "loss": f"on {texts.number(plan.loss_tokens)} of them ({part})",
        "steps": texts.number(plan.total_steps),
        "trained": f"{texts.number(plan.trainable_params)} parameters",
        "passes": texts.passes(plan.passes) if plan.HasField("passes") else "",
        "memory": _memory(plan),
        "speed": _speed(plan),
        "config": _config(plan),
    }


def _left_out(plan: unslothd.TrainingPlan) -> str:
    parts = {"truncated": plan.truncated_rows, "dropped": plan.dropped_rows}
    said = ", ".join(f"{texts.number(count)} {how}" for how, count in parts.items() if count)
    return f" ({said})" if said else ""


def _memory(plan: unslothd.TrainingPlan) -> str:
    if not plan.memory_estimate_bytes:
        return ""
    how = "measured" if plan.memory_measured else "estimated; --measure measures it"
    free = f", {texts.size(plan.memory_free_bytes)} free" if plan.memory_free_bytes else ""
    return f"{texts.size(plan.memory_estimate_bytes)} at its peak{free} ({how})"


def _speed(plan: unslothd.TrainingPlan) -> str:
    if not plan.HasField("step_seconds"):
        return ""
    rows, bound = ("typical rows", "about") if plan.HasField("passes") else ("the longest rows", "at most")
    return (
        f"{texts.number(plan.tokens_per_second)} tok/s, {plan.step_seconds:.3g} s a step of {rows}: {bound} "
        f"{texts.duration(plan.step_seconds * plan.total_steps)} in all"
    )


def _config(plan: unslothd.TrainingPlan) -> str:
    values = MessageToDict(plan.config, preserving_proto_field_name=True)
    return f"\n{'':{_NAME_WIDTH}}".join(f"{name} = {value}" for name, value in values.items())


def rendered(row: RenderedRow, *, styled: bool) -> Text:
    """Returns a row with what carries loss told apart: the rest dimmed or, without styles, the loss in brackets.

    Args:
        row: With loss_spans start, end, start, end, … in characters of its text.
        styled: True for a terminal.
    """
    shown = row.text[:_LONGEST_SHOWN].translate(_VISIBLE)
    left = len(row.text) - len(shown)
    marks = [min(position, len(shown)) for position in row.loss_spans]
    text, end = Text(), 0
    for start, stop in zip(marks[::2], marks[1::2], strict=False):
        text.append(shown[end:start], style="dim")
        learnt = shown[start:stop]
        text.append(learnt if styled or not learnt else f"⟦{learnt}⟧", style="bold")
        end = stop
    text.append(shown[end:], style="dim")
    if left:
        text.append(f"\n… {texts.number(left)} more characters; --json has them all", style="italic")
    return text
