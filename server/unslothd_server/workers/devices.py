"""The devices of this host, read through NVML and psutil: the server never imports torch."""

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import psutil

from unslothd.v1.server_info_pb2 import Device


class _Nvml(Protocol):
    """What is used of the untyped module `pynvml`."""

    NVMLError: type[Exception]

    def nvmlInit(self) -> None: ...
    def nvmlDeviceGetCount(self) -> int: ...
    def nvmlDeviceGetHandleByIndex(self, index: int) -> object: ...
    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> object: ...
    def nvmlDeviceGetName(self, handle: object) -> str: ...
    def nvmlDeviceGetMemoryInfo(self, handle: object) -> Any: ...
    def nvmlDeviceGetUtilizationRates(self, handle: object) -> Any: ...


class HostDevices:
    """Implements `app.ports.Devices`.

    Args:
        environ: Where CUDA_VISIBLE_DEVICES is read; default: this process's environment.
        load_nvml: Returns the module `pynvml`, or None on a host that has no GPU for sure; tests give another.
    """

    def __init__(
        self, environ: Mapping[str, str] | None = None, load_nvml: Callable[[], object | None] | None = None
    ) -> None:
        self._visible = (os.environ if environ is None else environ).get("CUDA_VISIBLE_DEVICES")
        nvml = (load_nvml or _import_nvml)()
        self._nvml = None if nvml is None else _initialised(cast("_Nvml", nvml))

    def list(self) -> list[Device]:
        """All devices with their memory now, named as a worker names them. The CPU alone when there is no GPU."""
        handles = [] if self._nvml is None else _visible_handles(self._nvml, self._visible)
        if self._nvml is None or not handles:
            return [_cpu()]
        return [_gpu(self._nvml, index, handle) for index, handle in enumerate(handles)]


def _import_nvml() -> object | None:
    # The module takes 15 MB, which a server beside no driver can do without. WSL has its driver in another place.
    if not any(Path(place).exists() for place in ("/dev/nvidiactl", "/dev/dxg", "/proc/driver/nvidia")):
        return None
    return importlib.import_module("pynvml")


def _initialised(nvml: _Nvml) -> _Nvml | None:
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:  # no driver on this host
        return None
    return nvml


def _visible_handles(nvml: _Nvml, visible: str | None) -> "list[object]":
    if visible is None:
        return [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    handles: list[object] = []
    for name in visible.split(","):
        try:
            handles.append(_handle(nvml, name.strip()))
        except nvml.NVMLError:
            break  # as CUDA does: what follows an unknown device is not visible either
    return handles


def _handle(nvml: _Nvml, name: str) -> object:
    if name.isdecimal():
        return nvml.nvmlDeviceGetHandleByIndex(int(name))
    return nvml.nvmlDeviceGetHandleByUUID(name)


def _gpu(nvml: _Nvml, index: int, handle: object) -> Device:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    device = Device(
        device=f"cuda:{index}",
        name=nvml.nvmlDeviceGetName(handle),
        total_memory_bytes=memory.total,
        free_memory_bytes=memory.free,
    )
    try:
        device.utilization = nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
    except nvml.NVMLError:
        device.ClearField("utilization")  # a slice of a GPU (MIG) does not tell it
    return device


def _cpu() -> Device:
    memory = psutil.virtual_memory()
    return Device(
        device="cpu",
        name=f"{psutil.cpu_count() or 1} CPU cores",
        total_memory_bytes=memory.total,
        free_memory_bytes=memory.available,
        utilization=min(psutil.cpu_percent() / 100, 1.0),
    )
