"""Workers for trainings: the model's, brought up when it is the training's turn; what that waits for is told."""

import asyncio

from unslothd.v1.training_event_pb2 import TrainingEvent, TrainingWarning
from unslothd_server.app.loaded_model import LoadedModel
from unslothd_server.app.model_workers import ModelWorkers
from unslothd_server.app.models import Models
from unslothd_server.app.ports import Worker
from unslothd_server.app.stopping import stopping
from unslothd_server.app.training_run import TrainingRun
from unslothd_server.app.training_store import StopWish
from unslothd_server.app.worker_exit import WorkerStuckError
from unslothd_server.disk import in_units
from unslothd_server.errors import ExhaustedError

# How soon a stop acts on a training that waits for its worker.
_LOOK_AT_WAIT_SECONDS = 0.5
# A worker that did not end is tried again after so many looks.
_LOOKS_BETWEEN_TRIES = 60


class TrainingWorkers:
    """Finds a training the worker of its model.

    Args:
        models: The registry.
        workers: Brings workers up.
    """

    def __init__(self, models: Models, workers: ModelWorkers) -> None:
        self._models = models
        self._workers = workers

    async def brought_up(self, entry: LoadedModel, run: TrainingRun) -> Worker | None:
        """Returns the model's worker once it is there; None when a stop was asked for before.

        A wait for memory, or for the end of a worker that does not end, is told by a warning, once.

        Raises:
            UnslothdError: Why there is none.
        """
        told: set[str] = set()
        while run.wish is StopWish.NONE or not told:
            try:
                return await self._worker_or_stop(entry, run, told)
            except WorkerStuckError as stuck:
                _warn(run, _waits_for_end(stuck), told)
            for _ in range(_LOOKS_BETWEEN_TRIES):
                if run.wish is StopWish.NONE:
                    await asyncio.sleep(_LOOK_AT_WAIT_SECONDS)
        return None

    async def _worker_or_stop(self, entry: LoadedModel, run: TrainingRun, told: set[str]) -> Worker | None:
        working = asyncio.create_task(self._working(entry), name=f"worker for {run.training_id}")
        try:
            while not (await asyncio.wait([working], timeout=_LOOK_AT_WAIT_SECONDS))[0]:
                if entry.lacks_memory is None:
                    continue
                if run.wish is not StopWish.NONE:
                    if entry.stored.suspended:  # nobody but this training asked for the model
                        await self._workers.suspend(entry)
                    return None
                _warn(run, _waits_for_memory(entry.lacks_memory), told)
            return await working
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)

    async def _working(self, entry: LoadedModel) -> Worker:
        """Returns the worker of a model, started anew if it is suspended, being brought back, or was lost."""
        if entry.needs_worker:
            if self._models.is_closing:
                raise stopping()
            await self._workers.put_away(entry, at_once=True)
            self._workers.bring_up(entry, waits=True)
        if entry.bringing_up is not None:
            error = await asyncio.shield(entry.bringing_up)
            if error is not None:
                raise error
        return entry.require_worker()


def _warn(run: TrainingRun, warning: TrainingWarning, told: set[str]) -> None:
    if warning.reason not in told:
        run.append(TrainingEvent(warning=warning))
        told.add(warning.reason)


def _waits_for_end(stuck: WorkerStuckError) -> TrainingWarning:
    return TrainingWarning(
        reason="WAITING_FOR_WORKER",
        message=f"{stuck.message} The training waits for that and then goes on by itself, unless it is cancelled.",
    )


def _waits_for_memory(refused: ExhaustedError) -> TrainingWarning:
    needed, free = (int(refused.metadata[name]) for name in ("needed_bytes", "free_bytes"))
    return TrainingWarning(
        reason="WAITING_FOR_MEMORY",
        message=(
            f"Its model needs about {in_units(needed)} on {refused.metadata['device']}, {in_units(free)} are free. The "
            "training waits until there is room and then goes on by itself. Unload a model or pause a training to "
            "make room; PauseTraining or CancelTraining end the wait."
        ),
    )
