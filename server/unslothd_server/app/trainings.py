"""Trainings: accepted, queued on their model, handed to its worker, watched, and ended."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.model_pb2 import Model
from unslothd.v1.service_pb2 import ListTrainingsRequest, TrainRequest
from unslothd.v1.training_event_pb2 import TrainingCancelled, TrainingEvent, TrainingFailed, TrainingStateChanged
from unslothd.v1.training_pb2 import Training
from unslothd.worker.v1.worker_service_pb2 import StartTrainingRequest
from unslothd_server.app.dataset_sources import StoredRows, resolve_datasets
from unslothd_server.app.event_feed import EventFeed
from unslothd_server.app.idempotency import SeenRequests, content_digest
from unslothd_server.app.models import LoadedModel, Models
from unslothd_server.app.paging import page
from unslothd_server.app.paths import AllowedRoots
from unslothd_server.app.training_config import completed, merged, set_fields
from unslothd_server.app.training_state import apply, is_final, now
from unslothd_server.app.training_store import FINAL, StoredTraining, TrainingStore, without_inline_rows
from unslothd_server.errors import (
    AbortedError,
    ExhaustedError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
    UnexpectedError,
    UnslothdError,
)
from unslothd_server.event_log import EventLogReader, EventLogWriter
from unslothd_server.status import to_status

log = structlog.get_logger()

# A forced unload or a stop waits this long for trainings to reach a step boundary; then the worker is ended anyway.
_STOP_SECONDS = 120.0


@dataclass
class TrainingRun:
    """One training while the server knows it.

    Args:
        stored: What is on disk about it; `training` is kept up to date with the event log.
        feed: Its events for watchers.
        stop_requested: CancelTraining was called.
        save_on_stop: With a checkpoint.
    """

    stored: StoredTraining
    feed: EventFeed
    stop_requested: bool = False
    save_on_stop: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def training(self) -> Training:
        """The training as it is now."""
        return self.stored.training

    @property
    def training_id(self) -> str:
        """Its id."""
        return self.stored.training.training_id


class Trainings:
    """The registry of trainings and their queues, one for each model.

    Args:
        store: Their folders.
        roots: Folders that datasets may be read from.
        stored_rows: Finds uploaded datasets.
        max_queued: Most trainings that wait on one model.
        heartbeat_seconds: Silence after which a watcher gets a heartbeat.
    """

    def __init__(
        self,
        store: TrainingStore,
        roots: AllowedRoots,
        stored_rows: StoredRows,
        *,
        max_queued: int,
        heartbeat_seconds: float,
    ) -> None:
        self._store = store
        self._roots = roots
        self._stored_rows = stored_rows
        self._max_queued = max_queued
        self._heartbeat_seconds = heartbeat_seconds
        self._runs: dict[str, TrainingRun] = {}
        self._queues: dict[str, deque[TrainingRun]] = {}
        self._runners: dict[str, asyncio.Task[None]] = {}
        self._requests = SeenRequests[TrainingRun]()
        self._closing: UnslothdError | None = None

    # --- after a start ---

    def recover(self) -> None:
        """Reads every training from disk. One that was under way when its server ended is FAILED, with its cause."""
        for stored in self._store.load_all():
            training = stored.training
            run = TrainingRun(stored, EventFeed(training, self._store.event_log(training.training_id)))
            self._runs[run.training_id] = run
            self._requests.remember(training.request_id, stored.digest, run)
            for entry in EventLogReader(self._store.event_log(run.training_id)).read():
                apply_once(training, entry.event)
            if is_final(training):
                run.over.set()
            else:
                error = AbortedError(
                    ErrorReason.ERROR_REASON_WORKER_DIED,
                    "The server was restarted while this training ran, and its worker was ended. "
                    "What was saved is in its output folder; start it again with Train.",
                )
                self._append(run, TrainingEvent(failed=TrainingFailed(error=to_status(error))))

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

    def describe(self, training_id: str) -> Training:
        """Returns a training as the API shows it: with the checkpoints that are still on disk."""
        result = Training()
        result.CopyFrom(self.get(training_id).training)
        kept = [each for each in result.checkpoints if Path(each.path).is_dir()]
        del result.checkpoints[:]
        result.checkpoints.extend(kept)
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

    def watch(self, training_id: str, after_sequence: int) -> AsyncIterator[bytes]:
        """Encoded events after a sequence, then as they come, until the terminal one."""
        return self.get(training_id).feed.follow(after_sequence, self._heartbeat_seconds)

    def result_of(self, training_id: str) -> Path:
        """Returns the folder of the final adapter. Raises NotFoundError, or PreconditionError when there is none."""
        training = self.get(training_id).training
        folder = Path(training.output_dir)
        if not is_final(training) or not training.output_dir or not folder.is_dir():
            raise PreconditionError(
                ErrorReason.ERROR_REASON_TRAINING_STATE,
                f'Training "{training_id}" is {state_name(training)} and has no saved adapter to load.',
            )
        return folder

    def pending_on(self, model_id: str) -> Sequence[TrainingRun]:
        """Trainings on a model that are not over, the running one first."""
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

    def accept(self, request: TrainRequest, models: Models) -> TrainingRun:
        """Takes a training on, or returns the one that an equal request began. It goes on without its caller."""
        digest = content_digest(request)
        known = self._requests.find(request.request_id, digest)
        if known is not None:
            return known
        if self._closing is not None:
            raise self._closing
        entry = models.get(request.model_id)
        self._check_model(entry)
        queue = self._queues.setdefault(entry.model_id, deque())
        if len(queue) >= self._max_queued:
            raise ExhaustedError(
                ErrorReason.ERROR_REASON_QUEUE_FULL,
                f'{len(queue)} trainings wait on "{entry.model_id}", the most this server queues. Try again later.',
            )
        run = self._create(request, digest, entry)
        ahead = len(self.pending_on(entry.model_id))
        try:
            self._append(run, _state_changed(Training.STATE_QUEUED, ahead))
        except (UnslothdError, OSError):
            self._store.remove(run.training_id)
            raise
        self._runs[run.training_id] = run
        self._requests.remember(request.request_id, digest, run)
        queue.append(run)
        if entry.model_id not in self._runners:
            task = asyncio.create_task(self._run_queue(entry, queue), name=f"queue of {entry.model_id}")
            self._runners[entry.model_id] = task
        return run

    def _check_model(self, entry: LoadedModel) -> None:
        entry.require_worker()
        if entry.model.state not in {Model.STATE_PREPARED, Model.STATE_TRAINING}:
            raise PreconditionError(
                ErrorReason.ERROR_REASON_MODEL_NOT_PREPARED,
                f'Model "{entry.model_id}" has no trainable parameters yet. Call PrepareForTraining first.',
            )

    def _create(self, request: TrainRequest, digest: str, entry: LoadedModel) -> TrainingRun:
        train, evaluation = resolve_datasets(request, self._roots, self._stored_rows)
        user_config = merged(entry.prepared_config, request.training_config)
        config = completed(user_config, entry.model)
        folder = self._store.free_output_dir(
            config.output_dir, explicit=user_config.HasField("output_dir"), taken=self._reserved_dirs()
        )
        config.output_dir = folder.relative_to(self._store.output_root).as_posix()
        training_id = self._store.new_id()
        training = Training(
            training_id=training_id,
            model_id=entry.model_id,
            model_name=entry.model.model_name,
            state=Training.STATE_QUEUED,
            config=config,
            train_dataset=without_inline_rows(request.train_dataset),
            create_time=now(),
            output_dir=str(folder / FINAL),
            labels=request.labels,
            request_id=request.request_id,
        )
        if evaluation is not None:
            training.eval_dataset.CopyFrom(without_inline_rows(request.eval_dataset))
        assignment = StartTrainingRequest(
            training_id=training_id,
            training_dir=str(self._store.folder_of(training_id)),
            config=config,
            user_set_fields=set_fields(user_config),
            output_dir=str(folder),
        )
        stored = StoredTraining(training, assignment, digest)
        self._store.create(stored, train, evaluation)
        return TrainingRun(stored, EventFeed(training, self._store.event_log(training_id)))

    def _reserved_dirs(self) -> list[str]:
        return [run.stored.assignment.output_dir for run in self._runs.values() if not is_final(run.training)]

    # --- running ---

    async def _run_queue(self, entry: LoadedModel, queue: deque[TrainingRun]) -> None:
        """Runs what waits on a model, in turn. Ends when nothing waits; the next Train starts it anew."""
        try:
            while queue:
                run = queue.popleft()
                if is_final(run.training):  # cancelled while it waited
                    continue
                for place, waiting in enumerate(queue, start=1):
                    if not is_final(waiting.training):
                        self._append(waiting, _state_changed(Training.STATE_QUEUED, place))
                await self._run(entry, run)
        finally:
            self._runners.pop(entry.model_id, None)

    async def _run(self, entry: LoadedModel, run: TrainingRun) -> None:
        """Hands one training to the worker and follows it to its end, whatever that is."""
        async with entry.lock:
            previous = entry.model.state
            entry.model.state = Model.STATE_TRAINING
            entry.model.active_training_id = run.training_id
        try:
            worker = entry.require_worker()
            run.stored.assignment.next_sequence = run.training.last_sequence + 1
            self._store.save(run.stored)
            await worker.start_training(run.stored.assignment)
            if run.stop_requested:
                await worker.cancel(run.training_id, save_checkpoint=run.save_on_stop)
            async for event in worker.watch(run.training_id, run.training.last_sequence):
                self._take(run, event)
            self._store.save(run.stored)
        except Exception as error:  # noqa: BLE001 - whatever it is, the training ends with it and the next one runs
            self._fail(run, entry.failure or _known(error, run.training_id))
        finally:
            if entry.model.state == Model.STATE_TRAINING:
                entry.model.state = previous
            entry.model.active_training_id = ""

    def _take(self, run: TrainingRun, event: TrainingEvent) -> None:
        """The worker wrote this event into the log; show it."""
        if apply_once(run.training, event):
            run.feed.publish(event)
            if is_final(run.training):
                run.over.set()

    def _fail(self, run: TrainingRun, error: UnslothdError) -> None:
        """The training cannot go on: what its worker still wrote counts, then the log gets its end."""
        for entry in EventLogReader(self._store.event_log(run.training_id)).read(run.training.last_sequence):
            self._take(run, entry.event)
        if is_final(run.training):
            return
        event = TrainingEvent(failed=TrainingFailed(error=to_status(self._closing or error)))
        try:
            self._append(run, event)
            self._store.save(run.stored)
        except (UnslothdError, OSError):
            # Its watchers and its model are not kept waiting for a disk; the next start ends the log.
            log.exception("the end of a training could not be written", training=run.training_id)
            self._take(run, event)

    def _append(self, run: TrainingRun, event: TrainingEvent) -> None:
        """Writes an event of the server's own; only while no worker has the training."""
        event.sequence = run.training.last_sequence + 1
        event.training_id = run.training_id
        event.event_time.CopyFrom(now())
        with contextlib.closing(EventLogWriter(self._store.event_log(run.training_id))) as log:
            log.append(event, fsync=True)
        self._take(run, event)

    # --- stopping ---

    async def cancel(self, training_id: str, models: Models, *, save_checkpoint: bool) -> Training:
        """Asks a training to stop at the next step boundary; a queued one is over at once."""
        run = self.get(training_id)
        training = run.training
        if is_final(training):
            return self.describe(training_id)
        run.stop_requested = True
        run.save_on_stop = run.save_on_stop or save_checkpoint
        if training.state == Training.STATE_QUEUED and not self._is_handed_over(run):
            self._queues[training.model_id].remove(run)
            self._append(run, TrainingEvent(cancelled=TrainingCancelled()))
            self._store.save(run.stored)
        else:
            with contextlib.suppress(NotFoundError):  # the model went while we looked; the runner ends the training
                await (
                    models.get(training.model_id).require_worker().cancel(training_id, save_checkpoint=run.save_on_stop)
                )
        result = self.describe(training_id)
        if not is_final(result):
            result.state = Training.STATE_CANCELLING
        return result

    def _is_handed_over(self, run: TrainingRun) -> bool:
        return run not in self._queues.get(run.training.model_id, ())

    async def stop_all_on(self, model_id: str, models: Models) -> None:
        """Cancels every training on a model with a checkpoint and waits, bounded, until they are over."""
        await self._stop(self.pending_on(model_id), models)

    async def stop_running(self, models: Models) -> None:
        """The same for every training that runs; those that wait stay QUEUED."""
        running = [run for run in self._runs.values() if not is_final(run.training) and self._is_handed_over(run)]
        await self._stop(running, models)

    async def _stop(self, pending: Sequence[TrainingRun], models: Models) -> None:
        for run in reversed(pending):
            with contextlib.suppress(UnslothdError):  # its worker is dead, deaf or going; the runner ends the training
                await self.cancel(run.training_id, models, save_checkpoint=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_SECONDS):
                await asyncio.gather(*(run.over.wait() for run in pending))

    def interrupt_watchers(self, error: UnavailableError) -> None:
        """Takes no new training and ends every watch; the trainings themselves go on."""
        self._closing = error
        for run in self._runs.values():
            run.feed.interrupt(error)

    async def close(self) -> None:
        """Waits for the runners; their workers have been ended."""
        await asyncio.gather(*self._runners.values(), return_exceptions=True)


def _known(error: Exception, training_id: str) -> UnslothdError:
    if isinstance(error, UnslothdError):
        return error
    unexpected = UnexpectedError()
    log.error("unexpected error", training=training_id, error_id=unexpected.error_id, exc_info=error)
    return unexpected


def apply_once(training: Training, event: TrainingEvent) -> bool:
    """Applies the next event of a log; False for one that was applied before."""
    if event.sequence <= training.last_sequence:
        return False
    apply(training, event)
    return True


def state_name(training: Training) -> str:
    """The state for people, e.g. "running"."""
    return Training.State.Name(training.state).removeprefix("STATE_").lower()


def _state_changed(state: Training.State.ValueType, queue_position: int = 0) -> TrainingEvent:
    return TrainingEvent(state_changed=TrainingStateChanged(state=state, queue_position=queue_position))


def _has_labels(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    return all(labels.get(key) == value for key, value in wanted.items())
