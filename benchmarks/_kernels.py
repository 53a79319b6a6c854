"""Which kernels a GPU runs in some steps of a training; for the engine and for plain scripts alike."""

import re
import sys
import time
import warnings
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
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
# Of the operator that launched a kernel and of those around it.
NESTED = 5


@dataclass
class KernelLook:
    """Profiles some steps of a training; call `step_done` after each, in the thread that trains.

    Args:
        warm_up: Steps before.
        steps: Steps that are looked at.
        operators: Tell which operators launched kernels; then launches take longer, and steps that are bound by them.
    """

    warm_up: int
    steps: int
    operators: bool = False
    _profiler: Any = field(default=None, init=False)
    _at: list[float] = field(default_factory=list, init=False)
    _buffers: dict[str, Any] = field(default_factory=dict, init=False)
    _waits: "_Waits | None" = field(default=None, init=False)

    def step_done(self, step: int) -> bool:
        """Returns True once it has seen enough."""
        if step == self.warm_up:
            import torch
            from torch.profiler import ProfilerActivity, profile

            # Without a GPU there are no kernels, and it refuses to look for none.
            device = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
            activities = {device, ProfilerActivity.CPU} if self.operators else {device}
            self._profiler = profile(activities=activities, record_shapes=self.operators)
            self._profiler.start()
            self._waits = _Waits()
        if self.warm_up <= step <= self.warm_up + self.steps:
            self._at.append(time.perf_counter())
        if step == self.warm_up + self.steps:
            self._waits.end()
            self._profiler.stop()
            self._buffers = _offload_buffers()
        return step >= self.warm_up + self.steps

    def figures(self) -> dict[str, Any]:
        """Of a step: seconds, kernels, seconds by kind of kernel, the dearest kernels, where the host waited.

        Then offloading's buffers, and which operators launched the dearest kernels if that was asked for.
        """
        figures = _figures(self._profiler, (self._at[-1] - self._at[0]) / self.steps, self.steps)
        calls = _waiting_calls(self._profiler, self.steps)
        figures |= {"offload_buffers": self._buffers, "waits": self._waits.by_place(self.steps), "waiting_calls": calls}
        return figures | ({"launchers": _launchers(self._profiler, self.steps)} if self.operators else {})


class _Waits:
    """Where the host waits for the device: torch warns of each call that does, but for waits for an event."""

    def __init__(self) -> None:
        import torch

        self._until = ExitStack()
        self._caught = self._until.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
            self._until.callback(torch.cuda.set_sync_debug_mode, "default")

    def end(self) -> None:
        """Stops looking."""
        self._until.close()

    def by_place(self, steps: int) -> dict[str, float]:
        """Waits of a step, by file and line, the most frequent first."""
        found = Counter(
            f"{'/'.join(Path(each.filename).parts[-3:])}:{each.lineno}"
            for each in self._caught
            if "synchronizing" in str(each.message)
        )
        return {place: count / steps for place, count in found.most_common()}


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


def _waiting_calls(profiler: Any, steps: int) -> dict[str, dict[str, float]]:
    """Calls of CUDA that return when the device has done something: times and seconds of a step."""
    calls, seconds = Counter[str](), Counter[str]()
    for event in profiler.events():
        if str(event.name).endswith("Synchronize"):
            calls[str(event.name)] += 1
            seconds[str(event.name)] += event.time_range.end - event.time_range.start
    return {name: {"calls": calls[name] / steps, "seconds": each / 1e6 / steps} for name, each in seconds.items()}


def _launchers(profiler: Any, steps: int) -> list[dict[str, Any]]:
    """Operators whose kernels, but for matrix products and attention, take the most time; their shapes and kinds."""
    seconds, calls = Counter[tuple[str, str, str]](), Counter[tuple[str, str, str]]()
    for event in profiler.events():
        for kernel in event.kernels:
            kind = _kind(kernel.name)
            if kind not in ("matrix products", "attention"):
                key = (kind, _nesting(event), str([shape for shape in event.input_shapes or [] if shape]))
                seconds[key] += kernel.duration
                calls[key] += 1
    return [
        {
            "kind": key[0],
            "operators": key[1],
            "shapes": key[2],
            "seconds": each / 1e6 / steps,
            "calls": calls[key] / steps,
        }
        for key, each in seconds.most_common(2 * DEAREST)
    ]


def _nesting(event: Any) -> str:
    """The operator and those around it, the innermost first."""
    names: list[str] = []
    while event is not None and len(names) < NESTED:
        names.append(str(event.name).removeprefix("autograd::engine::evaluate_function: "))
        event = event.cpu_parent
    return " < ".join(dict.fromkeys(names))


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
