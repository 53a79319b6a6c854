"""From the trainer's callbacks to the contract's events."""

import math
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from unslothd.v1.training_event_pb2 import Evaluation, StepProgress, TrainingEvent
from unslothd_server.engine.honesty import StepWatch
from unslothd_server.engine.memory import gpu_utilization
from unslothd_server.engine.run_figures import LogInterval, RunFigures
from unslothd_server.worker.ports import StopSignal

Emit = Callable[[TrainingEvent], None]


class EventCallback(TrainerCallback):
    """Emits an event for each logged step and evaluation, and obeys the stop signal.

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
        self._watch = StepWatch()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tells the plan as it really is."""
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
            # What a pause has not logged yet is logged when it goes on, as if there had been none.
            control.should_log = control.should_log or not self._stop.pause
            control.should_evaluate = False
            control.should_save = self._stop.keeps_checkpoint
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """A logged step; the summary that Transformers logs at the end is not one."""
        if logs is None or "loss" not in logs:
            return
        progress = self._progress(state, logs)
        self._emit(TrainingEvent(step=progress))
        for warning in self._watch.look(progress):
            self._emit(TrainingEvent(warning=warning))

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """A finished evaluation."""
        metrics = metrics or {}
        loss = float(metrics["eval_loss"])
        best = self._figures.evaluations.take(state.global_step, loss)
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

    def _progress(self, state: Any, logs: dict[str, Any]) -> StepProgress:
        figures, last = self._figures, self._figures.interval
        seconds = figures.clock.at_step_end
        tokens = int(state.num_input_tokens_seen)
        steps, spent = max(state.global_step - last.step, 1), max(seconds - last.seconds, 1e-9)
        figures.interval = LogInterval(state.global_step, tokens, seconds)
        memory, peak = figures.memory.look()
        progress = StepProgress(
            step=state.global_step,
            total_steps=state.max_steps,
            epoch=float(state.epoch or 0.0),
            loss=float(logs["loss"]),
            grad_norm=float(logs.get("grad_norm", 0.0)),
            learning_rate=float(logs.get("learning_rate", 0.0)),
            tokens=tokens,
            tokens_per_second=(tokens - last.tokens) / spent,
            step_seconds=spent / steps,
            eta_seconds=(state.max_steps - state.global_step) * spent / steps,
            memory_bytes=memory,
            peak_memory_bytes=peak,
        )
        busy = gpu_utilization()
        if busy is not None:
            progress.gpu_utilization = busy
        return progress
