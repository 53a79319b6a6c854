"""Tools that start, plan and look at trainings."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, cast

import anyio
from pydantic import Field

import unslothd
from unslothd._requests import TrainingState
from unslothd.cli import texts
from unslothd_mcp import budgets, results
from unslothd_mcp.arguments import ConfigArgument, ModelId, RowFormat, Template, TrainingId, options
from unslothd_mcp.catalogue import ToolSpec
from unslothd_mcp.datasets import DatasetArgument, dataset
from unslothd_mcp.plain import Plain, moment, plain
from unslothd_mcp.progress import StepReports
from unslothd_mcp.session import Ctx, Session, session_of
from unslothd_mcp.training_calls import OnCancel, followed, started

_MAX_WAIT_SECONDS = 300.0
_MAX_EVENTS = 500


async def unsloth_train(
    ctx: Ctx,
    model_id: ModelId,
    train_dataset: DatasetArgument,
    eval_dataset: DatasetArgument = None,
    training_config: ConfigArgument = None,
    row_format: RowFormat = None,
    template: Template = "",
    wait: Annotated[
        bool,
        Field(description="false: return training_id at once; follow it with unsloth_watch_training. Default true."),
    ] = True,
    on_cancel: Annotated[
        OnCancel,
        Field(
            description='What cancelling this call means. "cancel" (default): the training stops at the next step and '
            'keeps a checkpoint; "detach": it goes on.'
        ),
    ] = "cancel",
    request_id: Annotated[
        str | None,
        Field(description="A UUID of yours: a repeated call with it attaches to the same training. Default null."),
    ] = None,
) -> results.Trained:
    """Trains a prepared model on rows and waits for the end, with a progress notification for each logged step.

    Takes minutes to hours; with wait=false it returns at once. Defaults: the prepared hyper-parameters (100 steps).
    Returns metrics (train_runtime in seconds, train_loss) and output_dir, the adapter's folder on the server. Next:
    unsloth_generate to try it, unsloth_export_model for its files; after wait=false unsloth_watch_training.
    """
    session = session_of(ctx)
    config = options(training_config)
    budgets.check_config(session, config)
    run = await started(
        session,
        model_id,
        await _placed(session, train_dataset, "train_dataset"),
        None if eval_dataset is None else await _placed(session, eval_dataset, "eval_dataset"),
        row_format=row_format,
        template=template,
        request_id=request_id,
        **config,
    )
    if wait:
        return results.trained(await followed(ctx, run, on_cancel))
    run.close()
    return results.trained(await session.client.get_training(run.training_id))


async def unsloth_plan_training(
    ctx: Ctx,
    model_id: ModelId,
    train_dataset: DatasetArgument,
    eval_dataset: DatasetArgument = None,
    training_config: ConfigArgument = None,
    row_format: RowFormat = None,
    template: Template = "",
    measure: Annotated[
        bool, Field(description="Run a short probe on the device, for memory and speed (seconds). Default false.")
    ] = False,
    preview_rows: Annotated[int, Field(description="Rows to show as the model sees them, 1 to 100. Default 3.")] = 3,
) -> dict[str, Any]:
    """Works out what unsloth_train would do with the same arguments, without doing it (dry run).

    Takes seconds. Returns rows, tokens, steps, bytes of memory, warnings, and rows with the part that carries loss
    between ⟦ and ⟧. Defaults: no probe, 3 rows. Next: unsloth_train with the same arguments, or corrected ones.
    """
    session = session_of(ctx)
    roots = session.settings.allowed_roots
    plan = await session.client.plan(
        model_id,
        dataset(train_dataset, "train_dataset", roots),
        None if eval_dataset is None else dataset(eval_dataset, "eval_dataset", roots),
        measure=measure,
        preview_rows=preview_rows,
        row_format=row_format,
        template=template,
        **options(training_config),
    )
    shown = plain(plan) | {"preview": [_marked(row.text, list(row.loss_spans)) for row in plan.preview]}
    return {
        "status": results.SUCCESS,
        **shown,
        "next_step": "Call unsloth_train with the same arguments, or correct them and plan again.",
    }


async def unsloth_get_training(ctx: Ctx, training_id: TrainingId) -> results.TrainingView:
    """Returns a training as it is now: state, step of total_steps, checkpoints, metrics or error, resolved config.

    Answers at once; there are no defaults. Next: what `next_step` in the result says, e.g. unsloth_watch_training.
    """
    training = await session_of(ctx).client.get_training(training_id)
    return cast(results.TrainingView, results.training_view(training))


async def unsloth_list_trainings(
    ctx: Ctx,
    model_id: Annotated[str, Field(description='Only those on this model. Default "": all.')] = "",
    states: Annotated[
        list[TrainingState] | None,
        Field(description='Only those in these states, e.g. ["running"]. Default null: all.'),
    ] = None,
    limit: Annotated[int, Field(description="Trainings at most, 1 to 1000. Default 20.")] = 20,
) -> dict[str, Any]:
    """Lists trainings, newest first: id, model, state, step, metrics.

    Answers at once. Default: the newest 20 trainings of all models. Next: unsloth_get_training for one of them.
    """
    found = await session_of(ctx).client.list_trainings(model=model_id or None, states=states or (), limit=limit)
    return {"trainings": [results.training_view(training, brief=True) for training in found]}


async def unsloth_watch_training(
    ctx: Ctx,
    training_id: TrainingId,
    after_sequence: Annotated[
        int, Field(description="Sequence number of the last event that you have seen. Default 0: from the beginning.")
    ] = 0,
    wait_seconds: Annotated[
        float, Field(ge=0, le=_MAX_WAIT_SECONDS, description="Seconds to wait for more, 0 to 300. Default 30.")
    ] = 30.0,
    max_events: Annotated[int, Field(ge=1, le=_MAX_EVENTS, description="Events at most, 1 to 500. Default 100.")] = 100,
) -> dict[str, Any]:
    """Returns the events of a training after a sequence number: what is there, then what happens while it waits.

    Returns after wait_seconds (default 30 seconds), after max_events (default 100), or when the training is over or
    paused. Next: the same call with after_sequence=last_sequence, until `over` is true.
    """
    client = session_of(ctx).client
    now = await client.get_training(training_id)
    waits = wait_seconds > 0 and not _rests(now)
    events: list[Plain] = []
    reports = StepReports(ctx)
    run = client.watch(training_id, after_sequence=after_sequence)
    try:
        with anyio.move_on_after(wait_seconds if waits else None) as scope:
            async for event in _until(run, now.last_sequence, waits=waits):
                events.append(event_view(event))
                await reports.take(event)
                if len(events) >= max_events or _is_pause(event, now.last_sequence):
                    break
    finally:
        run.close()
    training = await client.get_training(training_id)
    last = events[-1]["sequence"] if events else after_sequence
    over = results.is_over(training) and last >= training.last_sequence
    return {
        "training_id": training_id,
        "state": results.training_state(training),
        "step": training.step,
        "total_steps": training.total_steps,
        "events": events,
        "last_sequence": last,
        "over": over,
        "timed_out": scope.cancelled_caught,
        "next_step": results.after(training) if over or _rests(training) else _more(training_id, last),
    }


def event_view(event: unslothd.TrainingEvent) -> Plain:
    """Returns an event: its number, time, kind, one line of text, and its figures."""
    kind = event.WhichOneof("kind") or ""
    return {
        "sequence": event.sequence,
        "time": moment(event.event_time),
        "kind": kind,
        "text": texts.event(event),
        "data": plain(getattr(event, kind)) if kind else {},
    }


async def _placed(session: Session, value: object, argument: str) -> unslothd.DatasetLike:
    """Returns a dataset; a file is stored on the server first, so that the start of the training is quick."""
    data = dataset(value, argument, session.settings.allowed_roots)
    return await session.client.upload_dataset(data) if isinstance(data, Path) else data


async def _until(run: unslothd.AsyncTrainingRun, last: int, *, waits: bool) -> AsyncIterator[unslothd.TrainingEvent]:
    """Yields events: those up to the last one that is there, or without an end."""
    if not waits and run.last_sequence >= last:
        return
    async for event in run:
        yield event
        if not waits and event.sequence >= last:
            return


def _rests(training: unslothd.Training) -> bool:
    return results.is_over(training) or training.state == unslothd.Training.STATE_PAUSED


def _is_pause(event: unslothd.TrainingEvent, last: int) -> bool:
    """True for a pause that happened while we watched."""
    is_new = event.sequence > last
    return is_new and event.HasField("state_changed") and event.state_changed.state == unslothd.Training.STATE_PAUSED


def _more(training_id: str, last: int) -> str:
    return f'Call unsloth_watch_training(training_id="{training_id}", after_sequence={last}) for what happens next.'


def _marked(text: str, spans: list[int]) -> str:
    """Returns a row with the parts that carry loss between ⟦ and ⟧."""
    parts, position = list[str](), 0
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        parts += [text[position:start], "⟦", text[start:end], "⟧"]
        position = end
    return "".join([*parts, text[position:]])


TOOLS = (
    ToolSpec(unsloth_train, "Train a model", open_world=True),
    ToolSpec(unsloth_plan_training, "Plan a training (dry run)", read_only=True, open_world=True),
    ToolSpec(unsloth_get_training, "Look at a training", read_only=True),
    ToolSpec(unsloth_list_trainings, "List trainings", read_only=True),
    ToolSpec(unsloth_watch_training, "Watch a training", read_only=True),
)
