"""What waits on each model: trainings run in turn, are told their place, and are held up by one that is paused."""

import asyncio
import contextvars
from collections.abc import Iterable

import structlog

from unslothd.v1.training_pb2 import Training
from unslothd_server.app.model_workers import ModelWorkers
from unslothd_server.app.models import Models
from unslothd_server.app.training_driver import TrainingDriver
from unslothd_server.app.training_run import TrainingRun
from unslothd_server.app.training_state import is_final, state_changed
from unslothd_server.errors import UnslothdError

log = structlog.get_logger()


class TrainingQueues:
    """The queues, one for each model. The first of a queue runs, or is paused in the middle and holds the others up.

    Args:
        models: The registry of models.
        workers: Their workers.
        stall_seconds: A training that does nothing for so long has hung.
    """

    def __init__(self, models: Models, workers: ModelWorkers, *, stall_seconds: float) -> None:
        self._models = models
        self._driver = TrainingDriver(models, workers, stall_seconds=stall_seconds)
        self._queues: dict[str, list[TrainingRun]] = {}
        self._runners: dict[str, asyncio.Task[None]] = {}

    def length(self, model_id: str) -> int:
        """Number of trainings on a model that run, wait, or hold their place paused."""
        return len(self._queues.get(model_id, []))

    def place_of(self, run: TrainingRun) -> int:
        """Number of trainings before this one, or before it once it is added."""
        queue = self._queues.get(run.training.model_id, [])
        return queue.index(run) if run in queue else len(queue)

    def is_driven(self, run: TrainingRun) -> bool:
        """True when a driver has the training: it runs, or its model is being brought up for it."""
        queue = self._queues.get(run.training.model_id, [])
        return bool(queue) and queue[0] is run and run.training.model_id in self._runners

    def add(self, run: TrainingRun) -> None:
        """Puts a training at the end of its queue, unless it holds its place, and sees that the queue moves."""
        queue = self._queues.setdefault(run.training.model_id, [])
        if run not in queue:
            queue.append(run)
        self._move(run.training.model_id)

    def restore(self, runs: Iterable[TrainingRun]) -> None:
        """Queues the trainings of an earlier server; those that had begun keep their place before the others."""
        ordered = sorted(runs, key=lambda run: (not self._holds_its_place(run), run.queued_at, run.training_id))
        for run in ordered:
            self._queues.setdefault(run.training.model_id, []).append(run)
        for model_id in list(self._queues):
            self._move(model_id)

    def _holds_its_place(self, run: TrainingRun) -> bool:
        """True for the one that was first: it ran, was paused in the middle, or goes on after that."""
        return run.has_begun and run.training.queue_position == 0

    def drop(self, run: TrainingRun) -> None:
        """Takes out a training that is over or that gives up its place; those behind it move up."""
        queue = self._queues.get(run.training.model_id, [])
        if run in queue:
            queue.remove(run)
            self._tell_places(queue)
        self._move(run.training.model_id)

    def _move(self, model_id: str) -> None:
        if model_id not in self._runners and self._queues.get(model_id) and not self._models.is_closing:
            # A queue outlives the call that began it, so its lines in the log are not of that call.
            self._runners[model_id] = asyncio.create_task(
                self._run(model_id), name=f"queue of {model_id}", context=contextvars.Context()
            )

    async def _run(self, model_id: str) -> None:
        """Runs what waits on a model, in turn, until nothing does or a paused one holds it up."""
        queue = self._queues[model_id]
        try:
            while queue and not self._models.is_closing:
                run = queue[0]
                if is_final(run.training) or (run.is_paused and not run.has_begun):
                    queue.pop(0)
                    self._tell_places(queue)
                elif run.is_paused:
                    return
                else:
                    with structlog.contextvars.bound_contextvars(training_id=run.training_id, model_id=model_id):
                        await self._driver.drive(self._models.get(model_id), run)
        finally:
            self._runners.pop(model_id, None)

    def _tell_places(self, queue: list[TrainingRun]) -> None:
        for place, run in enumerate(queue):
            if run.training.state == Training.STATE_QUEUED and run.training.queue_position != place:
                try:
                    run.append(state_changed(Training.STATE_QUEUED, place))
                except (UnslothdError, OSError):  # a full disk must not hold the queue up
                    log.exception("a training's place could not be told", training_id=run.training_id)

    async def abandon(self) -> None:
        """Lets go of every training; workers that have one go on with it."""
        runners = list(self._runners.values())
        for runner in runners:
            runner.cancel()
        await asyncio.gather(*runners, return_exceptions=True)

    async def close(self) -> None:
        """Waits for the drivers, whose trainings have been stopped."""
        await asyncio.gather(*self._runners.values(), return_exceptions=True)
