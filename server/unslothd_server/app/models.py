"""Loaded models: from LoadModel to UnloadModel, one worker each."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

import structlog

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.model_pb2 import LoraConfig, Model
from unslothd.v1.server_info_pb2 import Device
from unslothd.v1.service_pb2 import GenerateRequest, LoadModelRequest, LoadModelResponse, PrepareForTrainingRequest
from unslothd.v1.training_pb2 import TrainingConfig
from unslothd.worker.v1 import worker_service_pb2 as worker_pb2
from unslothd_server.app.idempotency import SeenRequests, content_digest
from unslothd_server.app.loaded_model import LoadedModel, take_over
from unslothd_server.app.memory_admission import MemoryAdmission
from unslothd_server.app.model_store import ModelStore, StoredModel
from unslothd_server.app.model_workers import ModelWorkers
from unslothd_server.app.paths import AllowedRoots
from unslothd_server.app.ports import Devices, Worker, WorkerLauncher
from unslothd_server.app.sources import resolve_model_source
from unslothd_server.app.training_config import completed
from unslothd_server.app.worker_exit import WorkerStuckError
from unslothd_server.errors import (
    AlreadyExistsError,
    ExhaustedError,
    FieldViolation,
    InvalidFieldsError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
    UnslothdError,
)

log = structlog.get_logger()

DEFAULT_MAX_SEQ_LENGTH = 2048
# A server that is started anew serves after about a second; a host needs longer, and clients try again anyway.
RETRY_AFTER_STOP_SECONDS = 5.0


class Models:
    """The registry of loaded models.

    Args:
        launcher: Starts workers.
        devices: What there is to load onto.
        roots: Folders that models may be read from.
        store: Where models are kept on disk.
        max_loaded: Most models at a time.
        result_of: Returns the folder of a training's final adapter (step 0) or of one of its checkpoints.
        hub_token: The operator's Hub token, for loads that bring none of their own; empty = none.
    """

    def __init__(
        self,
        launcher: WorkerLauncher,
        devices: Devices,
        roots: AllowedRoots,
        store: ModelStore,
        *,
        max_loaded: int,
        result_of: Callable[[str, int], Path],
        hub_token: str = "",
    ) -> None:
        self._devices = devices
        self._roots = roots
        self._store = store
        self._max_loaded = max_loaded
        self._result_of = result_of
        self._models: dict[str, LoadedModel] = {}
        self._requests = SeenRequests[LoadedModel]()
        self.admission = MemoryAdmission(devices)
        self._workers = ModelWorkers(launcher, self.admission, store, hub_token=hub_token)
        self._loads: set[asyncio.Task[None]] = set()
        self._closing = False

    @property
    def is_closing(self) -> bool:
        """True once the server stops."""
        return self._closing

    # --- after a start ---

    async def recover(
        self, living: Iterable[Worker], newest_result: Callable[[StoredModel], Path | None] = lambda _: None
    ) -> None:
        """Brings the models of an earlier server back: living workers are taken over, dead ones are started again.

        A suspended model stays so. Workers that belong to no model are ended. Returns before loads have ended.

        Args:
            living: Workers of earlier servers.
            newest_result: Folder of what trainings have taught a model; a worker may have ended one with no server.
        """
        workers = {worker.model_id: worker for worker in living}
        known = [(self._enter(stored), workers.pop(stored.model.model_id, None)) for stored in self._store.load_all()]
        for entry, _ in known:
            folder = newest_result(entry.stored)
            if folder is not None:
                self.start_from(entry, folder)
        # All at once: each may have to wait for a worker that is deep in an import.
        going_on = [self._go_on(entry, worker) for entry, worker in known]
        await asyncio.gather(*going_on, *(_end(worker) for worker in workers.values()))

    async def _go_on(self, entry: LoadedModel, worker: Worker | None) -> None:
        if entry.stored.unloading:
            if worker is not None:
                await _end(worker)
            self._forget(entry)
        elif worker is None or not await self._adopt(entry, worker):
            self._bring_back(entry)

    def _enter(self, stored: StoredModel) -> LoadedModel:
        stored.model.active_training_id = ""
        stored.model.state = Model.STATE_SUSPENDED if stored.suspended else Model.STATE_LOADING
        entry = LoadedModel(stored)
        self._models[entry.model_id] = entry
        self._requests.remember(stored.request.request_id, stored.digest, entry)
        return entry

    async def _adopt(self, entry: LoadedModel, worker: Worker) -> bool:
        try:
            adopted = await self._workers.adopt(entry, worker)
        except UnslothdError as error:
            log.warning("a worker could not be taken over", model_id=entry.model_id, error=error.message)
            await _end(worker)
            return False
        entry.progress.close()
        return adopted

    def _bring_back(self, entry: LoadedModel) -> None:
        if entry.stored.suspended:
            entry.progress.close()
            return
        try:
            self._in_background(self._load(entry, token="", keep_failed=True))
        except UnslothdError as error:
            entry.model.state, entry.failure = Model.STATE_FAILED, error
            entry.progress.close(error)

    # --- reading ---

    def get(self, model_id: str) -> LoadedModel:
        """Returns a model. Raises NotFoundError (MODEL_NOT_FOUND)."""
        try:
            return self._models[model_id]
        except KeyError:
            loaded = ", ".join(self._models) or "none"
            raise NotFoundError(
                ErrorReason.ERROR_REASON_MODEL_NOT_FOUND,
                f'No model "{model_id}" is loaded (loaded: {loaded}). Load it with LoadModel.',
            ) from None

    async def describe(self, model_id: str) -> Model:
        """Returns a model as the API shows it, with the memory that it holds now, or did at most a second ago."""
        return await self._describe(self.get(model_id))

    @staticmethod
    async def _describe(entry: LoadedModel) -> Model:
        worker = entry.worker
        if worker is not None and entry.failure is None:
            held = await entry.memory.newer(worker)
            if held is not None and entry.worker is worker and entry.failure is None:
                entry.model.memory_bytes = held
        return entry.model

    def all(self) -> list[Model]:
        """All models as last heard; asks no worker."""
        return [entry.model for entry in self._models.values()]

    async def describe_all(self) -> list[Model]:
        """Returns all models in the order of their loading, also one that is unloaded meanwhile."""
        return list(await asyncio.gather(*(self._describe(entry) for entry in self._models.values())))

    def devices(self) -> list[Device]:
        """Returns the devices with the models that are on them."""
        devices = self._devices.list()
        for device in devices:
            device.model_ids.extend(
                entry.model_id
                for entry in self._models.values()
                if entry.model.device == device.device and entry.worker is not None
            )
        return devices

    # --- loading ---

    async def load(self, request: LoadModelRequest) -> AsyncIterator[LoadModelResponse]:
        """Loads a model, or attaches to the load that an equal request began; yields progress, then the model."""
        digest = content_digest(request)
        entry = self._requests.find(request.request_id, digest)
        if entry is None:
            entry = self._begin_load(request, digest)
        async for progress in entry.progress.follow():
            yield LoadModelResponse(progress=progress)
        yield LoadModelResponse(model=entry.model)

    def _begin_load(self, request: LoadModelRequest, digest: str) -> LoadedModel:
        source = resolve_model_source(request.model_name, self._roots, self._result_of)
        self._check_room()
        kept = LoadModelRequest()
        kept.CopyFrom(request)
        kept.ClearField("token")
        stored = StoredModel(
            Model(
                model_id=_free_id(source.base_id, self._models),
                model_name=request.model_name,
                state=Model.STATE_LOADING,
                max_seq_length=request.max_seq_length or DEFAULT_MAX_SEQ_LENGTH,
                device_map=request.device_map or "auto",
                full_finetuning=request.full_finetuning,
            ),
            kept,
            source.source,
            digest=digest,
        )
        entry = LoadedModel(stored)
        self._store.save(stored)  # before anything runs that a server which dies now would not know of
        try:
            self._in_background(self._load(entry, token=request.token, keep_failed=False))
        except UnslothdError:
            self._store.remove(entry.model_id)
            raise
        self._models[entry.model_id] = entry
        self._requests.remember(request.request_id, digest, entry)
        return entry

    def _check_room(self) -> None:
        if self._closing:
            raise stopping()
        if len(self._models) >= self._max_loaded:
            raise ExhaustedError(
                ErrorReason.ERROR_REASON_TOO_MANY_MODELS,
                f"{self._max_loaded} models are loaded, the most this server holds. Unload one with UnloadModel.",
            )

    def _load(self, entry: LoadedModel, *, token: str, keep_failed: bool) -> "asyncio.Task[None]":
        """Begins to load; raises INSUFFICIENT_MEMORY before anything is begun, unless the caller wants to wait."""
        waits = entry.stored.request.wait_for_memory or keep_failed
        bringing_up = self._workers.bring_up(entry, token=token, waits=waits)

        async def see_end() -> None:
            error = await bringing_up
            if error is not None and not keep_failed:
                self._forget(entry)
            entry.progress.close(error)

        return asyncio.create_task(see_end(), name=f"load {entry.model_id}")

    def _in_background(self, task: "asyncio.Task[None]") -> None:
        self._loads.add(task)
        task.add_done_callback(self._loads.discard)

    def _forget(self, entry: LoadedModel) -> None:
        """Nothing of the model stays: no name, no file, no memory of its request_id."""
        if self._models.get(entry.model_id) is entry:
            self._models.pop(entry.model_id)
            self._store.remove(entry.model_id)
        self.admission.forget(entry.model_id)
        self._requests.forget(entry.stored.request.request_id)

    # --- preparing ---

    async def prepare(self, request: PrepareForTrainingRequest) -> tuple[Model, TrainingConfig, LoraConfig | None]:
        """Attaches trainable parameters; returns the model, its completed config, and the adapter."""
        entry = self.get(request.model_id)
        async with entry.lock:
            worker = entry.require_worker()
            self._require_idle(entry, "prepare it")
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

    def _require_idle(self, entry: LoadedModel, what: str) -> None:
        if entry.model.state == Model.STATE_TRAINING:
            raise PreconditionError(
                ErrorReason.ERROR_REASON_MODEL_BUSY,
                f'Training "{entry.model.active_training_id}" runs on "{entry.model_id}"; {what} when it is over '
                "(WatchTraining), or stop it (CancelTraining).",
            )

    # --- what a worker does for a caller ---

    def idle_worker(self, model_id: str, what: str) -> Worker:
        """Returns the worker of a model that no training runs on.

        Args:
            model_id: The model.
            what: What the caller wants to do, for the error: "generate".

        Raises:
            UnslothdError: MODEL_NOT_FOUND, MODEL_NOT_READY, MODEL_BUSY, or what made the model fail.
        """
        entry = self.get(model_id)
        worker = entry.require_worker()
        self._require_idle(entry, what)
        return worker

    def generate(self, request: GenerateRequest) -> AsyncIterator[worker_pb2.GenerateResponse]:
        """Streams text from a model that no training runs on."""
        return self.idle_worker(request.model_id, "generate").generate(worker_pb2.GenerateRequest(request=request))

    # --- for trainings ---

    async def working(self, entry: LoadedModel) -> Worker:
        """Returns the worker of a model, started anew if it is suspended, being brought back, or was lost.

        Where the memory for it is not free, it is waited for; `entry.lacks_memory` tells so meanwhile.

        Raises:
            UnslothdError: Why there is none.
        """
        if entry.needs_worker:
            if self._closing:
                raise stopping()
            await self._workers.put_away(entry)
            self._workers.bring_up(entry, waits=True)
        if entry.bringing_up is not None:
            error = await asyncio.shield(entry.bringing_up)
            if error is not None:
                raise error
        return entry.require_worker()

    async def lose(self, entry: LoadedModel) -> None:
        """Ends what is left of a worker that died or does not answer; `working` starts another one.

        Raises:
            WorkerStuckError: It does not end.
        """
        await self._workers.put_away(entry)

    async def suspend(self, entry: LoadedModel) -> None:
        """Frees the device of a model whose training is paused, or ends its wait for one; `working` brings it back.

        A worker that does not end leaves its model FAILED.
        """
        await self._workers.give_up(entry)
        entry.model.state = Model.STATE_SUSPENDED
        entry.stored.suspended = True
        self._store.keep(entry.stored)
        with contextlib.suppress(WorkerStuckError):
            await self._workers.put_away(entry)

    def start_from(self, entry: LoadedModel, folder: Path) -> None:
        """A worker that takes the place of this model's starts from these weights: the results of a training."""
        prepare = entry.stored.prepare
        if prepare is not None and prepare.weights_from != str(folder):
            prepare.weights_from = str(folder)
            self._store.keep(entry.stored)

    def found_or_restored(self, stored: StoredModel, *, must_fit: bool = False) -> LoadedModel:
        """Returns the model that a training ran on, or enters it again, suspended, as it was then.

        Args:
            stored: The model as it was then.
            must_fit: Refuse where it has to be loaded, and the memory for that is not free.

        Raises:
            AlreadyExistsError: Another model has its id now (MODEL_ID_TAKEN).
            ExhaustedError: Too many models are loaded, or INSUFFICIENT_MEMORY. Nothing was changed.
        """
        entry = self._models.get(stored.model.model_id)
        if entry is not None and entry.stored.same_making(stored):
            if must_fit and entry.needs_worker:
                self._check_fits(entry.stored)
            return entry
        if entry is not None:
            raise AlreadyExistsError(
                ErrorReason.ERROR_REASON_MODEL_ID_TAKEN,
                f'Another model is loaded as "{entry.model_id}", or it was prepared otherwise. Unload it with '
                "UnloadModel, then resume: the training's model is loaded again by itself.",
            )
        self._check_room()
        if must_fit:
            self._check_fits(stored)
        restored = stored.copy()
        restored.suspended, restored.unloading = True, False
        restored.request.ClearField("request_id")
        entry = self._enter(restored)
        entry.progress.close()
        self._store.save(restored)
        return entry

    def _check_fits(self, stored: StoredModel) -> None:
        remedy = "Unload a model or pause a training, then resume again; until then this training stays as it is."
        self.admission.check(stored.model.model_id, stored.model_source, stored.request, remedy)

    # --- unloading ---

    async def unload(self, model_id: str) -> int:
        """Ends the worker; returns the bytes that its device has back, 0 for a load that is ended.

        The caller has ended the model's trainings.

        Raises:
            WorkerStuckError: It does not end; the model stays, FAILED.
        """
        entry = self.get(model_id)
        async with entry.lock:
            if self._models.get(model_id) is not entry:  # another caller was faster
                return 0
            entry.stored.unloading = True
            self._store.keep(entry.stored)
            if entry.bringing_up is not None:
                await self._workers.give_up(entry)
                if entry.worker is None:
                    self._forget(entry)
                    return 0
            before = self._free_bytes(entry)
            held = (await self.describe(model_id)).memory_bytes
            entry.model.state = Model.STATE_UNLOADING
            await self._workers.put_away(entry)
            self._forget(entry)
            if entry.model.device.startswith("cuda"):
                return max(0, self._free_bytes(entry) - before)
            # On a CPU other processes move the free memory by more than a model; what it held is gone with it.
            return held

    def _free_bytes(self, entry: LoadedModel) -> int:
        return sum(each.free_memory_bytes for each in self._devices.list() if each.device == entry.model.device)

    # --- ending ---

    def refuse_new(self) -> None:
        """From now on no model is loaded or brought up; callers that wait for a load are told."""
        self._closing = True
        for entry in self._models.values():
            entry.progress.close(stopping())

    async def close(self, *, leave_workers: bool) -> None:
        """Ends every load; then ends every worker, or leaves them to the next server. The models stay known to it."""
        self.refuse_new()
        for entry in list(self._models.values()):
            await self._workers.give_up(entry)
        entries = [entry for entry in self._models.values() if entry.worker is not None]
        if leave_workers:
            for entry in entries:
                if entry.watch is not None:
                    entry.watch.cancel()
            await asyncio.gather(*(entry.worker.detach() for entry in entries if entry.worker is not None))
        else:
            await asyncio.gather(*(self._workers.put_away(entry) for entry in entries), return_exceptions=True)
        await asyncio.gather(*self._loads, return_exceptions=True)


def stopping() -> UnavailableError:
    """The error of a call that comes while the server stops."""
    return UnavailableError(
        ErrorReason.ERROR_REASON_SERVER_STOPPING,
        "The server is stopping; call again once it is back.",
        retry_seconds=RETRY_AFTER_STOP_SECONDS,
    )


async def _end(worker: Worker) -> None:
    """Ends a worker that nobody needs; one that not even SIGKILL ends does not keep the server from starting."""
    try:
        await worker.stop()
    except UnslothdError as error:
        log.warning("a worker could not be ended", model_id=worker.model_id, error=error.message)


def _free_id(base: str, taken: Iterable[str]) -> str:
    """A readable id: the last part of the name in lower case plus "-unsloth", and -2, -3, … where that is taken."""
    name = re.sub(r"[^a-z0-9._-]+", "-", base.lower()).strip("-._")[:80] or "model"
    first = name if name.endswith("-unsloth") else f"{name}-unsloth"
    taken = set(taken)
    candidate, number = first, 2
    while candidate in taken:
        candidate, number = f"{first}-{number}", number + 1
    return candidate
