"""From a request to what a worker is told: config completed, datasets found, a folder for the results chosen."""

from collections.abc import Iterable

from unslothd.v1.service_pb2 import TrainRequest
from unslothd.v1.training_pb2 import Training
from unslothd.worker.v1.worker_service_pb2 import StartTrainingRequest
from unslothd_server.app.dataset_sources import StoredRows, resolve_datasets
from unslothd_server.app.loaded_model import LoadedModel
from unslothd_server.app.paths import AllowedRoots
from unslothd_server.app.training_config import completed, merged, set_fields
from unslothd_server.app.training_state import now
from unslothd_server.app.training_store import FINAL, TrainingDraft, TrainingStore, without_inline_rows


def draft(
    request: TrainRequest,
    entry: LoadedModel,
    store: TrainingStore,
    roots: AllowedRoots,
    stored_rows: StoredRows,
    reserved_dirs: Iterable[str],
) -> TrainingDraft:
    """Works out what a request means; nothing is written.

    Args:
        request: Checked against the contract.
        entry: The prepared model.
        store: Where ids and folders come from.
        roots: Folders that datasets may be read from.
        stored_rows: Finds uploaded datasets.
        reserved_dirs: Absolute output folders of trainings that have not written yet.

    Raises:
        UnslothdError: DATASET_NOT_FOUND, PATH_NOT_ALLOWED, INVALID_FIELD, OUTPUT_DIR_TAKEN.
    """
    train, evaluation = resolve_datasets(request, roots, stored_rows)
    user_config = merged(entry.prepared_config, request.training_config)
    config = completed(user_config, entry.model)
    folder = store.free_output_dir(config.output_dir, explicit=user_config.HasField("output_dir"), taken=reserved_dirs)
    config.output_dir = folder.relative_to(store.output_root).as_posix()
    training_id = store.new_id()
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
        training_dir=str(store.folder_of(training_id)),
        config=config,
        user_set_fields=set_fields(user_config),
        output_dir=str(folder),
    )
    return TrainingDraft(training, assignment, train, evaluation, entry.stored.copy())
