"""Plans: what is told when the rows go away while the worker reads them."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from support.app_in_memory import AppInMemory, write_model
from unslothd.v1.dataset_pb2 import DatasetSource
from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.service_pb2 import PlanTrainingRequest
from unslothd.v1.training_pb2 import TrainingPlan
from unslothd.worker.v1.worker_service_pb2 import PlanTrainingRequest as Assignment
from unslothd_server.errors import NotFoundError

NOT_FOUND = ErrorReason.ERROR_REASON_DATASET_NOT_FOUND


def test_a_dataset_that_is_deleted_under_a_plan_is_told_by_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stored = {"sha256:1": tmp_path / "home" / "rows.jsonl"}

    def rows_of(dataset_id: str) -> Path:
        if dataset_id not in stored:
            raise NotFoundError(NOT_FOUND, f'There is no dataset "{dataset_id}".')
        return stored[dataset_id]

    async def read_rows(assignment: Assignment) -> TrainingPlan:
        path = stored.pop("sha256:1")
        raise NotFoundError(NOT_FOUND, f"There is no dataset at {path}. Check the path.")

    async def scenario() -> None:
        write_model(tmp_path / "roots" / "m")
        app = AppInMemory(tmp_path, rows_of=rows_of)
        await app.start()
        model_id = await app.prepared_model()
        monkeypatch.setattr(app.models.get(model_id), "worker", SimpleNamespace(plan=read_rows))
        source = DatasetSource(dataset_id="sha256:1")
        await app.acceptance.plan(PlanTrainingRequest(model_id=model_id, train_dataset=source))

    with pytest.raises(NotFoundError) as caught:
        asyncio.run(scenario())
    assert caught.value.message == 'There is no dataset "sha256:1".'
