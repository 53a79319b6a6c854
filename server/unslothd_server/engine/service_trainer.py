"""The trainer with the few things that Transformers does otherwise than the contract says."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from unslothd.v1.training_event_pb2 import TrainingWarning
from unslothd_server.engine.evaluation import within_memory
from unslothd_server.engine.passes import PassSplit, StepPasses
from unslothd_server.engine.step_clock import StepClock
from unslothd_server.engine.tokens import IGNORED_LABEL
from unslothd_server.engine.untouched import random_state_kept
from unslothd_server.errors import ExhaustedError


@dataclass(frozen=True)
class TrainerHooks:
    """What a trainer calls besides its callbacks.

    Args:
        check_stop: Before every eval batch; raises to end the evaluation.
        save_checkpoint: With the trainer and what has it write its files: makes a checkpoint of its step.
        evaluation_over: With its optimizer step, when an evaluation is done or was left out.
        warn: Takes what a user should know of an evaluation.
        repaired: Takes what was changed because memory ran out in a pass, and the error.
        beat: Before every pass: the training is alive.
    """

    check_stop: Callable[[], None]
    save_checkpoint: Callable[[Any, Callable[[], None]], None]
    evaluation_over: Callable[[int], None]
    warn: Callable[[TrainingWarning], None]
    repaired: Callable[[PassSplit, ExhaustedError], None]
    beat: Callable[[], None]


def service_trainer_class(base: Any, clock: StepClock, hooks: TrainerHooks) -> Any:
    """Returns a subclass of `base`, Unsloth's SFTTrainer, which is known only once Unsloth is imported."""
    import torch

    class ServiceTrainer(base):  # type: ignore[misc]
        """Counts eval loss by token, keeps the clock, writes no model card, never waits, ends a resumed run on time.

        A lack of memory in a pass is repaired at the same optimizer step. Evaluations change nothing but memory, and a
        lack of that does not end the training.
        """

        passes: StepPasses  # set once the trainer is built

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            """The inputs of the next optimizer step."""
            self.passes.begin_step()
            return super().get_batch_samples(*args, **kwargs)

        def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
            """One pass as configured, in as many parts as memory asks for."""
            hooks.beat()
            return self.passes.run(inputs, lambda part: self.one_pass(model, part, num_items_in_batch))

        def one_pass(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:
            """Forward and backward of exactly these inputs; a lack of memory is raised. Returns the loss."""
            return super().training_step(model, inputs, num_items_in_batch)

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """Nothing: the folder of a training holds results, not a web page."""

        def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
            """Counts tokens on the device; Transformers waits for the device in every pass to read the number."""
            mask = inputs.get("attention_mask")
            # Without a mask the batch is flattened, and no token of it is padding.
            tokens = inputs["input_ids"].numel() if mask is None else mask.sum()
            self._uncounted_tokens = getattr(self, "_uncounted_tokens", 0) + tokens

        def _count_tokens(self) -> None:
            self.state.num_input_tokens_seen += int(getattr(self, "_uncounted_tokens", 0))
            self._uncounted_tokens = 0

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            """Logs with the tokens counted; one loss that is not a number must not make all later ones so."""
            self._count_tokens()
            if "loss" in logs:
                # Transformers empties this sum by subtracting it from itself.
                self._tr_loss.zero_()
            super().log(logs, *args, **kwargs)

        def interval_loss(self) -> float:
            """Sum of the losses since the last logged step."""
            return float(self._tr_loss)

        def go_on_from_interval(self, step: int, loss_sum: float) -> None:
            """Takes over an interval that a checkpoint divides; Transformers forgets its first part."""
            self._tr_loss.fill_(loss_sum)
            self._globalstep_last_logged = step

        def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
            # Transformers runs one step more when it resumes from the last step's checkpoint.
            if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
                self.control.should_training_stop = True
                return
            super()._run_epoch(*args, **kwargs)

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            """Evaluates with the step clock stopped; returns nothing when memory does not suffice."""
            step = self.state.global_step
            once = super().evaluate
            with clock.stopped(), random_state_kept():
                metrics = within_memory(lambda: once(*args, **kwargs), self.args, step, hooks.warn)
            hooks.evaluation_over(step)
            # Transformers tries again at the end of the epoch what did not end with its callback.
            self.control.should_evaluate = False
            return metrics

        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            self._count_tokens()
            write = super()._save_checkpoint
            with clock.stopped():
                hooks.save_checkpoint(self, lambda: write(*args, **kwargs))

        def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
            """The mean over tokens; Transformers' own is a mean over rows of batch means."""
            self._eval_loss_sum, self._eval_tokens = 0.0, 0
            output = super().evaluation_loop(*args, **kwargs)
            prefix = kwargs.get("metric_key_prefix", "eval")
            if self._eval_tokens and f"{prefix}_loss" in output.metrics:
                output.metrics[f"{prefix}_loss"] = self._eval_loss_sum / self._eval_tokens
            return output

        def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            """Adds a batch's loss, weighed by its tokens."""
            hooks.check_stop()
            tokens = int((inputs["labels"][..., 1:] != IGNORED_LABEL).sum())
            with torch.no_grad():
                result = super().prediction_step(model, inputs, *args, **kwargs)
            self._eval_loss_sum += float(result[0]) * tokens
            self._eval_tokens += tokens
            return result

    return ServiceTrainer
