"""What callers do to a model: LoadModel, PrepareForTraining, UnloadModel; and its end when the server stops."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from unslothd.v1.model_pb2 import LoraConfig, Model
from unslothd.v1.service_pb2 import LoadModelRequest, LoadModelResponse, PrepareForTrainingRequest
from unslothd.v1.training_pb2 import TrainingConfig
from unslothd.worker.v1 import worker_service_pb2 as worker_pb2
from unslothd_server.app.idempotency import content_digest
from unslothd_server.app.loaded_model import LoadedModel, take_over
from unslothd_server.app.model_store import ModelStore, StoredModel
from unslothd_server.app.model_workers import ModelWorkers
from unslothd_server.app.models import Models
from unslothd_server.app.paths import AllowedRoots
from unslothd_server.app.sources import resolve_model_source
from unslothd_server.app.training_config import completed
from unslothd_server.errors import FieldViolation, InvalidFieldsError

DEFAULT_MAX_SEQ_LENGTH = 2048


class ModelLifecycle:
    """Loads, prepares and unloads models.

    Args:
        models: The registry.
        workers: Their workers.
        store: Where they are kept on disk.
        roots: Folders that models may be read from.
        result_of: Returns the folder of a training's final adapter (step 0) or of one of its checkpoints.
    """

    def __init__(
        self,
        models: Models,
        workers: ModelWorkers,
        store: ModelStore,
        roots: AllowedRoots,
        result_of: Callable[[str, int], Path],
    ) -> None:
        self._models = models
        self._workers = workers
        self._store = store
        self._roots = roots
        self._result_of = result_of
        self._loads: set[asyncio.Task[None]] = set()

    # --- loading ---

    async def load(self, request: LoadModelRequest) -> AsyncIterator[LoadModelResponse]:
        """Loads a model, or attaches to the load that an equal request began; yields progress, then the model."""
        digest = content_digest(request)
        entry = self._models.asked_for(request.request_id, digest)
        if entry is None:
            entry = self._begin_load(request, digest)
        async for progress in entry.progress.follow():
            yield LoadModelResponse(progress=progress)
        yield LoadModelResponse(model=entry.model)

    def _begin_load(self, request: LoadModelRequest, digest: str) -> LoadedModel:
        source = resolve_model_source(request.model_name, self._roots, self._result_of)
        self._models.require_room()
        kept = LoadModelRequest()
        kept.CopyFrom(request)
        kept.ClearField("token")
        model = Model(
            model_id=self._models.free_id(source.base_id),
            model_name=request.model_name,
            state=Model.STATE_LOADING,
            max_seq_length=request.max_seq_length or DEFAULT_MAX_SEQ_LENGTH,
            device_map=request.device_map or "auto",
            full_finetuning=request.full_finetuning,
        )
        entry = self._models.add(StoredModel(model, kept, source.source, digest=digest))
        try:
            self._load(entry, token=request.token, keep_failed=False)
        except Exception:
            self._models.forget(entry)
            raise
        return entry

    def load_again(self, entry: LoadedModel) -> None:
        """Begins to load a model that an earlier server had; it waits for memory, and stays where that fails.

        Raises:
            UnslothdError: It could never fit (INSUFFICIENT_MEMORY), or its device is gone.
        """
        self._load(entry, token="", keep_failed=True)

    def _load(self, entry: LoadedModel, *, token: str, keep_failed: bool) -> None:
        """Begins to load; raises INSUFFICIENT_MEMORY before anything is begun, unless the caller wants to wait."""
        waits = entry.stored.request.wait_for_memory or keep_failed
        bringing_up = self._workers.bring_up(entry, token=token, waits=waits)

        async def see_end() -> None:
            error = await bringing_up
            if error is not None and not keep_failed:
                self._models.forget(entry)
            entry.progress.close(error)

        task = asyncio.create_task(see_end(), name=f"load {entry.model_id}")
        self._loads.add(task)
        task.add_done_callback(self._loads.discard)

    # --- preparing ---

    async def prepare(self, request: PrepareForTrainingRequest) -> tuple[Model, TrainingConfig, LoraConfig | None]:
        """Attaches trainable parameters; returns the model, its completed config, and the adapter."""
        entry = self._models.get(request.model_id)
        async with entry.lock:
            worker = entry.idle_worker("prepare it")
            if entry.model.full_finetuning and request.HasField("lora"):
                raise InvalidFieldsError(
                    [FieldViolation("lora", "must be unset: the model was loaded for full fine-tuning")]
                )
            config = completed(request.training_config, entry.model)
            wanted = worker_pb2.PrepareForTrainingRequest(
                lora=request.lora if request.HasField("lora") else None,
                seed=config.seed,
                use_gradient_checkpointing=config.use_gradient_checkpointing,
            )
            take_over(entry.model, await worker.prepare(wanted))
            entry.model.state = Model.STATE_PREPARED
            entry.prepared_config.CopyFrom(request.training_config)
            self._remember_preparation(entry, wanted)
        return entry.model, config, entry.model.lora if entry.model.HasField("lora") else None

    def _remember_preparation(self, entry: LoadedModel, wanted: worker_pb2.PrepareForTrainingRequest) -> None:
        """The first preparation made the weights; later ones only changed the config."""
        if entry.stored.prepare is None:
            if entry.model.HasField("lora"):
                wanted.lora.CopyFrom(entry.model.lora)
            entry.stored.prepare = wanted
        self._store.save(entry.stored)

    # --- unloading ---

    async def unload(self, model_id: str) -> int:
        """Ends the worker; returns the bytes that its device has back, 0 for a load that is ended.

        The caller has ended the model's trainings.

        Raises:
            WorkerStuckError: It does not end; the model stays, FAILED.
        """
        entry = self._models.get(model_id)
        async with entry.lock:
            if not self._models.holds(entry):  # another caller was faster
                return 0
            entry.stored.unloading = True
            self._store.keep(entry.stored)
            if entry.bringing_up is not None:
                await self._workers.give_up(entry)
                if entry.worker is None:
                    self._models.forget(entry)
                    return 0
            return await self._end(entry)

    async def _end(self, entry: LoadedModel) -> int:
        before = self._free_bytes(entry)
        held = (await self._models.describe(entry.model_id)).memory_bytes
        entry.model.state = Model.STATE_UNLOADING
        await self._workers.put_away(entry)
        self._models.forget(entry)
        if entry.model.device.startswith("cuda"):
            return max(0, self._free_bytes(entry) - before)
        # On a CPU other processes move the free memory by more than a model; what it held is gone with it.
        return held

    def _free_bytes(self, entry: LoadedModel) -> int:
        return sum(each.free_memory_bytes for each in self._models.devices() if each.device == entry.model.device)

    # --- ending ---

    async def close(self, *, leave_workers: bool) -> None:
        """Ends every load; then ends every worker, or leaves them to the next server. The models stay known to it."""
        self._models.refuse_new()
        for entry in self._models.all():
            await self._workers.give_up(entry)
        entries = [entry for entry in self._models.all() if entry.worker is not None]
        if leave_workers:
            await asyncio.gather(*(self._workers.leave(entry) for entry in entries))
        else:
            await asyncio.gather(*(self._workers.put_away(entry) for entry in entries), return_exceptions=True)
        await asyncio.gather(*self._loads, return_exceptions=True)
