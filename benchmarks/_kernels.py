"""Which kernels a GPU runs in some steps of a training; for the engine and for plain scripts alike."""

import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

# The first that matches a kernel's name.
KINDS = (
    ("attention", r"flash|fmha|attention"),
    ("4-bit weights", r"dequant|4bit|nf4"),
    ("optimizer", r"8bit|optimizer|adam|multi_tensor"),
    ("loss", r"cross_entropy|cce|softmax|nll"),
    ("matrix products", r"gemm|nvjet|xmma|cutlass|splitk|cublas|matmul"),
    ("norms, activations, rotary", r"rms|layer_?norm|swiglu|geglu|rope|_fg_kernel|silu"),
    ("copies from and to the host", r"memcpy.*(dtoh|htod)"),
    ("copies", r"memcpy|memset|copy"),
    ("elementwise and sums", r"elementwise|reduce|triton|foreach|fill|cat"),
)
DEAREST = 12


@dataclass
class KernelLook:
    """Profiles some steps of a training; call `step_done` after each, in the thread that trains.

    Args:
        warm_up: Steps before.
        steps: Steps that are looked at.
    """

    warm_up: int
    steps: int
    _profiler: Any = field(default=None, init=False)
    _at: list[float] = field(default_factory=list, init=False)
    _buffers: dict[str, Any] = field(default_factory=dict, init=False)

    def step_done(self, step: int) -> bool:
        """Returns True once it has seen enough."""
        if step == self.warm_up:
            import torch
            from torch.profiler import ProfilerActivity, profile

            # Without a GPU there are no kernels, and it refuses to look for none.
            activity = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
            self._profiler = profile(activities=[activity])
            self._profiler.start()
        if self.warm_up <= step <= self.warm_up + self.steps:
            self._at.append(time.perf_counter())
        if step == self.warm_up + self.steps:
            self._profiler.stop()
            self._buffers = _offload_buffers()
        return step >= self.warm_up + self.steps

    def figures(self) -> dict[str, Any]:
        """Seconds and kernels of a step; seconds by kind of kernel; the dearest kernels; offloading's buffers."""
        figures = _figures(self._profiler, (self._at[-1] - self._at[0]) / self.steps, self.steps)
        return figures | {"offload_buffers": self._buffers}


def _figures(profiler: Any, step_seconds: float, steps: int) -> dict[str, Any]:
    kernels = [
        (str(event.name), event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if str(event.device_type).endswith("CUDA")
    ]
    kinds, names, calls = Counter[str](), Counter[str](), Counter[str]()
    for name, start, end in kernels:
        kinds[_kind(name)] += end - start
        names[name] += end - start
        calls[name] += 1
    micro = 1e6 * steps
    return {
        "step_seconds": step_seconds,
        "busy_seconds": _busy_microseconds(kernels) / micro,
        "kernels_per_step": len(kernels) / steps,
        "kinds": {kind: each / micro for kind, each in kinds.most_common()},
        "dearest": [
            {"name": name, "seconds": each / micro, "calls": calls[name] / steps}
            for name, each in names.most_common(DEAREST)
        ],
    }


def _offload_buffers() -> dict[str, Any]:
    """The buffers in RAM to which Unsloth copies layer inputs; copies to and from pageable ones are not hidden."""
    unsloths = sys.modules.get("unsloth_zoo.gradient_checkpointing")
    buffers = [each for each in getattr(unsloths, "CPU_BUFFERS", None) or () if each is not None]
    pinned = [each for each in buffers if each.is_pinned()]
    return {
        "pinned": len(pinned),
        "pageable": len(buffers) - len(pinned),
        "bytes": sum(each.untyped_storage().nbytes() for each in buffers),
    }


def _kind(name: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "others")


def _busy_microseconds(kernels: list[tuple[str, float, float]]) -> float:
    """Time in which at least one kernel ran."""
    busy = until = 0.0
    for _, start, end in sorted(kernels, key=lambda kernel: kernel[1]):
        busy += max(end - max(start, until), 0.0)
        until = max(until, end)
    return busy


def product_tflops() -> float:
    """Rate of the largest product of an 8B Llama, many times in a row, in 10^12 operations a second."""
    import torch

    rows, inner, columns_of_it, times = 16384, 4096, 14336, 40
    left = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16)
    right = torch.randn(inner, columns_of_it, device="cuda", dtype=torch.bfloat16)
    for _ in range(times):
        left @ right
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(times):
        left @ right
    torch.cuda.synchronize()
    return 2 * rows * inner * columns_of_it * times / (time.perf_counter() - begin) / 1e12
