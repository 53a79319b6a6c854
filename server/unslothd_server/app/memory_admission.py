"""Refuses a load that does not fit, before anything is loaded."""

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.server_info_pb2 import Device
from unslothd.v1.service_pb2 import LoadModelRequest
from unslothd_server import weights
from unslothd_server.app.ports import Devices
from unslothd_server.app.sources import ModelSource
from unslothd_server.errors import ExhaustedError, FieldViolation, InvalidFieldsError


class MemoryAdmission:
    """Knows what loads in progress will take, which the device does not show yet.

    Args:
        devices: What there is to load onto.
    """

    def __init__(self, devices: Devices) -> None:
        self._devices = devices
        self._reserved: dict[str, tuple[str, int]] = {}

    def reserve(self, model_id: str, source: ModelSource, request: LoadModelRequest) -> None:
        """Sets memory aside for a load; `release` gives it back when the load is over.

        Raises:
            ExhaustedError: INSUFFICIENT_MEMORY with needed and free bytes.
            InvalidFieldsError: device_map names a device that is not here.
        """
        device = self._device(request.device_map or "auto")
        needed = self._needed(source, request, device)
        reserved = sum(size for name, size in self._reserved.values() if name == device.device)
        free = device.free_memory_bytes - reserved
        if needed > free:
            raise ExhaustedError(
                ErrorReason.ERROR_REASON_INSUFFICIENT_MEMORY,
                f'"{request.model_name}" needs about {_gib(needed)} on {device.device}, {_gib(max(free, 0))} are free. '
                "Unload a model, choose a smaller one, or set load_in_4bit.",
                metadata={"needed_bytes": str(needed), "free_bytes": str(max(free, 0)), "device": device.device},
            )
        self._reserved[model_id] = (device.device, needed)

    def could_ever_fit(self, source: ModelSource, request: LoadModelRequest) -> bool:
        """True when the model is not larger than its whole device."""
        device = self._device(request.device_map or "auto")
        return self._needed(source, request, device) <= device.total_memory_bytes

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

    def _needed(self, source: ModelSource, request: LoadModelRequest, device: Device) -> int:
        """Bytes; 0 where only the worker can know (Hub ids, GGUF files): it looks again before it loads."""
        if source.path is None or not source.path.is_dir():
            return 0
        on_gpu = device.device != "cpu"
        load_in_4bit = request.load_in_4bit if request.HasField("load_in_4bit") else on_gpu
        needed = weights.load_bytes(
            source.path,
            load_in_4bit=load_in_4bit and not request.full_finetuning,
            dtype=request.dtype or ("bfloat16" if on_gpu else "float32"),
        )
        return needed or 0


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
