"""Copies between host and device that neither waits for, so that launches stay ahead of what the device runs."""

import sys
import time
from collections.abc import Sequence
from typing import Any


class Moment:
    """The point at which the device has done all that was launched before; for a CPU, when it was made."""

    def __init__(self) -> None:
        self._at = time.perf_counter()
        torch = sys.modules.get("torch")
        self._event: Any = None
        if torch is not None and torch.cuda.is_initialized():
            self._event = torch.cuda.Event(enable_timing=True, blocking=True)
            self._event.record()

    @property
    def reached(self) -> bool:
        """True when the device is there. A broken device raises what broke it."""
        return self._event is None or bool(self._event.query())

    def wait(self) -> None:
        """Returns when it is reached."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_after(self, earlier: "Moment") -> float:
        """Seconds between two moments, both reached, on the device's clock where there is one."""
        if self._event is None or earlier._event is None:
            return self._at - earlier._at
        return float(earlier._event.elapsed_time(self._event)) / 1000


class Reading:
    """Numbers on their way from the device, as they are now: later launches may change the tensors.

    Args:
        numbers: Tensors of one element on any device, or numbers of Python; whole ones up to 2^53.
    """

    def __init__(self, numbers: Sequence[Any]) -> None:
        self._places = [place for place, number in enumerate(numbers) if getattr(number, "is_cuda", False)]
        self._values = [0.0 if place in self._places else float(number) for place, number in enumerate(numbers)]
        self._here: Any = None
        if self._places:
            import torch

            there = torch.stack([numbers[place].detach().reshape(()).double() for place in self._places])
            self._here = _room_to_receive(there)
            self._here.copy_(there, non_blocking=True)
        self.made = Moment()

    @property
    def ready(self) -> bool:
        """True when the numbers are here."""
        return self._here is None or self.made.reached

    def values(self) -> list[float]:
        """The numbers, once they are here."""
        if self._here is not None:
            self.made.wait()
            for place, value in zip(self._places, self._here.tolist(), strict=True):
                self._values[place] = value
        return self._values


def _room_to_receive(tensor: Any) -> Any:
    """Memory of the host for a copy of a tensor, pinned where the host gives such: to other memory, copies wait."""
    import torch

    try:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    except RuntimeError:
        return torch.empty(tensor.shape, dtype=tensor.dtype)


def sent(tensor: Any, device: Any) -> Any:
    """A copy of a tensor on the device, in the order of launches; the tensor itself where it is there already."""
    if tensor.device == device or device.type != "cuda":
        return tensor.to(device)
    try:
        pinned = tensor.pin_memory()
    except RuntimeError:
        # The same copy, waited for.
        return tensor.to(device)
    return pinned.to(device, non_blocking=True)
