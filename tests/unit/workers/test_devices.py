"""Devices: GPUs as NVML tells them and a worker names them, or the CPU."""

from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from unslothd_server.workers.devices import HostDevices


class NVMLError(Exception):
    pass


class FakeNvml:
    """Two GPUs; the second does not tell its utilization."""

    NVMLError = NVMLError

    def __init__(self, *, driver: bool = True) -> None:
        self._driver = driver

    def nvmlInit(self) -> None:
        if not self._driver:
            raise NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index > 1:
            raise NVMLError("Invalid Argument")
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        if uuid not in ("GPU-zero", "GPU-one"):
            raise NVMLError("Not Found")
        return ("GPU-zero", "GPU-one").index(uuid)

    def nvmlDeviceGetName(self, handle: int) -> str:
        return f"GPU number {handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(total=100 + handle, free=50 + handle)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        if handle == 1:
            raise NVMLError("Not Supported")
        return SimpleNamespace(gpu=25)


def names(environ: dict[str, str]) -> list[tuple[str, str]]:
    return [(device.device, device.name) for device in HostDevices(environ, FakeNvml).list()]


def test_gpus_come_with_memory_and_utilization_where_it_can_be_read():
    first, second = HostDevices({}, FakeNvml).list()

    assert (first.device, first.name) == ("cuda:0", "GPU number 0")
    assert (first.total_memory_bytes, first.free_memory_bytes, first.utilization) == (100, 50, 0.25)
    assert (second.device, second.total_memory_bytes, second.free_memory_bytes) == ("cuda:1", 101, 51)
    assert not second.HasField("utilization")


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("1", [("cuda:0", "GPU number 1")]),
        ("1,0", [("cuda:0", "GPU number 1"), ("cuda:1", "GPU number 0")]),
        ("GPU-one", [("cuda:0", "GPU number 1")]),
        ("0,7,1", [("cuda:0", "GPU number 0")]),
    ],
)
def test_devices_are_named_as_a_worker_with_the_same_environment_names_them(visible: str, expected: Any):
    assert names({"CUDA_VISIBLE_DEVICES": visible}) == expected


@pytest.mark.parametrize("visible", ["", "-1"])
def test_without_a_visible_gpu_the_cpu_is_the_device(visible: str):
    assert [device for device, _ in names({"CUDA_VISIBLE_DEVICES": visible})] == ["cpu"]


def test_without_a_driver_the_cpu_is_the_device_with_the_hosts_memory():
    (device,) = HostDevices({}, lambda: FakeNvml(driver=False)).list()

    assert device.device == "cpu"
    assert device.total_memory_bytes == psutil.virtual_memory().total
    assert 0 < device.free_memory_bytes < device.total_memory_bytes
    assert 0 <= device.utilization <= 1


def test_on_a_host_that_has_no_gpu_for_sure_the_cpu_is_the_device():
    assert [device.device for device in HostDevices({}, lambda: None).list()] == ["cpu"]


def test_the_real_library_answers_on_this_host_too():
    assert HostDevices().list()
