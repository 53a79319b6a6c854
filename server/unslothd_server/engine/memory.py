"""Memory that this process holds: on its GPU when it has one, else in RAM."""

import os
import sys

import psutil


def memory_bytes() -> int:
    """Bytes held on the device now. Callable from any thread and before torch is imported."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "cuda") and torch.cuda.is_initialized():
        return _gpu_bytes(torch)
    return psutil.Process().memory_info().rss


def _gpu_bytes(torch: object) -> int:
    measured = _driver_bytes()
    return measured or int(torch.cuda.memory_reserved())  # type: ignore[attr-defined]


def _driver_bytes() -> int:
    """What the driver says of this process, CUDA context included; 0 where it does not tell (some containers)."""
    try:
        import pynvml
    except ImportError:
        return 0
    found = 0
    try:
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                if process.pid == os.getpid():
                    found += process.usedGpuMemory or 0
    except pynvml.NVMLError:
        return 0
    return found


def gpu_utilization() -> float | None:
    """Share of time the GPU was busy, 0 to 1; None where there is none or it cannot be read."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        return float(torch.cuda.utilization()) / 100
    except (RuntimeError, ImportError, AttributeError):
        return None


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
