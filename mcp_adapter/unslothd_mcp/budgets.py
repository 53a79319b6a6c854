"""Budgets: how many optimizer steps a training may have, and how many minutes all trainings of this adapter may run.

What was used is counted on the server, by a label; the adapter keeps no book. Minutes run from the start of a
training to its end, pauses included.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator
from typing import Any

import unslothd
from unslothd._requests import TrainingState
from unslothd.errors import FieldViolation
from unslothd_mcp.errors import ToolFailure
from unslothd_mcp.session import Session

BUDGET_LABEL = "unslothd_mcp_budget"
_LOOK_SECONDS = 5.0
_ACTIVE: tuple[TrainingState, ...] = ("queued", "running", "recovering", "pausing")
_LOG = logging.getLogger(__name__)


def labels(session: Session) -> dict[str, str]:
    """Returns the labels of a training that is started here."""
    marks = {"started_by": "unslothd-mcp"}
    if session.settings.max_gpu_minutes is not None:
        marks[BUDGET_LABEL] = session.settings.budget_name
    return marks


def check_config(session: Session, config: dict[str, Any]) -> None:
    """Refuses hyper-parameters beyond the budget, before anything is asked of the server.

    Raises:
        ToolFailure: BUDGET_STEPS.
    """
    limit = session.settings.max_steps
    if limit is None:
        return
    if config.get("num_train_epochs") is not None:
        raise _too_many_steps("num_train_epochs", f"is not allowed: give max_steps, at most {limit}")
    if (steps := config.get("max_steps")) is not None and steps > limit:
        raise _too_many_steps("max_steps", f"{steps} is more than the {limit} that the user allows")


async def check_accepted(session: Session, training: unslothd.Training) -> None:
    """Cancels a training that was prepared with more steps than the budget has.

    Raises:
        ToolFailure: BUDGET_STEPS.
    """
    try:
        check_resolved(session, training)
    except ToolFailure:
        await session.client.cancel(training.training_id, save_checkpoint=True)
        raise


def check_resolved(session: Session, training: unslothd.Training) -> None:
    """Refuses a training whose whole config is beyond the budget.

    Raises:
        ToolFailure: BUDGET_STEPS.
    """
    config = training.config
    epochs = config.num_train_epochs if config.HasField("num_train_epochs") else None
    steps = config.max_steps if config.HasField("max_steps") else None
    check_config(session, {"num_train_epochs": epochs, "max_steps": steps})


async def check_minutes(session: Session) -> None:
    """Refuses to start anything once the minutes are used up.

    Raises:
        ToolFailure: BUDGET_MINUTES.
    """
    limit = session.settings.max_gpu_minutes
    if limit is not None and (used := await used_minutes(session)) >= limit:
        text = f"The trainings of this adapter ran {used:.1f} of the {limit:g} minutes that the user allows."
        raise ToolFailure("BUDGET_MINUTES", text, code="RESOURCE_EXHAUSTED")


async def used_minutes(session: Session) -> float:
    """Returns the minutes that the trainings of this budget have run, all together."""
    mine = await session.client.list_trainings(labels={BUDGET_LABEL: session.settings.budget_name})
    return sum(_seconds(training) for training in mine) / 60


@contextlib.asynccontextmanager
async def kept(session: Session) -> AsyncGenerator[None]:
    """Cancels, with a checkpoint, what runs when the minutes are used up."""
    if session.settings.max_gpu_minutes is None:
        yield
        return
    keeper = asyncio.create_task(_keep(session, session.settings.max_gpu_minutes))
    try:
        yield
    finally:
        keeper.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await keeper


async def _keep(session: Session, limit: float) -> None:
    mark = {BUDGET_LABEL: session.settings.budget_name}
    while True:
        await asyncio.sleep(_LOOK_SECONDS)
        try:
            active = await session.client.list_trainings(labels=mark, states=_ACTIVE)
            if active and await used_minutes(session) >= limit:
                for training in active:
                    await session.client.cancel(training.training_id)
        except unslothd.UnslothdError as error:  # the server is away: what it runs is looked at when it is back
            _LOG.warning("the budget could not be checked: %s", error.message)


def _seconds(training: unslothd.Training) -> float:
    if not training.HasField("start_time"):
        return 0.0
    end = training.end_time.ToNanoseconds() / 1e9 if training.HasField("end_time") else time.time()
    return max(0.0, end - training.start_time.ToNanoseconds() / 1e9)


def _too_many_steps(field: str, what: str) -> ToolFailure:
    violation = FieldViolation(f"training_config.{field}", what)
    text = f"{violation.field} {what} (--max-steps)."
    return ToolFailure("BUDGET_STEPS", text, code="RESOURCE_EXHAUSTED", fields=[violation])
