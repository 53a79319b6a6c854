"""What becomes of a training whose worker ended otherwise than by the last event: it goes on with another, or fails."""

import contextlib

import structlog

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.training_event_pb2 import Recovery, TrainingEvent, TrainingFailed
from unslothd_server.app.loaded_model import LoadedModel
from unslothd_server.app.model_workers import ModelWorkers
from unslothd_server.app.models import Models
from unslothd_server.app.training_run import TrainingRun
from unslothd_server.app.worker_exit import WorkerStuckError
from unslothd_server.errors import UnexpectedError, UnslothdError
from unslothd_server.status import to_status

log = structlog.get_logger()

# A training that dies this often without having got further is FAILED.
MAX_RECOVERIES_WITHOUT_PROGRESS = 3
# The worker is gone or deaf: another one may do better. Every other error is the training's own.
_RECOVERABLE = frozenset({ErrorReason.ERROR_REASON_WORKER_DIED, ErrorReason.ERROR_REASON_WORKER_UNRESPONSIVE})


class WorkerLoss:
    """Decides about trainings that lost their worker.

    Args:
        models: The registry of models; once it closes, a training is left to the next server.
        workers: Ends what is left of a worker.
    """

    def __init__(self, models: Models, workers: ModelWorkers) -> None:
        self._models = models
        self._workers = workers

    async def settle(self, error: Exception, entry: LoadedModel, run: TrainingRun) -> None:
        """Decides after an error: the training waits for another worker (RECOVERING), or is over."""
        known = _known(error, run.training_id)
        recoverable = known.reason in _RECOVERABLE
        try:
            if recoverable or await _still_trains(run):
                await self._workers.put_away(entry, at_once=True)  # from here on nobody else writes the log
        except WorkerStuckError as stuck:  # nor does a process that has SIGKILL pending
            known, recoverable = stuck, False
        run.worker = None
        run.catch_up()
        if run.is_halted or self._models.is_closing:
            return
        try:
            if run.wish.is_cancel:
                run.halt()
            else:
                self.recover_or_end(run, known, recoverable=recoverable and not entry.stored.unloading)
        except (UnslothdError, OSError):
            _show_unwritten(known, run)

    async def give_up(self, error: Exception, entry: LoadedModel, run: TrainingRun) -> None:
        """Ends a training, and what is left of its worker, after an error that nothing was made for."""
        known = _known(error, run.training_id)
        with contextlib.suppress(UnslothdError):
            await self._workers.put_away(entry, at_once=True)
        if run.is_halted or self._models.is_closing:
            return
        try:
            run.catch_up()
            self.recover_or_end(run, known, recoverable=False)
        except Exception:  # noqa: BLE001 - watchers and the queue must not wait for ever either
            _show_unwritten(known, run)

    def recover_or_end(self, run: TrainingRun, cause: UnslothdError, *, recoverable: bool) -> None:
        """Writes into the log that a training goes on with a new worker, or that it failed."""
        attempt = run.recoveries.without_progress + 1
        if recoverable and attempt <= MAX_RECOVERIES_WITHOUT_PROGRESS:
            log.warning("a training goes on with a new worker", training_id=run.training_id, attempt=attempt)
            run.append(TrainingEvent(recovery=_recovery(run, cause, attempt)))
        else:
            run.append(_failed(cause))
        run.keep()


async def _still_trains(run: TrainingRun) -> bool:
    """True when the worker may go on with a training that its server gives up."""
    if run.worker is None:
        return False
    try:
        status = await run.worker.status()
    except UnslothdError:
        return True
    return status.training_active and status.training_id == run.training_id


def _show_unwritten(cause: UnslothdError, run: TrainingRun) -> None:
    log.exception("the end of a training could not be written", training_id=run.training_id)
    run.show_unwritten(_failed(cause))


def _failed(cause: UnslothdError) -> TrainingEvent:
    return TrainingEvent(failed=TrainingFailed(error=to_status(cause)))


def _recovery(run: TrainingRun, cause: UnslothdError, attempt: int) -> Recovery:
    checkpoints = run.checkpoints_on_disk()
    return Recovery(
        cause=to_status(cause),
        resume_step=checkpoints[0].step if checkpoints else 0,
        config=run.training.config,
        attempt=attempt,
    )


def _known(error: Exception, training_id: str) -> UnslothdError:
    if isinstance(error, UnslothdError):
        return error
    unexpected = UnexpectedError()
    log.error("unexpected error", training_id=training_id, error_id=unexpected.error_id, exc_info=error)
    return unexpected
