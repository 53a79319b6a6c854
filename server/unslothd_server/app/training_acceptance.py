"""From a request to a training, or to the plan of one: the config completed, datasets found, a folder chosen."""

from pathlib import Path

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.model_pb2 import Model
from unslothd.v1.service_pb2 import PlanTrainingRequest, TrainRequest
from unslothd.v1.training_pb2 import Training, TrainingPlan
from unslothd.worker.v1 import worker_service_pb2 as worker_pb2
from unslothd_server.app.dataset_sources import StoredRows, resolve_datasets
from unslothd_server.app.idempotency import content_digest
from unslothd_server.app.loaded_model import LoadedModel
from unslothd_server.app.models import Models
from unslothd_server.app.paths import AllowedRoots
from unslothd_server.app.training_config import completed, merged, set_fields
from unslothd_server.app.training_queues import TrainingQueues
from unslothd_server.app.training_run import TrainingRun
from unslothd_server.app.training_state import now
from unslothd_server.app.training_store import FINAL, TrainingDraft, TrainingStore, without_inline_rows
from unslothd_server.app.trainings import Trainings
from unslothd_server.errors import ExhaustedError, NotFoundError, PreconditionError

_DEFAULT_PREVIEW_ROWS = 3


class TrainingAcceptance:
    """Takes trainings on, and works out what they would be.

    Args:
        trainings: The registry.
        queues: Where an accepted training waits.
        models: The models that trainings run on.
        store: Where ids and folders come from.
        roots: Folders that datasets may be read from.
        stored_rows: Finds uploaded datasets.
        max_queued: Most trainings that wait on one model.
    """

    def __init__(
        self,
        trainings: Trainings,
        queues: TrainingQueues,
        models: Models,
        store: TrainingStore,
        roots: AllowedRoots,
        stored_rows: StoredRows,
        *,
        max_queued: int,
    ) -> None:
        self._trainings = trainings
        self._queues = queues
        self._models = models
        self._store = store
        self._roots = roots
        self._stored_rows = stored_rows
        self._max_queued = max_queued

    def accept(self, request: TrainRequest) -> TrainingRun:
        """Takes a training on, or returns the one that an equal request began. It goes on without its caller."""
        digest = content_digest(request)
        known = self._trainings.asked_for(request.request_id, digest)
        if known is not None:
            return known
        self._trainings.require_open()
        entry = self._prepared(request.model_id)
        waiting = self._queues.length(entry.model_id) - 1
        if waiting >= self._max_queued:
            raise ExhaustedError(
                ErrorReason.ERROR_REASON_QUEUE_FULL,
                f'{waiting} trainings wait on "{entry.model_id}", the most this server queues. Try again later.',
            )
        draft = self._draft(request, entry)
        run = self._trainings.add(draft, digest, queue_position=self._queues.length(entry.model_id))
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
        draft = self._draft(as_train, entry)
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

    def _draft(self, request: TrainRequest, entry: LoadedModel) -> TrainingDraft:
        """Works out what a request means; nothing is written.

        Raises:
            UnslothdError: DATASET_NOT_FOUND, PATH_NOT_ALLOWED, INVALID_FIELD, OUTPUT_DIR_TAKEN.
        """
        train, evaluation = resolve_datasets(request, self._roots, self._stored_rows)
        user_config = merged(entry.prepared_config, request.training_config)
        config = completed(user_config, entry.model)
        folder = self._free_folder(config.output_dir, explicit=user_config.HasField("output_dir"))
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
        assignment = worker_pb2.StartTrainingRequest(
            training_id=training_id,
            training_dir=str(self._store.folder_of(training_id)),
            config=config,
            user_set_fields=set_fields(user_config),
            output_dir=str(folder),
        )
        return TrainingDraft(training, assignment, train, evaluation, entry.stored.copy())

    def _free_folder(self, output_dir: str, *, explicit: bool) -> Path:
        # Trainings that are not over may not have written into theirs yet.
        reserved = [run.stored.assignment.output_dir for run in self._trainings.pending()]
        return self._store.free_output_dir(output_dir, explicit=explicit, taken=reserved)
