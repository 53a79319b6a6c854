"""Tools that pause, resume and cancel trainings."""

from typing import Annotated, cast

from mcp.server.mcpserver import Elicit, Resolve
from pydantic import Field

import unslothd
from unslothd_mcp import budgets, results, safety
from unslothd_mcp.arguments import TrainingId
from unslothd_mcp.catalogue import ToolSpec
from unslothd_mcp.errors import ToolFailure
from unslothd_mcp.safety import Approval, Asked, Confirm, Loss
from unslothd_mcp.session import Ctx, Session, session_of


async def unsloth_pause_training(ctx: Ctx, training_id: TrainingId) -> results.TrainingView:
    """Asks a training to save at the next optimizer step and to free its device; nothing is lost.

    Answers at once, in state pausing or paused; there are no defaults. Next: unsloth_resume_training to go on exactly
    there.
    """
    return _view(await session_of(ctx).client.pause(training_id))


async def _approve_resume(
    ctx: Ctx, training_id: str, checkpoint_step: int, confirm: str | None
) -> Elicit[Approval] | Approval:
    return await safety.approval(ctx, await _lost_by_going_back(ctx, training_id, checkpoint_step), confirm)


async def _lost_by_going_back(ctx: Ctx, training_id: str, checkpoint_step: int) -> Loss | None:
    if not checkpoint_step:
        return None
    training = await session_of(ctx).client.get_training(training_id)
    later = [each.step for each in training.checkpoints if each.step > checkpoint_step]
    if not later:
        return None
    text = f"Going on with {training_id} from step {checkpoint_step} removes its checkpoints of the steps {later}."
    return Loss(text, {"resume": training_id, "from_step": checkpoint_step, "removes_checkpoints": later})


async def unsloth_resume_training(
    ctx: Ctx,
    training_id: TrainingId,
    asked: Annotated[Asked, Resolve(_approve_resume)],
    checkpoint_step: Annotated[
        int,
        Field(description="Optimizer step of the checkpoint to go on from; later ones are removed. Default 0: newest."),
    ] = 0,
    confirm: Confirm = None,
) -> results.TrainingView:
    """Goes on with a paused, failed or cancelled training, exactly at the step where its checkpoint was saved.

    Answers at once; loads the model again if needed. Default: the newest checkpoint. Next: unsloth_watch_training with
    after_sequence=last_sequence.
    """
    safety.require(asked)
    session = session_of(ctx)
    await _check_budget(session, training_id)
    run = await session.client.resume(training_id, checkpoint_step=checkpoint_step)
    run.close()
    return _view(await session.client.get_training(training_id))


async def _check_budget(session: Session, training_id: str) -> None:
    """Refuses to resume what is beyond the budgets, or what the budget of minutes would not count."""
    limits = session.settings
    if limits.max_steps is None and limits.max_gpu_minutes is None:
        return
    training = await session.client.get_training(training_id)
    budgets.check_resolved(session, training)
    await budgets.check_minutes(session)
    if limits.max_gpu_minutes is not None and training.labels.get(budgets.BUDGET_LABEL) != limits.budget_name:
        text = f"{training_id} was started elsewhere, so the budget of minutes does not count it."
        raise ToolFailure("BUDGET_MINUTES", text, next_step="Ask the user to resume it with `unslothd resume`.")


async def _approve_cancel(
    ctx: Ctx, training_id: str, save_checkpoint: bool, confirm: str | None
) -> Elicit[Approval] | Approval:
    return await safety.approval(ctx, None if save_checkpoint else await _lost_by_cancelling(ctx, training_id), confirm)


async def _lost_by_cancelling(ctx: Ctx, training_id: str) -> Loss | None:
    training = await session_of(ctx).client.get_training(training_id)
    if results.is_over(training):
        return None
    text = f"Cancelling {training_id} without a checkpoint throws away the steps since its last one."
    return Loss(text, {"cancel": training_id, "save_checkpoint": False})


async def unsloth_cancel_training(
    ctx: Ctx,
    training_id: TrainingId,
    asked: Annotated[Asked, Resolve(_approve_cancel)],
    save_checkpoint: Annotated[
        bool, Field(description="Save a checkpoint and the adapter so far; false asks for `confirm`. Default true.")
    ] = True,
    confirm: Confirm = None,
) -> results.TrainingView:
    """Asks a training to stop at the next optimizer step; one that waits never starts.

    Answers at once, in state cancelling or cancelled. Default: a checkpoint is saved. Next: unsloth_watch_training
    until it is cancelled; unsloth_resume_training goes on from the checkpoint.
    """
    safety.require(asked)
    return _view(await session_of(ctx).client.cancel(training_id, save_checkpoint=save_checkpoint))


def _view(training: unslothd.Training) -> results.TrainingView:
    return cast(results.TrainingView, results.training_view(training))


TOOLS = (
    ToolSpec(unsloth_pause_training, "Pause a training", idempotent=True),
    ToolSpec(unsloth_resume_training, "Resume a training", destructive=True, idempotent=True),
    ToolSpec(unsloth_cancel_training, "Cancel a training", destructive=True, idempotent=True),
)
