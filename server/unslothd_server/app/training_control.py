"""Stops trainings and lets them go on: CancelTraining, PauseTraining, ResumeTraining, a forced unload, a shutdown."""

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.service_pb2 import ResumeTrainingRequest
from unslothd.v1.training_pb2 import Training
from unslothd_server.app.model_workers import ModelWorkers
from unslothd_server.app.models import Models
from unslothd_server.app.training_queues import TrainingQueues
from unslothd_server.app.training_run import TrainingRun
from unslothd_server.app.training_state import is_final, state_name
from unslothd_server.app.training_store import StopWish
from unslothd_server.app.trainings import Trainings
from unslothd_server.errors import NotFoundError, PreconditionError, UnslothdError

# A forced unload or a stop waits this long for trainings to reach a step boundary; then the worker is ended anyway.
_STOP_SECONDS = 120.0


class TrainingControl:
    """What may be asked of a training once it was accepted.

    Args:
        trainings: The registry.
        queues: Where trainings wait and run.
        models: The models that they run on.
        workers: The workers of those.
    """

    def __init__(self, trainings: Trainings, queues: TrainingQueues, models: Models, workers: ModelWorkers) -> None:
        self._trainings = trainings
        self._queues = queues
        self._models = models
        self._workers = workers

    async def cancel(self, training_id: str, *, save_checkpoint: bool) -> Training:
        """Asks a training to stop at the next step boundary; a queued or paused one is over at once."""
        run = self._trainings.get(training_id)
        if not is_final(run.training):
            run.ask(StopWish.CANCEL_SAVING if save_checkpoint else StopWish.CANCEL)
            await self._obey(run)
        return self._shown_as(run, Training.STATE_CANCELLING)

    async def pause(self, training_id: str) -> Training:
        """Asks a training to save at the next step boundary and to free its device; a queued one is paused at once."""
        run = self._trainings.get(training_id)
        if is_final(run.training) or run.wish.is_cancel:
            raise PreconditionError(
                ErrorReason.ERROR_REASON_TRAINING_STATE,
                f'Training "{training_id}" is {state_name(run.training)} and cannot be paused; only one that waits or '
                "runs can.",
            )
        if not run.is_paused:
            run.ask(StopWish.PAUSE)
            await self._obey(run)
        return self._shown_as(run, Training.STATE_PAUSING)

    async def _obey(self, run: TrainingRun) -> None:
        """Carries out how a training was asked to stop: now, or by telling whoever has it."""
        if self._queues.is_driven(run):
            with contextlib.suppress(UnslothdError):  # its worker is dead, deaf or going; the driver carries it out
                await run.tell_worker()
            return
        begun = run.has_begun
        run.halt()
        if is_final(run.training) and begun:  # it was paused, and its model is suspended
            with contextlib.suppress(NotFoundError):
                self._workers.start_from(self._models.get(run.training.model_id), run.newest_weights())
        self._queues.drop(run)

    def _shown_as(self, run: TrainingRun, on_the_way: "Training.State.ValueType") -> Training:
        result = self._trainings.describe(run.training_id)
        if not run.is_halted:
            result.state = on_the_way
        return result

    def resume(self, request: ResumeTrainingRequest) -> Training:
        """Goes on with a paused, failed or cancelled training; one that is under way is returned as it is."""
        run = self._trainings.get(request.training_id)
        self._trainings.require_open()
        if run.is_halted or run.wish is not StopWish.NONE:
            _require_resumable(run)
            chosen = run.checkpoint(request.checkpoint_step).step if request.checkpoint_step else 0
            if not run.is_paused:  # one that is may start anew
                run.checkpoint()
            _require_rows(run)
            assert run.stored.model is not None
            # Behind others it waits anyway, and for memory too once it is its turn.
            place = self._queues.place_of(run)
            self._models.found_or_restored(run.stored.model, must_fit=place == 0)
            run.stored.resume_at_most = chosen
            run.requeue(place)
            self._queues.add(run)
        return self._trainings.describe(run.training_id)

    # --- ending ---

    async def stop_all_on(self, model_id: str) -> None:
        """Cancels every training on a model with a checkpoint and waits, bounded, until they are over."""
        pending = self._trainings.pending_on(model_id)
        for run in reversed(pending):
            await self.cancel(run.training_id, save_checkpoint=True)
        await _all_over(pending)

    async def pause_running(self) -> None:
        """Pauses every training that runs, for the next server to go on with, and waits, bounded, until they are.

        One that a user has asked to stop stops as the user asked.
        """
        running = [run for run in self._trainings.all() if self._queues.is_driven(run) and not run.is_halted]
        for run in running:
            if run.wish is StopWish.NONE:
                run.stored.resume_on_start = True
                run.ask(StopWish.PAUSE)
                await self._obey(run)
        await _all_over(running)

    async def close(self, *, leave_running: bool) -> None:
        """Lets go of what still runs, or waits for the drivers of what was stopped."""
        await (self._queues.abandon() if leave_running else self._queues.close())


async def _all_over(runs: Sequence[TrainingRun]) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_STOP_SECONDS):
            await asyncio.gather(*(run.over.wait() for run in runs))


def _require_rows(run: TrainingRun) -> None:
    """Refuses to go on without rows: only a training that is not over keeps an uploaded dataset from being deleted."""
    asked, found = run.training, run.stored.assignment
    for source, path in (
        (asked.train_dataset, found.train_dataset.path),
        (asked.eval_dataset, found.eval_dataset.path),
    ):
        if path and not Path(path).exists():
            where = f'dataset "{source.dataset_id}"' if source.dataset_id else f'"{path}"'
            mend = "Upload the same bytes again" if source.dataset_id else "Bring it back"
            raise NotFoundError(
                ErrorReason.ERROR_REASON_DATASET_NOT_FOUND,
                f'Training "{run.training_id}" reads {where}, which is gone. {mend}, then resume.',
            )


def _require_resumable(run: TrainingRun) -> None:
    if not run.is_halted or run.training.state == Training.STATE_SUCCEEDED or run.stored.model is None:
        raise PreconditionError(
            ErrorReason.ERROR_REASON_TRAINING_STATE,
            f'Training "{run.training_id}" is {state_name(run.training)}; only paused, failed and cancelled '
            "trainings go on. Wait until it has stopped, or train its result on: load "
            f'"training:{run.training_id}".',
        )
