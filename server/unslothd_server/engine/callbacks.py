"""From the trainer's callbacks to the contract's events."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from transformers import TrainerCallback

from unslothd.v1.training_event_pb2 import Evaluation, StepProgress, TrainingEvent, TrainingWarning
from unslothd.v1.training_pb2 import Checkpoint
from unslothd_server.engine.memory import PeakMemory, gpu_utilization
from unslothd_server.engine.step_clock import StepClock
from unslothd_server.worker.ports import StopSignal

Emit = Callable[[TrainingEvent], None]


@dataclass
class RunFigures:
    """What is known of a run besides Transformers' own state.

    Args:
        clock: Seconds spent in steps.
        memory: Peak so far.
        eval_loss: Of the last evaluation.
        eval_step: Step of the last evaluation.
        best_eval_loss: Lowest so far.
        saved_step: Step of the last whole checkpoint.
    """

    clock: StepClock
    memory: PeakMemory
    eval_loss: float | None = None
    eval_step: int | None = None
    best_eval_loss: float = math.inf
    saved_step: int | None = None
    warned: set[str] = field(default_factory=set)


class EventCallback(TrainerCallback):
    """Emits an event for each logged step, evaluation and checkpoint, and obeys the stop signal.

    Args:
        emit: Takes events; returns once one is in the log.
        stop: Looked at after every step.
        figures: Kept up to date.
        on_begin: Called once before the first step, when optimizer, schedule and restored state are there.
        has_eval: True with an eval dataset.
    """

    def __init__(
        self,
        emit: Emit,
        stop: StopSignal,
        figures: RunFigures,
        *,
        on_begin: Callable[[], None],
        has_eval: bool,
    ) -> None:
        self._emit = emit
        self._stop = stop
        self._figures = figures
        self._on_begin = on_begin
        self._has_eval = has_eval
        self._last = (0, 0, 0.0)  # step, tokens and seconds at the last log

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tells the plan as it really is."""
        logged = [entry for entry in state.log_history if "elapsed_seconds" in entry]
        if logged:
            self._figures.clock.go_on_from(logged[-1]["elapsed_seconds"])
        self._last = (state.global_step, state.num_input_tokens_seen, self._figures.clock.elapsed())
        self._on_begin()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        self._figures.clock.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """The step boundary: the last step is always logged and evaluated, and a stop acts here."""
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_evaluate = self._has_eval
        elif self._stop.requested.is_set():
            control.should_training_stop = True
            control.should_log = True
            control.should_evaluate = False
            control.should_save = self._stop.keeps_checkpoint
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """A logged step; the summary that Transformers logs at the end is not one."""
        if logs is None or "loss" not in logs:
            return
        progress = self._progress(state, logs)
        self._emit(TrainingEvent(step=progress))
        self._warn_if_nothing_is_learnt(progress)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """A finished evaluation."""
        metrics = metrics or {}
        loss = float(metrics["eval_loss"])
        figures = self._figures
        best = loss <= figures.best_eval_loss
        figures.best_eval_loss = min(loss, figures.best_eval_loss)
        figures.eval_loss, figures.eval_step = loss, state.global_step
        known = ("eval_loss", "eval_runtime", "epoch")
        self._emit(
            TrainingEvent(
                evaluation=Evaluation(
                    step=state.global_step,
                    eval_loss=loss,
                    perplexity=math.exp(loss) if loss < 700 else math.inf,  # noqa: PLR2004 - exp overflows
                    seconds=float(metrics.get("eval_runtime", 0.0)),
                    metrics={
                        name.removeprefix("eval_"): float(value)
                        for name, value in metrics.items()
                        if name not in known and isinstance(value, int | float)
                    },
                    best=best,
                )
            )
        )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint that is whole."""
        self.checkpoint_saved(Path(args.output_dir), state.global_step)

    def checkpoint_saved(self, output_dir: Path, step: int) -> None:
        """Emits the event of a checkpoint, once its files are on the disk and not only in its cache."""
        figures = self._figures
        figures.saved_step = step
        now = Timestamp()
        now.GetCurrentTime()
        saved = Checkpoint(step=step, path=str(output_dir / f"checkpoint-{step}"), create_time=now)
        if figures.eval_step == step and figures.eval_loss is not None:
            saved.eval_loss = figures.eval_loss
        self._emit(TrainingEvent(checkpoint_saved=saved))

    def _progress(self, state: Any, logs: dict[str, Any]) -> StepProgress:
        figures = self._figures
        seconds = figures.clock.elapsed()
        # Until the next step begins, time is not the training's.
        figures.clock.stop()
        last_step, last_tokens, last_seconds = self._last
        tokens = int(state.num_input_tokens_seen)
        steps, spent = max(state.global_step - last_step, 1), max(seconds - last_seconds, 1e-9)
        self._last = (state.global_step, tokens, seconds)
        memory, peak = figures.memory.look()
        progress = StepProgress(
            step=state.global_step,
            total_steps=state.max_steps,
            epoch=float(state.epoch or 0.0),
            loss=float(logs["loss"]),
            grad_norm=float(logs.get("grad_norm", 0.0)),
            learning_rate=float(logs.get("learning_rate", 0.0)),
            tokens=tokens,
            tokens_per_second=(tokens - last_tokens) / spent,
            step_seconds=spent / steps,
            eta_seconds=(state.max_steps - state.global_step) * spent / steps,
            memory_bytes=memory,
            peak_memory_bytes=peak,
        )
        busy = gpu_utilization()
        if busy is not None:
            progress.gpu_utilization = busy
        return progress

    def _warn_if_nothing_is_learnt(self, progress: StepProgress) -> None:
        if not (math.isfinite(progress.loss) and math.isfinite(progress.grad_norm)):
            self._warn_once(
                "NOT_FINITE",
                f"Step {progress.step}: loss {progress.loss} and grad_norm {progress.grad_norm} are not both finite, "
                "so the weights may be spoilt. Cancel, and train with a lower learning_rate or another precision.",
            )
        elif progress.grad_norm == 0.0:
            self._warn_once(
                "ZERO_GRADIENTS",
                f"Step {progress.step}: the gradients are zero, so nothing was learnt. Look at the preview in the "
                "started event: do the right tokens carry loss?",
            )

    def _warn_once(self, reason: str, message: str) -> None:
        if reason not in self._figures.warned:
            self._figures.warned.add(reason)
            self._emit(TrainingEvent(warning=TrainingWarning(reason=reason, message=message)))
