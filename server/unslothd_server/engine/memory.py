"""Memory that this process holds: on its GPU when it has one, else in RAM."""

import functools
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil


def memory_bytes() -> int:
    """Bytes held on the device now. Callable from any thread and before torch is imported."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "cuda") and torch.cuda.is_initialized():
        return _gpu_bytes(torch)
    return psutil.Process().memory_info().rss


# Asking the driver takes milliseconds, and a step asks; what it says beyond torch's own figures hardly changes.
_DRIVER_SECONDS = 5.0


@dataclass
class _DriverReading:
    """What the driver said last.

    Args:
        at: When, on the monotonic clock.
        beyond_torch: Bytes of this process that torch does not count: the CUDA context, libraries.
        utilization: Share of time the GPU was busy, 0 to 1; None where it cannot be read.
    """

    at: float = -_DRIVER_SECONDS
    beyond_torch: int = 0
    utilization: float | None = None


_last = _DriverReading()


def _reading(torch: Any) -> _DriverReading:
    """The last reading, or a new one when that is old. Two threads may both take one; either is right."""
    global _last  # noqa: PLW0603 - one driver, one reading
    now = time.monotonic()
    if now - _last.at >= _DRIVER_SECONDS:
        held = _driver_bytes()
        beyond = max(0, held - int(torch.cuda.memory_reserved())) if held else 0
        _last = _DriverReading(now, beyond, _utilization(torch))
    return _last


def _gpu_bytes(torch: Any) -> int:
    return int(torch.cuda.memory_reserved()) + _reading(torch).beyond_torch


def _driver_bytes() -> int:
    """What the driver says of this process, CUDA context included; 0 where it does not tell (some containers)."""
    try:
        import pynvml
    except ImportError:
        return 0
    found = 0
    try:
        _initialise(pynvml)
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                if process.pid == os.getpid():
                    found += process.usedGpuMemory or 0
    except pynvml.NVMLError:
        return 0
    return found


@functools.cache
def _initialise(pynvml: Any) -> None:
    """Once: every nvmlInit counts a user that nothing would ever take off again."""
    pynvml.nvmlInit()


def _utilization(torch: Any) -> float | None:
    try:
        return float(torch.cuda.utilization()) / 100
    except (RuntimeError, ImportError, AttributeError):
        return None


def gpu_utilization() -> float | None:
    """Share of time the GPU was busy, 0 to 1; None where there is none or it cannot be read."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return _reading(torch).utilization


@contextmanager
def device_memory_at_most(more_bytes: int) -> Iterator[None]:
    """Lets torch take no more than so much in addition: who shares the GPU keeps what is left. Nothing on a CPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        yield
        return
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    share = (torch.cuda.memory_reserved() + max(more_bytes, 0)) / total
    torch.cuda.set_per_process_memory_fraction(min(share, 1.0))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


class PeakMemory:
    """The highest memory seen since it was made; on a GPU also between two looks."""

    def __init__(self) -> None:
        self._peak = 0
        torch = sys.modules.get("torch")
        self._cuda = torch.cuda if torch is not None and torch.cuda.is_initialized() else None
        if self._cuda is not None:
            self._cuda.reset_peak_memory_stats()

    def look(self) -> tuple[int, int]:
        """Returns bytes now and the highest value so far."""
        now = memory_bytes()
        self._peak = max(self._peak, now)
        if self._cuda is not None:
            self._peak = max(self._peak, now - self._cuda.memory_reserved() + self._cuda.max_memory_reserved())
        return now, self._peak
