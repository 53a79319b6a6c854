"""The models that the server knows, in memory and on disk, and what callers are shown of them."""

import asyncio
import re
from collections.abc import AsyncIterator

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.model_pb2 import Model
from unslothd.v1.server_info_pb2 import Device
from unslothd.v1.service_pb2 import GenerateRequest
from unslothd.worker.v1 import worker_service_pb2 as worker_pb2
from unslothd_server.app.idempotency import SeenRequests
from unslothd_server.app.loaded_model import LoadedModel
from unslothd_server.app.memory_admission import MemoryAdmission
from unslothd_server.app.model_store import ModelStore, StoredModel
from unslothd_server.app.ports import Devices
from unslothd_server.app.stopping import stopping
from unslothd_server.errors import AlreadyExistsError, ExhaustedError, NotFoundError


class Models:
    """The registry of models.

    Args:
        store: Where they are kept on disk.
        admission: Knows whether a model fits.
        devices: What they are loaded onto.
        max_loaded: Most models at a time.
    """

    def __init__(self, store: ModelStore, admission: MemoryAdmission, devices: Devices, *, max_loaded: int) -> None:
        self._store = store
        self._admission = admission
        self._devices = devices
        self._max_loaded = max_loaded
        self._models: dict[str, LoadedModel] = {}
        self._requests = SeenRequests[LoadedModel]()
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

    def all(self) -> list[LoadedModel]:
        """Every model, in the order of their loading."""
        return list(self._models.values())

    def holds(self, entry: LoadedModel) -> bool:
        """False once a model was unloaded, whichever has its id now."""
        return self._models.get(entry.model_id) is entry

    async def describe(self, model_id: str) -> Model:
        """Returns a model as the API shows it, with the memory that it holds now, or did at most a second ago."""
        return await _describe(self.get(model_id))

    async def describe_all(self) -> list[Model]:
        """Returns all models in the order of their loading, also one that is unloaded meanwhile."""
        return list(await asyncio.gather(*(_describe(entry) for entry in self.all())))

    def devices(self) -> list[Device]:
        """Returns the devices with the models that are on them."""
        devices = self._devices.list()
        for device in devices:
            device.model_ids.extend(
                entry.model_id
                for entry in self.all()
                if entry.model.device == device.device and entry.worker is not None
            )
        return devices

    def generate(self, request: GenerateRequest) -> AsyncIterator[worker_pb2.GenerateResponse]:
        """Streams text from a model that no training runs on."""
        worker = self.get(request.model_id).idle_worker("generate")
        return worker.generate(worker_pb2.GenerateRequest(request=request))

    # --- coming and going ---

    def free_id(self, base: str) -> str:
        """A readable id: the last part of a name in lower case plus "-unsloth", and -2, -3, … where that is taken."""
        name = re.sub(r"[^a-z0-9._-]+", "-", base.lower()).strip("-._")[:80] or "model"
        first = name if name.endswith("-unsloth") else f"{name}-unsloth"
        candidate, number = first, 2
        while candidate in self._models:
            candidate, number = f"{first}-{number}", number + 1
        return candidate

    def require_room(self) -> None:
        """Refuses one more model while the server stops (SERVER_STOPPING), or holds its most (TOO_MANY_MODELS)."""
        if self._closing:
            raise stopping()
        if len(self._models) >= self._max_loaded:
            raise ExhaustedError(
                ErrorReason.ERROR_REASON_TOO_MANY_MODELS,
                f"{self._max_loaded} models are loaded, the most this server holds. Unload one with UnloadModel.",
            )

    def asked_for(self, request_id: str, digest: str) -> LoadedModel | None:
        """Returns the model that an equal request asked for. Raises AlreadyExistsError (REQUEST_ID_REUSED)."""
        return self._requests.find(request_id, digest)

    def add(self, stored: StoredModel) -> LoadedModel:
        """Enters a new model, on disk first: nothing may run that a server which dies then would not know of.

        Raises:
            UnslothdError: The disk takes no more (DISK_FULL, NOT_WRITABLE); nothing was entered.
        """
        self._store.save(stored)
        return self._enter(stored)

    def take_up(self, stored: StoredModel) -> LoadedModel:
        """Enters a model of before, without a worker yet."""
        stored.model.active_training_id = ""
        stored.model.state = Model.STATE_SUSPENDED if stored.suspended else Model.STATE_LOADING
        return self._enter(stored)

    def _enter(self, stored: StoredModel) -> LoadedModel:
        entry = LoadedModel(stored)
        self._models[entry.model_id] = entry
        self._requests.remember(stored.request.request_id, stored.digest, entry)
        return entry

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
                self._require_memory(entry.stored)
            return entry
        if entry is not None:
            raise AlreadyExistsError(
                ErrorReason.ERROR_REASON_MODEL_ID_TAKEN,
                f'Another model is loaded as "{entry.model_id}", or it was prepared otherwise. Unload it with '
                "UnloadModel, then resume: the training's model is loaded again by itself.",
            )
        self.require_room()
        if must_fit:
            self._require_memory(stored)
        restored = stored.copy()
        restored.suspended, restored.unloading = True, False
        restored.request.ClearField("request_id")
        entry = self.take_up(restored)
        entry.progress.close()
        self._store.save(restored)
        return entry

    def _require_memory(self, stored: StoredModel) -> None:
        remedy = "Unload a model or pause a training, then resume again; until then this training stays as it is."
        self._admission.check(stored.model.model_id, stored.model_source, stored.request, remedy)

    def forget(self, entry: LoadedModel) -> None:
        """Nothing of the model stays: no name, no file, no memory of its request_id."""
        if self.holds(entry):
            self._models.pop(entry.model_id)
            self._store.remove(entry.model_id)
        self._admission.forget(entry.model_id)
        self._requests.forget(entry.stored.request.request_id)

    # --- ending ---

    @property
    def is_closing(self) -> bool:
        """True once the server stops."""
        return self._closing

    def refuse_new(self) -> None:
        """From now on no model is loaded or brought up; callers that wait for a load are told."""
        self._closing = True
        for entry in self.all():
            entry.progress.close(stopping())


async def _describe(entry: LoadedModel) -> Model:
    worker = entry.worker
    if worker is not None and entry.failure is None:
        held = await entry.memory.newer(worker)
        if held is not None and entry.worker is worker and entry.failure is None:
            entry.model.memory_bytes = held
    return entry.model
