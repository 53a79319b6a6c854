"""A few real passes of the longest rows, to measure memory and speed; the weights stay as they are."""

import gc
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

from unslothd_server.engine.memory import PeakMemory
from unslothd_server.engine.oom import exhausted
from unslothd_server.engine.tokens import IGNORED_LABEL

Result = TypeVar("Result")

TIMED_PASSES = 5
# No further pass is begun after that many seconds, but one is always timed.
PROBE_SECONDS = 10.0


@dataclass(frozen=True)
class Measured:
    """What a step of the longest rows costs.

    Args:
        peak_bytes: Highest memory, gradients and optimizer states included.
        step_seconds: One optimizer step.
        tokens_per_second: Of such a step; there is no padding in it.
    """

    peak_bytes: int
    step_seconds: float
    tokens_per_second: float


class DoesNotFitError(Exception):
    """A pass ran out of memory.

    Args:
        fitting_batch_size: The largest halved batch that fits; 0 = not even one row.
    """

    def __init__(self, fitting_batch_size: int) -> None:
        super().__init__(f"{fitting_batch_size} rows fit")
        self.fitting_batch_size = fitting_batch_size


def measure(trainer: Any, longest_row: dict[str, Any], check: Callable[[], None]) -> Measured:
    """Runs the probe.

    Args:
        trainer: Ready to train; its optimizer has not run and is not used afterwards.
        longest_row: With input_ids and labels.
        check: Called before every pass; raises to stop.

    Raises:
        DoesNotFitError: batch_size of the longest row, with the optimizer's states, do not fit.
    """
    asked = batch_size = trainer.args.per_device_train_batch_size
    while batch_size:
        _free(trainer)
        rows = [longest_row] * batch_size
        measured = _unless_out_of_memory(lambda rows=rows: _timed(trainer, rows, check))
        if measured is not None and batch_size == asked:
            return measured
        if measured is not None:
            break
        batch_size //= 2
    raise DoesNotFitError(batch_size)


def _timed(trainer: Any, rows: list[dict[str, Any]], check: Callable[[], None]) -> Measured:
    peak = Peak()
    begin = time.perf_counter()
    _pass(trainer, rows, check)
    optimizer_seconds = _optimizer_step(trainer)
    passes: list[float] = []
    while not passes or (len(passes) < TIMED_PASSES and time.perf_counter() - begin < PROBE_SECONDS):
        passes.append(_pass(trainer, rows, check))
    per_step = trainer.args.gradient_accumulation_steps
    seconds = per_step * statistics.median(passes) + optimizer_seconds
    tokens = per_step * sum(len(row["input_ids"]) for row in rows)
    return Measured(peak.bytes(), seconds, tokens / seconds)


def _pass(trainer: Any, rows: list[dict[str, Any]], check: Callable[[], None]) -> float:
    """Forward and backward as in training. Returns seconds."""
    check()
    inputs = trainer._prepare_inputs(trainer.data_collator(rows))
    learnt = int((inputs["labels"] != IGNORED_LABEL).sum()) * trainer.args.gradient_accumulation_steps
    wait_for_device(trainer)
    begin = time.perf_counter()
    trainer.one_pass(trainer.model_wrapped, inputs, learnt)
    wait_for_device(trainer)
    return time.perf_counter() - begin


def _optimizer_step(trainer: Any) -> float:
    """Makes the optimizer allocate its states, then times it. Without gradient, rate and decay no weight moves."""
    optimizer = trainer.optimizer
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.0, 0.0
    seconds = 0.0
    for _ in range(2):
        for parameter in trainer.model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        wait_for_device(trainer)
        begin = time.perf_counter()
        optimizer.step()
        wait_for_device(trainer)
        seconds = time.perf_counter() - begin
    return seconds


def _unless_out_of_memory(work: Callable[[], Result]) -> Result | None:
    try:
        return work()
    except Exception as error:
        if exhausted(error, "") is None:
            raise
        # The traceback's frames hold the tensors that did not fit.
        traceback.clear_frames(error.__traceback__)
        return None


def _free(trainer: Any) -> None:
    """Gives back what an earlier attempt left, and what the allocator keeps: the peak is read from it."""
    import torch

    trainer.model.zero_grad(set_to_none=True)
    trainer.optimizer.state.clear()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def wait_for_device(trainer: Any) -> None:
    """Returns when everything that was launched on the trainer's device is done."""
    import torch

    if trainer.args.device.type == "cuda":
        torch.cuda.synchronize(trainer.args.device)


class Peak:
    """The highest memory since it was made; on a CPU as the kernel counted it, where it lets us begin anew."""

    def __init__(self) -> None:
        self._memory = PeakMemory()
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._counted = True
        except OSError:
            self._counted = False

    def bytes(self) -> int:
        """That much."""
        import torch

        seen = self._memory.look()[1]
        if torch.cuda.is_initialized() or not self._counted:
            return seen
        lines = Path("/proc/self/status").read_text().splitlines()
        counted = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
        return max(seen, counted, psutil.Process().memory_info().rss)
