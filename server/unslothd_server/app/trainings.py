"""The trainings that the server knows, and what callers are shown of them."""

import math
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.service_pb2 import ListTrainingsRequest
from unslothd.v1.training_pb2 import Training
from unslothd_server.app.idempotency import SeenRequests
from unslothd_server.app.model_store import StoredModel
from unslothd_server.app.paging import page
from unslothd_server.app.training_run import TrainingRun
from unslothd_server.app.training_state import is_final, state_changed, state_name
from unslothd_server.app.training_store import TrainingDraft, TrainingStore
from unslothd_server.errors import NotFoundError, PreconditionError, UnavailableError, UnslothdError


class Trainings:
    """The registry of trainings.

    Args:
        store: Their folders.
        heartbeat_seconds: Silence after which a watcher gets a heartbeat.
    """

    def __init__(self, store: TrainingStore, *, heartbeat_seconds: float) -> None:
        self._store = store
        self._heartbeat_seconds = heartbeat_seconds
        self._runs: dict[str, TrainingRun] = {}
        self._requests = SeenRequests[TrainingRun]()
        self._closing: UnavailableError | None = None

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
            return Path(run.checkpoint(step).path)
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

    def pending(self) -> Sequence[TrainingRun]:
        """Trainings that are not over."""
        return [run for run in self._runs.values() if not is_final(run.training)]

    def pending_on(self, model_id: str) -> Sequence[TrainingRun]:
        """Trainings on a model that are not over."""
        return [run for run in self.pending() if run.training.model_id == model_id]

    def users_of_dataset(self, dataset_id: str) -> list[str]:
        """Ids of the trainings that are not over and read an uploaded dataset."""
        return [
            run.training_id
            for run in self.pending()
            if dataset_id in {run.training.train_dataset.dataset_id, run.training.eval_dataset.dataset_id}
        ]

    # --- coming ---

    def read_all(self) -> None:
        """Reads every training from disk; nothing begins yet."""
        for stored in self._store.load_all():
            self._enter(TrainingRun.of(stored, self._store), stored.digest)

    def asked_for(self, request_id: str, digest: str) -> TrainingRun | None:
        """Returns the training that an equal request began. Raises AlreadyExistsError (REQUEST_ID_REUSED)."""
        return self._requests.find(request_id, digest)

    def require_open(self) -> None:
        """Raises UnavailableError (SERVER_STOPPING) once the server stops."""
        if self._closing is not None:
            raise self._closing

    def add(self, draft: TrainingDraft, digest: str, queue_position: int) -> TrainingRun:
        """Makes the folder and the first event of a new training.

        Raises:
            UnslothdError: The disk takes no more (DISK_FULL, NOT_WRITABLE); nothing is left of it.
        """
        run = TrainingRun.of(self._store.create(draft, digest), self._store)
        try:
            run.append(state_changed(Training.STATE_QUEUED, queue_position))
        except (UnslothdError, OSError):
            self._store.remove(run.training_id)
            raise
        self._enter(run, digest)
        return run

    def _enter(self, run: TrainingRun, digest: str) -> None:
        self._runs[run.training_id] = run
        self._requests.remember(run.training.request_id, digest, run)

    # --- ending ---

    def interrupt_watchers(self, error: UnavailableError) -> None:
        """Takes no new training and ends every watch; the trainings themselves go on."""
        self._closing = error
        for run in self._runs.values():
            run.feed.interrupt(error)


def _has_labels(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    return all(labels.get(key) == value for key, value in wanted.items())
