"""Trainings: accepted, watched, listed; cancelled, paused and resumed; and brought back after a restart."""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import structlog

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.model_pb2 import Model
from unslothd.v1.service_pb2 import ListTrainingsRequest, PlanTrainingRequest, ResumeTrainingRequest, TrainRequest
from unslothd.v1.training_event_pb2 import TrainingEvent, TrainingFailed
from unslothd.v1.training_pb2 import Checkpoint, Training, TrainingPlan
from unslothd.worker.v1 import worker_service_pb2 as worker_pb2
from unslothd_server.app import training_acceptance as acceptance
from unslothd_server.app.dataset_sources import StoredRows
from unslothd_server.app.idempotency import SeenRequests, content_digest
from unslothd_server.app.loaded_model import LoadedModel
from unslothd_server.app.model_store import StoredModel
from unslothd_server.app.model_workers import ModelWorkers
from unslothd_server.app.models import Models
from unslothd_server.app.paging import page
from unslothd_server.app.paths import AllowedRoots
from unslothd_server.app.training_queues import TrainingQueues
from unslothd_server.app.training_run import TrainingRun
from unslothd_server.app.training_state import is_final, state_changed
from unslothd_server.app.training_store import StopWish, TrainingStore
from unslothd_server.errors import (
    AbortedError,
    ExhaustedError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
    UnslothdError,
)
from unslothd_server.status import to_status

log = structlog.get_logger()

# A forced unload or a stop waits this long for trainings to reach a step boundary; then the worker is ended anyway.
_STOP_SECONDS = 120.0
_DEFAULT_PREVIEW_ROWS = 3


class Trainings:
    """The registry of trainings.

    Args:
        store: Their folders.
        models: The models that they run on.
        workers: The workers of those.
        roots: Folders that datasets may be read from.
        stored_rows: Finds uploaded datasets.
        max_queued: Most trainings that wait on one model.
        heartbeat_seconds: Silence after which a watcher gets a heartbeat.
        stall_seconds: A training that does nothing for so long has hung, and gets another worker.
    """

    def __init__(
        self,
        store: TrainingStore,
        models: Models,
        workers: ModelWorkers,
        roots: AllowedRoots,
        stored_rows: StoredRows,
        *,
        max_queued: int,
        heartbeat_seconds: float,
        stall_seconds: float,
    ) -> None:
        self._store = store
        self._models = models
        self._workers = workers
        self._roots = roots
        self._stored_rows = stored_rows
        self._max_queued = max_queued
        self._heartbeat_seconds = heartbeat_seconds
        self._runs: dict[str, TrainingRun] = {}
        self._queues = TrainingQueues(models, workers, stall_seconds=stall_seconds)
        self._requests = SeenRequests[TrainingRun]()
        self._closing: UnslothdError | None = None

    # --- after a start ---

    def read_all(self) -> None:
        """Reads every training from disk; nothing begins yet."""
        for stored in self._store.load_all():
            run = TrainingRun.of(stored, self._store)
            self._runs[run.training_id] = run
            self._requests.remember(run.training.request_id, stored.digest, run)

    async def go_on(self) -> None:
        """Goes on with every training that was not over when the last server ended. The models are known by now."""
        pending: list[TrainingRun] = []
        for run in [each for each in self._runs.values() if not is_final(each.training)]:
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
            self._bring_back(run)
        if run.is_paused and not run.has_begun:
            return False
        entry = self._models.found_or_restored(run.stored.model)
        if run.is_paused and entry.worker is not None:  # the server ended between the pause and the end of the worker
            await self._workers.suspend(entry)
        return True

    # --- reading ---

    def get(self, training_id: str) -> TrainingRun:
        """Returns a training. Raises NotFoundError (TRAINING_NOT_FOUND)."""
        try:
            return self._runs[training_id]
        except KeyError:
            raise NotFoundError(
                ErrorReason.ERROR_REASON_TRAINING_NOT_FOUND,
                f'No training "{training_id}" is known. ListTrainings shows all.',
            ) from None

    def all(self) -> Sequence[TrainingRun]:
        """Every training, those that are over too."""
        return list(self._runs.values())

    def describe(self, training_id: str) -> Training:
        """Returns a training as the API shows it: with the checkpoints that are still on disk, the best one named."""
        run = self.get(training_id)
        result = Training()
        result.CopyFrom(run.training)
        del result.checkpoints[:]
        result.checkpoints.extend(reversed(run.checkpoints_on_disk()))
        measured = [each for each in result.checkpoints if each.HasField("eval_loss") and math.isfinite(each.eval_loss)]
        if measured:
            result.best_checkpoint.CopyFrom(min(measured, key=lambda each: each.eval_loss))
        return result

    def list_page(self, request: ListTrainingsRequest) -> tuple[list[Training], str]:
        """Returns a page of trainings, newest first, and the token of the next page."""
        ids = [
            run.training_id
            for run in self._runs.values()
            if (not request.model_id or run.training.model_id == request.model_id)
            and (not request.states or run.training.state in request.states)
            and _has_labels(run.training.labels, request.labels)
        ]
        chosen, token = page(sorted(ids, reverse=True), request.page_size, request.page_token)
        return [self.describe(training_id) for training_id in chosen], token

    def watch(self, training_id: str, after_sequence: int, max_events: int = 1) -> AsyncIterator[bytes]:
        """Encoded responses with the events after a sequence, then as they come, until the training is over."""
        return self.get(training_id).feed.follow(after_sequence, self._heartbeat_seconds, max_events)

    def result_of(self, training_id: str, step: int = 0) -> Path:
        """Returns the folder of the final adapter (step 0), or of the checkpoint of a step.

        Raises:
            NotFoundError: No such training, or no such checkpoint.
            PreconditionError: There is no saved adapter (TRAINING_STATE).
        """
        run = self.get(training_id)
        if step:
            return Path(_checkpoint(run, step).path)
        folder = Path(run.training.output_dir)
        if not is_final(run.training) or not run.training.output_dir or not folder.is_dir():
            raise PreconditionError(
                ErrorReason.ERROR_REASON_TRAINING_STATE,
                f'Training "{training_id}" is {state_name(run.training)} and has no final adapter. Wait for its end, '
                "or name one of its checkpoints by step.",
            )
        return folder

    def newest_result(self, model: StoredModel) -> Path | None:
        """Folder of what the last training on a loaded model taught it; None when none was over since it was loaded."""
        since = model.model.load_time.ToNanoseconds()
        over = [
            run
            for run in self._runs.values()
            if is_final(run.training)
            and run.training.model_id == model.model.model_id
            and run.training.create_time.ToNanoseconds() >= since
            and run.stored.model is not None
            and run.stored.model.same_making(model)
        ]
        latest_first = sorted(over, key=lambda run: run.training.end_time.ToNanoseconds(), reverse=True)
        return next((folder for run in latest_first if (folder := run.newest_weights()) is not None), None)

    def pending_on(self, model_id: str) -> Sequence[TrainingRun]:
        """Trainings on a model that are not over."""
        return [run for run in self._runs.values() if run.training.model_id == model_id and not is_final(run.training)]

    def users_of_dataset(self, dataset_id: str) -> list[str]:
        """Ids of the trainings that are not over and read an uploaded dataset."""
        return [
            run.training_id
            for run in self._runs.values()
            if not is_final(run.training)
            and dataset_id in {run.training.train_dataset.dataset_id, run.training.eval_dataset.dataset_id}
        ]

    # --- accepting ---

    def accept(self, request: TrainRequest) -> TrainingRun:
        """Takes a training on, or returns the one that an equal request began. It goes on without its caller."""
        digest = content_digest(request)
        known = self._requests.find(request.request_id, digest)
        if known is not None:
            return known
        if self._closing is not None:
            raise self._closing
        entry = self._prepared(request.model_id)
        waiting = self._queues.length(entry.model_id) - 1
        if waiting >= self._max_queued:
            raise ExhaustedError(
                ErrorReason.ERROR_REASON_QUEUE_FULL,
                f'{waiting} trainings wait on "{entry.model_id}", the most this server queues. Try again later.',
            )
        draft = acceptance.draft(request, entry, self._store, self._roots, self._stored_rows, self._reserved_dirs())
        stored = self._store.create(draft, digest)
        run = TrainingRun.of(stored, self._store)
        try:
            run.append(state_changed(Training.STATE_QUEUED, self._queues.place_of(run)))
        except (UnslothdError, OSError):
            self._store.remove(run.training_id)
            raise
        self._runs[run.training_id] = run
        self._requests.remember(request.request_id, digest, run)
        self._queues.add(run)
        return run

    def _prepared(self, model_id: str) -> LoadedModel:
        """Returns a model that trainings may be accepted for, although its worker may have to be started first."""
        entry = self._models.get(model_id)
        is_kept = entry.model.active_training_id or entry.model.state == Model.STATE_SUSPENDED or entry.bringing_up
        if not (entry.stored.prepare is not None and is_kept):
            entry.require_worker()
        if entry.stored.prepare is None:
            raise PreconditionError(
                ErrorReason.ERROR_REASON_MODEL_NOT_PREPARED,
                f'Model "{entry.model_id}" has no trainable parameters yet. Call PrepareForTraining first.',
            )
        return entry

    def _reserved_dirs(self) -> list[str]:
        return [run.stored.assignment.output_dir for run in self._runs.values() if not is_final(run.training)]

    # --- planning ---

    async def plan(self, request: PlanTrainingRequest) -> TrainingPlan:
        """Works out what `accept` would begin."""
        entry = self._prepared(request.model_id)
        worker = entry.idle_worker("plan")
        as_train = TrainRequest(
            model_id=request.model_id,
            train_dataset=request.train_dataset,
            eval_dataset=request.eval_dataset if request.HasField("eval_dataset") else None,
            training_config=request.training_config,
        )
        draft = acceptance.draft(as_train, entry, self._store, self._roots, self._stored_rows, self._reserved_dirs())
        with self._store.scratch(draft) as assignment:
            ask = worker_pb2.PlanTrainingRequest(
                training=assignment,
                measure=request.measure,
                preview_rows=request.preview_rows or _DEFAULT_PREVIEW_ROWS,
            )
            try:
                return await worker.plan(ask)
            except NotFoundError:
                # A dataset that was deleted while the worker read it is told by its id, not by where it was.
                for source in (request.train_dataset, request.eval_dataset):
                    if source.dataset_id:
                        self._stored_rows(source.dataset_id)
                raise

    # --- stopping and going on ---

    async def cancel(self, training_id: str, *, save_checkpoint: bool) -> Training:
        """Asks a training to stop at the next step boundary; a queued or paused one is over at once."""
        run = self.get(training_id)
        if not is_final(run.training):
            run.ask(StopWish.CANCEL_SAVING if save_checkpoint else StopWish.CANCEL)
            await self._obey(run)
        return self._shown_as(run, Training.STATE_CANCELLING)

    async def pause(self, training_id: str) -> Training:
        """Asks a training to save at the next step boundary and to free its device; a queued one is paused at once."""
        run = self.get(training_id)
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
        result = self.describe(run.training_id)
        if not run.is_halted:
            result.state = on_the_way
        return result

    def resume(self, request: ResumeTrainingRequest) -> Training:
        """Goes on with a paused, failed or cancelled training; one that is under way is returned as it is."""
        run = self.get(request.training_id)
        if self._closing is not None:
            raise self._closing
        if run.is_halted or run.wish is not StopWish.NONE:
            self._require_resumable(run)
            chosen = _checkpoint(run, request.checkpoint_step).step if request.checkpoint_step else 0
            if not run.is_paused and not run.checkpoints_on_disk():
                raise _no_checkpoint(run)
            _require_rows(run)
            assert run.stored.model is not None
            # Behind others it waits anyway, and for memory too once it is its turn.
            self._models.found_or_restored(run.stored.model, must_fit=self._queues.place_of(run) == 0)
            run.stored.resume_at_most = chosen
            self._bring_back(run)
            self._queues.add(run)
        return self.describe(run.training_id)

    def _require_resumable(self, run: TrainingRun) -> None:
        if not run.is_halted or run.training.state == Training.STATE_SUCCEEDED or run.stored.model is None:
            raise PreconditionError(
                ErrorReason.ERROR_REASON_TRAINING_STATE,
                f'Training "{run.training_id}" is {state_name(run.training)}; only paused, failed and cancelled '
                "trainings go on. Wait until it has stopped, or train its result on: load "
                f'"training:{run.training_id}".',
            )

    def _bring_back(self, run: TrainingRun) -> None:
        run.stored.wish = StopWish.NONE
        run.save()  # first: a wish that a restart finds beside QUEUED would be carried out
        run.append(state_changed(Training.STATE_QUEUED, self._queues.place_of(run)))

    # --- ending ---

    async def stop_all_on(self, model_id: str) -> None:
        """Cancels every training on a model with a checkpoint and waits, bounded, until they are over."""
        pending = self.pending_on(model_id)
        for run in reversed(pending):
            await self.cancel(run.training_id, save_checkpoint=True)
        await _all_over(pending)

    async def pause_running(self) -> None:
        """Pauses every training that runs, for the next server to go on with, and waits, bounded, until they are.

        One that a user has asked to stop stops as the user asked.
        """
        running = [run for run in self._runs.values() if self._queues.is_driven(run) and not run.is_halted]
        for run in running:
            if run.wish is StopWish.NONE:
                run.stored.resume_on_start = True
                run.ask(StopWish.PAUSE)
                await self._obey(run)
        await _all_over(running)

    def interrupt_watchers(self, error: UnavailableError) -> None:
        """Takes no new training and ends every watch; the trainings themselves go on."""
        self._closing = error
        for run in self._runs.values():
            run.feed.interrupt(error)

    async def close(self, *, leave_running: bool) -> None:
        """Lets go of what still runs, or waits for the drivers of what was stopped."""
        await (self._queues.abandon() if leave_running else self._queues.close())


async def _all_over(runs: Sequence[TrainingRun]) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_STOP_SECONDS):
            await asyncio.gather(*(run.over.wait() for run in runs))


def _checkpoint(run: TrainingRun, step: int) -> Checkpoint:
    for checkpoint in run.checkpoints_on_disk():
        if checkpoint.step == step:
            return checkpoint
    raise _no_checkpoint(run, step)


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


def _no_checkpoint(run: TrainingRun, step: int = 0) -> NotFoundError:
    there = ", ".join(str(each.step) for each in reversed(run.checkpoints_on_disk()))
    which = f"of step {step}" if step else "to go on from"
    hint = f"There are those of the steps {there}." if there else "Start it again with Train."
    return NotFoundError(
        ErrorReason.ERROR_REASON_CHECKPOINT_NOT_FOUND,
        f'Training "{run.training_id}" has no checkpoint {which} on disk. {hint}',
    )


def state_name(training: Training) -> str:
    """The state for people, e.g. "running"."""
    return Training.State.Name(training.state).removeprefix("STATE_").lower()


def _has_labels(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    return all(labels.get(key) == value for key, value in wanted.items())
