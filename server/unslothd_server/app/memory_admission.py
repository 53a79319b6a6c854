"""Refuses a load that does not fit, before anything is loaded."""

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.server_info_pb2 import Device
from unslothd.v1.service_pb2 import LoadModelRequest
from unslothd_server import weights
from unslothd_server.app.ports import Devices
from unslothd_server.app.sources import ModelSource
from unslothd_server.disk import in_units
from unslothd_server.errors import ExhaustedError, FieldViolation, InvalidFieldsError


class MemoryAdmission:
    """Knows what loads in progress will take, which the device does not show yet.

    Args:
        devices: What there is to load onto.
    """

    def __init__(self, devices: Devices) -> None:
        self._devices = devices
        self._reserved: dict[str, tuple[str, int]] = {}
        self._learnt: dict[str, int] = {}

    def reserve(self, model_id: str, source: ModelSource, request: LoadModelRequest) -> None:
        """Sets memory aside for a load; `release` gives it back when the load is over.

        Raises:
            ExhaustedError: INSUFFICIENT_MEMORY with needed and free bytes.
            InvalidFieldsError: device_map names a device that is not here.
        """
        device, needed = self._require_room(
            model_id, source, request, "Unload a model, choose a smaller one, or set load_in_4bit."
        )
        self._reserved[model_id] = (device.device, needed)

    def check(self, model_id: str, source: ModelSource, request: LoadModelRequest, remedy: str) -> None:
        """As `reserve`, but sets nothing aside; `remedy` is the next step in the text of the error."""
        self._require_room(model_id, source, request, remedy)

    def _require_room(
        self, model_id: str, source: ModelSource, request: LoadModelRequest, remedy: str
    ) -> tuple[Device, int]:
        device = self._device(request.device_map or "auto")
        needed = self._needed(model_id, source, request, device)
        reserved = sum(size for name, size in self._reserved.values() if name == device.device)
        free = device.free_memory_bytes - reserved
        if needed > free:
            raise ExhaustedError(
                ErrorReason.ERROR_REASON_INSUFFICIENT_MEMORY,
                f'"{request.model_name}" needs about {in_units(needed)} on {device.device}, '
                f"{in_units(max(free, 0))} are free. {remedy}",
                metadata={"needed_bytes": str(needed), "free_bytes": str(max(free, 0)), "device": device.device},
            )
        return device, needed

    def learn(self, model_id: str, num_bytes: int) -> None:
        """A model was loaded and took so much: what it will need again, where its files did not tell."""
        self._learnt[model_id] = num_bytes

    def forget(self, model_id: str) -> None:
        """The model is not loaded any more; another one may get its id."""
        self._learnt.pop(model_id, None)

    def could_ever_fit(self, model_id: str, source: ModelSource, request: LoadModelRequest) -> bool:
        """True when the model is not larger than its whole device."""
        device = self._device(request.device_map or "auto")
        return self._needed(model_id, source, request, device) <= device.total_memory_bytes

    def release(self, model_id: str) -> None:
        """The load is over: what it took shows on the device now."""
        self._reserved.pop(model_id, None)

    def _device(self, device_map: str) -> Device:
        devices = self._devices.list()
        wanted = {"auto": devices[0].device, "cuda": "cuda:0"}.get(device_map, device_map)
        for device in devices:
            if device.device == wanted:
                return device
        names = ", ".join(device.device for device in devices)
        raise InvalidFieldsError(
            [FieldViolation("device_map", f'there is no device "{device_map}" here; there is {names}, or "auto"')]
        )

    def _needed(self, model_id: str, source: ModelSource, request: LoadModelRequest, device: Device) -> int:
        """Bytes; 0 where nobody knows: Hub ids and GGUF files that have not been loaded since the server started."""
        if source.path is None or not source.path.is_dir():
            return self._learnt.get(model_id, 0)
        on_gpu = device.device != "cpu"
        load_in_4bit = request.load_in_4bit if request.HasField("load_in_4bit") else on_gpu
        needed = weights.load_bytes(
            source.path,
            load_in_4bit=load_in_4bit and not request.full_finetuning,
            dtype=request.dtype or ("bfloat16" if on_gpu else "float32"),
        )
        return needed or self._learnt.get(model_id, 0)
