"""Takes one training to its end: hands it to the model's worker, follows it, and goes on where a worker died."""

import asyncio

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.model_pb2 import Model
from unslothd.v1.training_pb2 import Training
from unslothd_server.app.loaded_model import LoadedModel
from unslothd_server.app.model_workers import ModelWorkers
from unslothd_server.app.models import Models
from unslothd_server.app.ports import Worker
from unslothd_server.app.training_run import TrainingRun
from unslothd_server.app.training_stall import watch_for_stall
from unslothd_server.app.training_state import is_final
from unslothd_server.app.training_store import StopWish
from unslothd_server.app.training_workers import TrainingWorkers
from unslothd_server.app.worker_loss import WorkerLoss
from unslothd_server.errors import AbortedError


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
        self._loss = WorkerLoss(models, workers)
        self._stall_seconds = stall_seconds

    async def drive(self, entry: LoadedModel, run: TrainingRun) -> None:
        """Returns once the training is over or paused; raises nothing but a cancellation, which leaves it running."""
        try:
            await self._drive(entry, run)
        except Exception as error:  # noqa: BLE001 - a bug of ours: those that wait behind must not wait for ever
            await self._loss.give_up(error, entry, run)

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
                    await self._loss.settle(error, entry, run)
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
        await run.tell_worker()
        await self._follow(entry, worker, run)
        run.worker = None
        run.keep()

    async def _follow(self, entry: LoadedModel, worker: Worker, run: TrainingRun) -> None:
        """Takes the events as they come, up to the last one.

        Raises:
            AbortedError: The training has done nothing for too long (WORKER_UNRESPONSIVE), or the worker died.
        """
        stalled = asyncio.create_task(
            watch_for_stall(worker, run, self._stall_seconds), name=f"stall of {run.training_id}"
        )
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
                self._workers.start_from(entry, run.newest_weights())

    def _stopped_before_start(self, run: TrainingRun) -> bool:
        """Carries out a wish while no worker has the training. True when there is nothing left to do."""
        if run.worker is None and run.wish is not StopWish.NONE and not self._may_live(run):
            run.halt()
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
            self._loss.recover_or_end(run, gone, recoverable=True)
        if not run.is_halted and run.wish is not StopWish.NONE:
            run.halt()
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

    async def _leave(self, entry: LoadedModel, run: TrainingRun) -> None:
        """What a training that is over or paused means for its model."""
        if run.is_paused and run.has_begun:
            await self._workers.suspend(entry)
        elif is_final(run.training):
            self._workers.start_from(entry, run.newest_weights())


def _free(entry: LoadedModel) -> None:
    """No training runs on the model any more."""
    entry.model.active_training_id = ""
    if entry.model.state == Model.STATE_TRAINING:
        entry.model.state = Model.STATE_PREPARED
