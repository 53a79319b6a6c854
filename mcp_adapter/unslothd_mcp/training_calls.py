"""Starts a training for a tool call, follows it, and does what the call's end means for it."""

from typing import Any, Literal, TypeAlias

import anyio

import unslothd
from unslothd_mcp import budgets, results
from unslothd_mcp.errors import ToolFailure
from unslothd_mcp.progress import StepReports
from unslothd_mcp.results import training_state
from unslothd_mcp.session import Ctx, Session, session_of

OnCancel: TypeAlias = Literal["cancel", "detach"]
_CANCEL_SECONDS = 15.0
_PAUSED = unslothd.Training.STATE_PAUSED


async def started(
    session: Session, model_id: str, train: Any, evaluation: Any, **options: Any
) -> unslothd.AsyncTrainingRun:
    """Starts a training within the budgets, and returns it.

    A tool call that is cancelled meanwhile does not leave a training behind that nobody knows of: the start is waited
    for.

    Raises:
        ToolFailure: BUDGET_STEPS or BUDGET_MINUTES.
    """
    await budgets.check_minutes(session)
    with anyio.CancelScope(shield=True):
        run = await session.client.train(model_id, train, evaluation, labels=budgets.labels(session), **options)
        try:
            await budgets.check_accepted(session, await session.client.get_training(run.training_id))
        except BaseException:
            run.close()
            raise
    return run  # pyright: ignore[reportPossiblyUnboundVariable] - nobody cancels this scope


async def followed(ctx: Ctx, run: unslothd.AsyncTrainingRun, on_cancel: OnCancel) -> unslothd.Training:
    """Reports the steps of a training until it has succeeded, and returns it.

    Args:
        ctx: The call.
        run: The training.
        on_cancel: "cancel": a cancelled call cancels the training with a checkpoint; "detach": it goes on.

    Raises:
        TrainingFailed, TrainingCancelled: It ended so.
        ToolFailure: TRAINING_PAUSED: somebody paused it. BUDGET_MINUTES: it was stopped for the budget.
    """
    session, reports = session_of(ctx), StepReports(ctx)
    try:
        async for event in run:
            await reports.take(event)
            if event.HasField("state_changed") and event.state_changed.state == _PAUSED:
                await _check_not_paused(session, run.training_id)
    except unslothd.TrainingCancelled:
        await budgets.check_minutes(session)
        raise
    except anyio.get_cancelled_exc_class():
        if on_cancel == "cancel":
            with anyio.CancelScope(shield=True), anyio.move_on_after(_CANCEL_SECONDS):
                await session.client.cancel(run.training_id, save_checkpoint=True)
        raise
    finally:
        run.close()
    return await session.client.get_training(run.training_id)


async def result_of(session: Session, training: unslothd.Training) -> results.Trained:
    """Returns what unsloth_train returns for a training that is over.

    Raises:
        TrainingFailed, TrainingCancelled: It ended so.
    """
    if training_state(training) != "succeeded":
        await session.client.watch(training, after_sequence=max(0, training.last_sequence - 1)).result()
    return results.trained(training)


async def _check_not_paused(session: Session, training_id: str) -> None:
    """Ends the wait for a training that is paused; one that was attached to may have been, and run again."""
    if (await session.client.get_training(training_id)).state == _PAUSED:
        text = f"{training_id} was paused: it is saved and its device is free."
        raise ToolFailure("TRAINING_PAUSED", text, details={"training_id": training_id})
