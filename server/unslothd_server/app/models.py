"""Loaded models: from LoadModel to UnloadModel, one worker each."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.model_pb2 import LoadProgress, LoraConfig, Model
from unslothd.v1.server_info_pb2 import Device
from unslothd.v1.service_pb2 import GenerateRequest, LoadModelRequest, LoadModelResponse, PrepareForTrainingRequest
from unslothd.v1.training_pb2 import TrainingConfig
from unslothd.worker.v1 import worker_service_pb2 as worker_pb2
from unslothd_server.app.broadcast import Broadcast
from unslothd_server.app.idempotency import SeenRequests, content_digest
from unslothd_server.app.memory_admission import MemoryAdmission
from unslothd_server.app.paths import AllowedRoots
from unslothd_server.app.ports import Devices, Worker, WorkerLauncher
from unslothd_server.app.sources import ModelSource, resolve_model_source
from unslothd_server.app.training_config import completed
from unslothd_server.app.training_state import now
from unslothd_server.app.worker_exit import worker_died
from unslothd_server.errors import (
    ExhaustedError,
    FieldViolation,
    InvalidFieldsError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
    UnslothdError,
)

DEFAULT_MAX_SEQ_LENGTH = 2048
# A worker says what memory it holds within milliseconds, or later while it imports or trains; readers do not wait.
_STATUS_SECONDS = 2.0


@dataclass
class LoadedModel:
    """A model and the worker that holds it.

    Args:
        model: As the API shows it; memory_bytes as last heard.
        progress: Of its loading; closed when that is over.
        worker: None until it answers.
        prepared_config: What PrepareForTraining was given, without defaults.
        lock: Held by whoever changes the model: prepare and unload.
        failure: Why it is FAILED.
    """

    model: Model
    progress: Broadcast[LoadProgress] = field(default_factory=Broadcast[LoadProgress])
    worker: Worker | None = None
    prepared_config: TrainingConfig = field(default_factory=TrainingConfig)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    failure: UnslothdError | None = None
    task: "asyncio.Task[None] | None" = None

    @property
    def model_id(self) -> str:
        """The id of the model."""
        return self.model.model_id

    def require_worker(self) -> Worker:
        """Returns the worker of a loaded model.

        Raises:
            UnslothdError: What made it fail, or MODEL_NOT_READY while it loads or unloads.
        """
        if self.failure is not None:
            raise self.failure
        if self.worker is None or self.model.state in {Model.STATE_LOADING, Model.STATE_UNLOADING}:
            state = Model.State.Name(self.model.state).removeprefix("STATE_").lower()
            raise PreconditionError(
                ErrorReason.ERROR_REASON_MODEL_NOT_READY,
                f'Model "{self.model_id}" is {state}; wait until GetModel shows it READY.',
            )
        return self.worker


class Models:
    """The registry of loaded models.

    Args:
        launcher: Starts workers.
        devices: What there is to load onto.
        roots: Folders that models may be read from.
        max_loaded: Most models at a time.
        result_of: Returns the folder of a training's final adapter.
    """

    def __init__(
        self,
        launcher: WorkerLauncher,
        devices: Devices,
        roots: AllowedRoots,
        *,
        max_loaded: int,
        result_of: Callable[[str], Path],
    ) -> None:
        self._launcher = launcher
        self._devices = devices
        self._roots = roots
        self._max_loaded = max_loaded
        self._result_of = result_of
        self._models: dict[str, LoadedModel] = {}
        self._requests = SeenRequests[LoadedModel]()
        self._admission = MemoryAdmission(devices)
        self._closing = False

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
        """Returns a model as the API shows it, with the memory that it holds now."""
        entry = self.get(model_id)
        if entry.worker is not None and entry.failure is None:
            with contextlib.suppress(UnslothdError, TimeoutError):
                async with asyncio.timeout(_STATUS_SECONDS):
                    status = await entry.worker.status()
                entry.model.memory_bytes = status.model.memory_bytes
        return entry.model

    async def describe_all(self) -> list[Model]:
        """Returns all models in the order of their loading."""
        return list(await asyncio.gather(*(self.describe(model_id) for model_id in list(self._models))))

    def devices(self) -> list[Device]:
        """Returns the devices with the models that are on them."""
        devices = self._devices.list()
        for device in devices:
            device.model_ids.extend(
                entry.model_id for entry in self._models.values() if entry.model.device == device.device
            )
        return devices

    # --- loading ---

    async def load(self, request: LoadModelRequest) -> AsyncIterator[LoadModelResponse]:
        """Loads a model, or attaches to the load that an equal request began; yields progress, then the model."""
        digest = content_digest(request)
        entry = self._requests.find(request.request_id, digest)
        if entry is None:
            entry = self._begin_load(request)
            self._requests.remember(request.request_id, digest, entry)
        async for progress in entry.progress.follow():
            yield LoadModelResponse(progress=progress)
        yield LoadModelResponse(model=entry.model)

    def _begin_load(self, request: LoadModelRequest) -> LoadedModel:
        if self._closing:
            raise _stopping()
        if len(self._models) >= self._max_loaded:
            raise ExhaustedError(
                ErrorReason.ERROR_REASON_TOO_MANY_MODELS,
                f"{self._max_loaded} models are loaded, the most this server holds. Unload one with UnloadModel.",
            )
        source = resolve_model_source(request.model_name, self._roots, self._result_of)
        model_id = _free_id(source.base_id, self._models)
        self._admission.reserve(model_id, source, request)
        entry = LoadedModel(
            Model(
                model_id=model_id,
                model_name=request.model_name,
                state=Model.STATE_LOADING,
                max_seq_length=request.max_seq_length or DEFAULT_MAX_SEQ_LENGTH,
                device_map=request.device_map or "auto",
                full_finetuning=request.full_finetuning,
            )
        )
        self._models[model_id] = entry
        entry.task = asyncio.create_task(self._load(entry, source, request), name=f"load {model_id}")
        return entry

    async def _load(self, entry: LoadedModel, source: ModelSource, request: LoadModelRequest) -> None:
        starting = LoadProgress(phase=LoadProgress.PHASE_STARTING_WORKER, model_id=entry.model_id)
        entry.progress.append(starting)
        error: Exception | None = None
        try:
            entry.worker = await self._launcher.launch(entry.model_id, device_map=entry.model.device_map)
            async for response in entry.worker.load(_worker_load(request, source, entry.model)):
                if response.HasField("progress"):
                    response.progress.model_id = entry.model_id
                    entry.progress.append(response.progress)
                else:
                    _take_over(entry.model, response.model)
        except asyncio.CancelledError:  # by `unload` or `close`, which wait for this to end
            error = PreconditionError(
                ErrorReason.ERROR_REASON_MODEL_NOT_READY,
                f'Model "{entry.model_id}" was unloaded while it loaded. Load it again if that was not meant.',
            )
        except Exception as caught:  # noqa: BLE001 - whatever it is, the callers of LoadModel get it
            error = caught
        finally:
            self._admission.release(entry.model_id)
        if error is None:
            entry.model.state = Model.STATE_READY
            entry.model.load_time.CopyFrom(now())
            entry.task = asyncio.create_task(self._watch_over(entry), name=f"watch over {entry.model_id}")
        else:
            await self._discard(entry, request.request_id)
        entry.progress.close(error)

    async def _discard(self, entry: LoadedModel, request_id: str) -> None:
        """Nothing of a failed load stays: no process, no name, no memory of its request_id."""
        self._models.pop(entry.model_id, None)
        self._requests.forget(request_id)
        if entry.worker is not None:
            await entry.worker.stop()

    async def _watch_over(self, entry: LoadedModel) -> None:
        """Notices the death of a worker that nobody asked to end."""
        assert entry.worker is not None
        how = await entry.worker.exited()
        if not how.asked:
            entry.failure = worker_died(entry.model_id, how)
            entry.model.state = Model.STATE_FAILED
            entry.model.memory_bytes = 0
            entry.model.active_training_id = ""

    # --- preparing ---

    async def prepare(self, request: PrepareForTrainingRequest) -> tuple[Model, TrainingConfig, LoraConfig | None]:
        """Attaches trainable parameters; returns the model, its completed config, and the adapter."""
        entry = self.get(request.model_id)
        async with entry.lock:
            worker = entry.require_worker()
            if entry.model.state == Model.STATE_TRAINING:
                raise PreconditionError(
                    ErrorReason.ERROR_REASON_MODEL_BUSY,
                    f'Training "{entry.model.active_training_id}" runs on "{entry.model_id}". '
                    "Wait for its end (WatchTraining) or stop it (CancelTraining).",
                )
            if entry.model.full_finetuning and request.HasField("lora"):
                raise InvalidFieldsError(
                    [FieldViolation("lora", "must be unset: the model was loaded for full fine-tuning")]
                )
            config = completed(request.training_config, entry.model)
            model = await worker.prepare(
                worker_pb2.PrepareForTrainingRequest(
                    lora=request.lora if request.HasField("lora") else None,
                    seed=config.seed,
                    use_gradient_checkpointing=config.use_gradient_checkpointing,
                )
            )
            _take_over(entry.model, model)
            entry.model.state = Model.STATE_PREPARED
            entry.prepared_config.CopyFrom(request.training_config)
        return entry.model, config, entry.model.lora if entry.model.HasField("lora") else None

    # --- generating ---

    def generate(self, request: GenerateRequest) -> AsyncIterator[worker_pb2.GenerateResponse]:
        """Streams text from a model that no training runs on."""
        entry = self.get(request.model_id)
        worker = entry.require_worker()
        if entry.model.state == Model.STATE_TRAINING:
            raise PreconditionError(
                ErrorReason.ERROR_REASON_MODEL_BUSY,
                f'Training "{entry.model.active_training_id}" runs on "{entry.model_id}"; generate when it is over.',
            )
        return worker.generate(worker_pb2.GenerateRequest(request=request))

    # --- unloading ---

    async def unload(self, model_id: str) -> int:
        """Ends the worker; returns the bytes that its device has back, 0 for a load that is ended.

        The caller has ended the model's trainings.
        """
        entry = self.get(model_id)
        async with entry.lock:
            if self._models.get(model_id) is not entry:  # another caller was faster
                return 0
            if entry.model.state == Model.STATE_LOADING and entry.task is not None:
                entry.task.cancel()
                await entry.task
                return 0
            before = self._free_bytes(entry)
            held = (await self.describe(model_id)).memory_bytes
            entry.model.state = Model.STATE_UNLOADING
            if entry.worker is not None:
                await entry.worker.stop()
            if entry.task is not None:
                await entry.task
            self._models.pop(model_id, None)
            if entry.model.device.startswith("cuda"):
                return max(0, self._free_bytes(entry) - before)
            # On a CPU other processes move the free memory by more than a model; what it held is gone with it.
            return held

    def _free_bytes(self, entry: LoadedModel) -> int:
        return sum(each.free_memory_bytes for each in self._devices.list() if each.device == entry.model.device)

    async def close(self) -> None:
        """Ends every worker and every load."""
        self._closing = True
        entries = list(self._models.values())
        for entry in entries:
            entry.progress.close(_stopping())
        await asyncio.gather(*(entry.worker.stop() for entry in entries if entry.worker is not None))
        tasks = [entry.task for entry in entries if entry.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _stopping() -> UnavailableError:
    return UnavailableError(
        ErrorReason.ERROR_REASON_SERVER_STOPPING, "The server is stopping; call again once it is back."
    )


def _worker_load(request: LoadModelRequest, source: ModelSource, model: Model) -> worker_pb2.LoadModelRequest:
    return worker_pb2.LoadModelRequest(
        model_name=request.model_name,
        source=source.source,
        max_seq_length=model.max_seq_length,
        load_in_4bit=request.load_in_4bit if request.HasField("load_in_4bit") else None,
        token=request.token,
        dtype=request.dtype,
        revision=request.revision,
        full_finetuning=request.full_finetuning,
    )


# Fields of Model that the registry knows; all others are the engine's to say.
_OURS: tuple[Literal["model_id", "model_name", "state", "load_time", "active_training_id", "device_map"], ...] = (
    "model_id",
    "model_name",
    "state",
    "load_time",
    "active_training_id",
    "device_map",
)


def _take_over(model: Model, from_worker: Model) -> None:
    """Copies what the engine knows about the model; the rest is the registry's own."""
    ours = Model()
    ours.CopyFrom(model)
    model.CopyFrom(from_worker)
    for name in _OURS:
        model.ClearField(name)
    model.MergeFrom(
        Model(
            model_id=ours.model_id,
            model_name=ours.model_name,
            state=ours.state,
            load_time=ours.load_time if ours.HasField("load_time") else None,
            active_training_id=ours.active_training_id,
            device_map=ours.device_map,
        )
    )


def _free_id(base: str, taken: Iterable[str]) -> str:
    """A readable id: the last part of the name in lower case plus "-unsloth", and -2, -3, … where that is taken."""
    name = re.sub(r"[^a-z0-9._-]+", "-", base.lower()).strip("-._")[:80] or "model"
    first = name if name.endswith("-unsloth") else f"{name}-unsloth"
    taken = set(taken)
    candidate, number = first, 2
    while candidate in taken:
        candidate, number = f"{first}-{number}", number + 1
    return candidate
