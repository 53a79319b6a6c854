"""Brings the trainings of an earlier server back."""

import structlog

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.training_event_pb2 import TrainingEvent, TrainingFailed
from unslothd.v1.training_pb2 import Training
from unslothd_server.app.model_workers import ModelWorkers
from unslothd_server.app.models import Models
from unslothd_server.app.training_queues import TrainingQueues
from unslothd_server.app.training_run import TrainingRun
from unslothd_server.app.training_state import state_changed
from unslothd_server.app.trainings import Trainings
from unslothd_server.errors import AbortedError, UnslothdError
from unslothd_server.status import to_status

log = structlog.get_logger()


class TrainingRecovery:
    """Lets every training that was not over go on, in the order of then.

    Args:
        trainings: The registry; it has read them all.
        queues: Where they wait and run, still empty.
        models: The models that they run on, known by now.
        workers: The workers of those.
    """

    def __init__(self, trainings: Trainings, queues: TrainingQueues, models: Models, workers: ModelWorkers) -> None:
        self._trainings = trainings
        self._queues = queues
        self._models = models
        self._workers = workers

    async def recover(self) -> None:
        """Queues what goes on. One that cannot is FAILED, and the log of the server says why."""
        pending: list[TrainingRun] = []
        for run in self._trainings.pending():
            try:
                if await self._takes_up(run):
                    pending.append(run)
            except UnslothdError as error:
                log.warning("a training cannot go on", training_id=run.training_id, error=error.message)
                run.append(TrainingEvent(failed=TrainingFailed(error=to_status(error))))
        self._queues.restore(pending)

    async def _takes_up(self, run: TrainingRun) -> bool:
        """Decides what a training of an earlier server does now; True when it belongs into a queue."""
        if run.stored.model is None:
            raise AbortedError(
                ErrorReason.ERROR_REASON_WORKER_DIED,
                "An older version of the server accepted this training, and it was not over. Start it anew with Train.",
            )
        if not run.training.last_sequence:  # the server ended before it could answer
            run.append(state_changed(Training.STATE_QUEUED))
        if run.is_paused and run.stored.resume_on_start:
            run.stored.resume_on_start = False
            run.requeue(self._queues.place_of(run))
        if run.is_paused and not run.has_begun:
            return False
        entry = self._models.found_or_restored(run.stored.model)
        if run.is_paused and entry.worker is not None:  # the server ended between the pause and the end of the worker
            await self._workers.suspend(entry)
        return True
