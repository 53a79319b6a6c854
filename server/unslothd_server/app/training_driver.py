"""Takes one training to its end: hands it to the model's worker, follows it, and goes on where a worker died."""

import asyncio
import contextlib

import structlog

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.model_pb2 import Model
from unslothd.v1.training_event_pb2 import (
    Recovery,
    TrainingCancelled,
    TrainingEvent,
    TrainingFailed,
    TrainingStateChanged,
)
from unslothd.v1.training_pb2 import Training
from unslothd_server.app.loaded_model import LoadedModel
from unslothd_server.app.model_workers import ModelWorkers
from unslothd_server.app.models import Models
from unslothd_server.app.ports import Worker
from unslothd_server.app.training_run import TrainingRun
from unslothd_server.app.training_state import is_final
from unslothd_server.app.training_store import StopWish
from unslothd_server.app.training_workers import TrainingWorkers
from unslothd_server.app.worker_exit import WorkerStuckError
from unslothd_server.errors import AbortedError, UnexpectedError, UnslothdError
from unslothd_server.status import to_status

log = structlog.get_logger()

# A training that dies this often without having got further is FAILED.
MAX_RECOVERIES_WITHOUT_PROGRESS = 3
_LOOKS_A_STALL = 4  # so that a hang is noticed after at most a quarter more
# The worker is gone or deaf: another one may do better. Every other error is the training's own.
_RECOVERABLE = frozenset({ErrorReason.ERROR_REASON_WORKER_DIED, ErrorReason.ERROR_REASON_WORKER_UNRESPONSIVE})


class TrainingDriver:
    """Drives trainings, one call each.

    Args:
        models: The registry of models.
        workers: Their workers.
        stall_seconds: A training that does nothing for so long has hung.
    """

    def __init__(self, models: Models, workers: ModelWorkers, *, stall_seconds: float) -> None:
        self._models = models
        self._workers = workers
        self._training_workers = TrainingWorkers(models, workers)
        self._stall_seconds = stall_seconds

    async def drive(self, entry: LoadedModel, run: TrainingRun) -> None:
        """Returns once the training is over or paused; raises nothing but a cancellation, which leaves it running."""
        try:
            await self._drive(entry, run)
        except Exception as error:  # noqa: BLE001 - a bug of ours: those that wait behind must not wait for ever
            await self._give_up(error, entry, run)

    async def _drive(self, entry: LoadedModel, run: TrainingRun) -> None:
        async with entry.lock:
            entry.model.active_training_id = run.training_id
            if entry.model.state == Model.STATE_PREPARED:
                entry.model.state = Model.STATE_TRAINING
        try:
            while not run.is_halted and not self._models.is_closing:
                try:
                    await self._attempt(entry, run)
                except Exception as error:  # noqa: BLE001 - whatever it is, the training ends with it or goes on
                    await self._after(error, entry, run)
        finally:
            run.worker = None
            _free(entry)
        await self._leave(entry, run)

    async def _attempt(self, entry: LoadedModel, run: TrainingRun) -> None:
        """One worker's part of a training."""
        if self._stopped_before_start(run):
            return
        if entry.worker is None and self._is_beyond_help(run):
            return
        worker = await self._training_workers.brought_up(entry, run)
        if worker is None or self._stopped_before_start(run):  # while the worker was started
            return
        entry.model.state = Model.STATE_TRAINING
        if not await self._has(worker, run):
            if self._is_beyond_help(run):
                return
            self._assign(run)
            await worker.start_training(run.stored.assignment)
        run.worker = worker
        await tell(run)
        await self._follow(entry, worker, run)
        run.worker = None
        run.keep()

    async def _follow(self, entry: LoadedModel, worker: Worker, run: TrainingRun) -> None:
        """Takes the events as they come, up to the last one.

        Raises:
            AbortedError: The training has done nothing for too long (WORKER_UNRESPONSIVE), or the worker died.
        """
        stalled = asyncio.create_task(self._stall(worker, run), name=f"stall of {run.training_id}")
        following = asyncio.create_task(self._take_events(entry, worker, run), name=f"events of {run.training_id}")
        try:
            await asyncio.wait([stalled, following], return_when=asyncio.FIRST_COMPLETED)
            await (following if following.done() else stalled)
        finally:
            for task in (stalled, following):
                task.cancel()
            await asyncio.gather(stalled, following, return_exceptions=True)

    async def _take_events(self, entry: LoadedModel, worker: Worker, run: TrainingRun) -> None:
        async for event in worker.watch(run.training_id, run.training.last_sequence):
            run.take(event)
            if is_final(run.training):
                # Before a watcher gets to see the end: whoever does finds the model ready, with what it learnt.
                _free(entry)
                remember_weights(self._workers, entry, run)

    async def _stall(self, worker: Worker, run: TrainingRun) -> None:
        """Raises once the training has done nothing, and its worker has told nothing else, for too long."""
        loop = asyncio.get_running_loop()
        heard = loop.time()
        while True:
            await asyncio.sleep(self._stall_seconds / _LOOKS_A_STALL)
            with contextlib.suppress(UnslothdError):  # a worker that does not answer may be deep in a kernel
                status = await worker.status()
                heard = loop.time() - (status.seconds_since_progress if status.training_active else 0.0)
            if loop.time() - heard > self._stall_seconds:
                raise AbortedError(
                    ErrorReason.ERROR_REASON_WORKER_UNRESPONSIVE,
                    f"The training did nothing for {self._stall_seconds:g} s after step {run.training.step}, so its "
                    "worker was ended. If a step or an evaluation batch really takes that long, raise the server's "
                    "--stall-seconds.",
                    metadata={"model_id": worker.model_id},
                )

    def _stopped_before_start(self, run: TrainingRun) -> bool:
        """Carries out a wish while no worker has the training. True when there is nothing left to do."""
        if run.worker is None and run.wish is not StopWish.NONE and not self._may_live(run):
            halt(run)
        return run.is_halted

    def _may_live(self, run: TrainingRun) -> bool:
        """True when a worker of an earlier server may still have the training, and write its log."""
        return run.training.state in {Training.STATE_RUNNING, Training.STATE_PAUSING}

    async def _has(self, worker: Worker, run: TrainingRun) -> bool:
        """True when the worker has this training already: an earlier server handed it over."""
        if not run.has_begun:
            return False
        status = await worker.status()
        return status.training_active and status.training_id == run.training_id

    def _is_beyond_help(self, run: TrainingRun) -> bool:
        """Looks at what a worker left that an earlier server had started. True when nothing is left to do."""
        run.catch_up()
        if not run.is_halted and self._may_live(run):
            gone = AbortedError(
                ErrorReason.ERROR_REASON_WORKER_DIED,
                "The worker that had this training was gone when the server started. Its log is in <home>/logs.",
            )
            self._recover_or_end(run, gone, recoverable=True)
        if not run.is_halted and run.wish is not StopWish.NONE:
            halt(run)
        return run.is_halted

    def _assign(self, run: TrainingRun) -> None:
        """Completes what the worker is told by where the training stands."""
        assignment = run.stored.assignment
        newest = run.stored.resume_at_most or run.training.total_steps or 2**31
        folders = [each.path for each in run.checkpoints_on_disk() if each.step <= newest]
        assignment.next_sequence = run.training.last_sequence + 1
        assignment.resume_from_checkpoint = folders[0] if folders else ""
        del assignment.fallback_checkpoints[:]
        assignment.fallback_checkpoints.extend(folders[1:])
        run.keep()  # it is worked out anew at every hand-over

    async def _after(self, error: Exception, entry: LoadedModel, run: TrainingRun) -> None:
        """Decides what becomes of a training whose worker ended otherwise than by its last event."""
        known = _known(error, run.training_id)
        recoverable = known.reason in _RECOVERABLE
        try:
            if recoverable or await self._still_trains(run):
                await self._workers.put_away(entry)  # from here on nobody else writes the log
        except WorkerStuckError as stuck:  # nor does a process that has SIGKILL pending
            known, recoverable = stuck, False
        run.worker = None
        run.catch_up()
        if run.is_halted or self._models.is_closing:
            return
        try:
            if run.wish.is_cancel:
                halt(run)
            else:
                self._recover_or_end(run, known, recoverable=recoverable and not entry.stored.unloading)
        except (UnslothdError, OSError):
            _show_unwritten(known, run)

    async def _give_up(self, error: Exception, entry: LoadedModel, run: TrainingRun) -> None:
        """Ends a training, and what is left of its worker, after an error that nothing was made for."""
        known = _known(error, run.training_id)
        with contextlib.suppress(UnslothdError):
            await self._workers.put_away(entry)
        if run.is_halted or self._models.is_closing:
            return
        try:
            run.catch_up()
            self._recover_or_end(run, known, recoverable=False)
        except Exception:  # noqa: BLE001 - the same
            _show_unwritten(known, run)

    async def _still_trains(self, run: TrainingRun) -> bool:
        """True when the worker may go on with a training that its server gives up."""
        if run.worker is None:
            return False
        try:
            status = await run.worker.status()
        except UnslothdError:
            return True
        return status.training_active and status.training_id == run.training_id

    def _recover_or_end(self, run: TrainingRun, cause: UnslothdError, *, recoverable: bool) -> None:
        attempt = run.recoveries.without_progress + 1
        if recoverable and attempt <= MAX_RECOVERIES_WITHOUT_PROGRESS:
            log.warning("a training goes on with a new worker", training_id=run.training_id, attempt=attempt)
            run.append(TrainingEvent(recovery=_recovery(run, cause, attempt)))
        else:
            run.append(TrainingEvent(failed=TrainingFailed(error=to_status(cause))))
        run.keep()

    async def _leave(self, entry: LoadedModel, run: TrainingRun) -> None:
        """What a training that is over or paused means for its model."""
        if run.is_paused and run.has_begun:
            await self._workers.suspend(entry)
        elif is_final(run.training):
            remember_weights(self._workers, entry, run)


def _show_unwritten(cause: UnslothdError, run: TrainingRun) -> None:
    log.exception("the end of a training could not be written", training_id=run.training_id)
    run.show_unwritten(TrainingEvent(failed=TrainingFailed(error=to_status(cause))))


def _free(entry: LoadedModel) -> None:
    """No training runs on the model any more."""
    entry.model.active_training_id = ""
    if entry.model.state == Model.STATE_TRAINING:
        entry.model.state = Model.STATE_PREPARED


def remember_weights(workers: ModelWorkers, entry: LoadedModel, run: TrainingRun) -> None:
    """The model keeps what a training taught it, also when its worker has to be started anew."""
    folder = run.newest_weights()
    if folder is not None:
        workers.start_from(entry, folder)


def halt(run: TrainingRun) -> None:
    """Ends or pauses, as it was asked, a training that no worker has."""
    if run.wish.is_cancel:
        run.append(TrainingEvent(cancelled=TrainingCancelled(step=run.training.step)))
    else:
        run.append(state_changed(Training.STATE_PAUSED))
    run.keep()


async def tell(run: TrainingRun) -> None:
    """Tells the worker that has the training how it is to stop, if it is. Repeatable."""
    if run.worker is None or run.wish is StopWish.NONE:
        return
    if run.wish is StopWish.PAUSE:
        await run.worker.pause(run.training_id)
    else:
        await run.worker.cancel(run.training_id, save_checkpoint=run.wish is StopWish.CANCEL_SAVING)


def state_changed(state: "Training.State.ValueType", queue_position: int = 0) -> TrainingEvent:
    """Returns the event of a new state or place."""
    return TrainingEvent(state_changed=TrainingStateChanged(state=state, queue_position=queue_position))


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
