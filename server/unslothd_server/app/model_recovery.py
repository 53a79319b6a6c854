"""Brings the models of an earlier server back."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import structlog

from unslothd.v1.model_pb2 import Model
from unslothd_server.app.loaded_model import LoadedModel
from unslothd_server.app.model_lifecycle import ModelLifecycle
from unslothd_server.app.model_store import ModelStore, StoredModel
from unslothd_server.app.model_workers import ModelWorkers
from unslothd_server.app.models import Models
from unslothd_server.app.ports import Worker
from unslothd_server.app.worker_exit import WorkerExit
from unslothd_server.errors import UnslothdError

log = structlog.get_logger()


class ModelRecovery:
    """Living workers are taken over, dead ones are started again; a suspended model stays so.

    Args:
        models: The registry, still empty.
        workers: Takes workers over.
        lifecycle: Loads models again.
        store: What is on disk of them.
    """

    def __init__(self, models: Models, workers: ModelWorkers, lifecycle: ModelLifecycle, store: ModelStore) -> None:
        self._models = models
        self._workers = workers
        self._lifecycle = lifecycle
        self._store = store

    async def recover(self, living: Iterable[Worker], newest_result: Callable[[StoredModel], Path | None]) -> None:
        """Takes every model up; workers that belong to none are ended. Returns before loads have ended.

        Args:
            living: Workers of earlier servers.
            newest_result: Folder of what trainings have taught a model; a worker may have ended one with no server.
        """
        workers = {worker.model_id: worker for worker in living}
        entries = [self._models.take_up(stored) for stored in self._store.load_all()]
        known = [(entry, workers.pop(entry.model_id, None)) for entry in entries]
        for entry in entries:
            self._workers.start_from(entry, newest_result(entry.stored))
        # All at once: each may have to wait for a worker that is deep in an import.
        going_on = [self._go_on(entry, worker) for entry, worker in known]
        await asyncio.gather(*going_on, *(_end(worker, worker.kill()) for worker in workers.values()))

    async def _go_on(self, entry: LoadedModel, worker: Worker | None) -> None:
        if entry.stored.unloading:
            if worker is not None:
                await _end(worker, worker.stop())
            self._models.forget(entry)
        elif worker is None or not await self._adopt(entry, worker):
            self._bring_back(entry)

    async def _adopt(self, entry: LoadedModel, worker: Worker) -> bool:
        try:
            adopted = await self._workers.adopt(entry, worker)
        except UnslothdError as error:
            log.warning("a worker could not be taken over", model_id=entry.model_id, error=error.message)
            await _end(worker, worker.kill())  # its training goes on with another one
            return False
        entry.progress.close()
        return adopted

    def _bring_back(self, entry: LoadedModel) -> None:
        if entry.stored.suspended:
            entry.progress.close()
            return
        try:
            self._lifecycle.load_again(entry)
        except UnslothdError as error:
            entry.model.state, entry.failure = Model.STATE_FAILED, error
            entry.progress.close(error)


async def _end(worker: Worker, ending: Awaitable[WorkerExit]) -> None:
    """Ends a worker that nobody needs; one that not even SIGKILL ends does not keep the server from starting."""
    try:
        await ending
    except UnslothdError as error:
        log.warning("a worker could not be ended", model_id=worker.model_id, error=error.message)
