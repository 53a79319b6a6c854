"""Long calls as progress notifications: a step of all steps, with loss and time left, for hosts that ask."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

import unslothd
from unslothd.cli import texts
from unslothd.v1.training_event_pb2 import StepProgress
from unslothd_mcp.session import Ctx

MessageT = TypeVar("MessageT")


class StepReports:
    """Reports each logged step once, also when a recovered training runs it again; before the first, what is prepared.

    Args:
        ctx: Call to report to.
    """

    def __init__(self, ctx: Ctx) -> None:
        self._ctx = ctx
        self._last = 0
        self._preparations = 0

    async def take(self, event: unslothd.TrainingEvent) -> None:
        """Reports an event if it is a step, or tells what is prepared before the first one."""
        if event.HasField("preparing") and not self._last:
            self._preparations += 1
            # Progress has to rise, and stays below the first step.
            await self._ctx.report_progress(1 - 1 / (1 + self._preparations), None, texts.event(event))
        if event.HasField("step") and event.step.step > self._last:
            self._last = event.step.step
            await self._ctx.report_progress(event.step.step, event.step.total_steps, step_text(event.step))


def step_text(step: StepProgress) -> str:
    """Returns the message of a step."""
    return f"step {step.step}/{step.total_steps}, loss {step.loss:.4f}, ETA {texts.duration(step.eta_seconds)}"


class PhaseReports:
    """Takes the progress of a load or an export, which is told from a callback, and reports it in order.

    Counts the reports, because phases have no common unit and progress has to rise.

    Args:
        ctx: Call to report to.
    """

    def __init__(self, ctx: Ctx) -> None:
        self._ctx = ctx
        self._texts: asyncio.Queue[str | None] = asyncio.Queue()
        self._told = ""

    def taker(self, text_of: Callable[[MessageT], str]) -> Callable[[MessageT], None]:
        """Returns a callback that reports the text of each message, unless it is the last one again."""

        def take(message: MessageT) -> None:
            text = text_of(message)
            if text != self._told:
                self._told = text
                self._texts.put_nowait(text)

        return take

    async def __aenter__(self) -> "PhaseReports":
        self._task = asyncio.create_task(self._report())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._texts.put_nowait(None)
        await self._task

    async def _report(self) -> None:
        count = 0
        while (text := await self._texts.get()) is not None:
            count += 1
            await self._ctx.report_progress(count, None, text)
