"""The trainer with the few things that Transformers does otherwise than the contract says."""

from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

from unslothd.v1.training_event_pb2 import TrainingWarning
from unslothd_server.engine import attention_lengths
from unslothd_server.engine.evaluation import within_memory
from unslothd_server.engine.passes import PassSplit, StepPasses
from unslothd_server.engine.step_clock import StepClock
from unslothd_server.engine.tokens import IGNORED_LABEL
from unslothd_server.engine.transfers import Reading, sent
from unslothd_server.engine.untouched import random_state_kept
from unslothd_server.errors import ExhaustedError

# Unsloth sends these numbers itself and needs them on the host too: it would wait for the device to have them back.
READ_BY_HOST = frozenset({"packed_seq_lengths"})


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


@dataclass(frozen=True)
class _Untold:
    """A step that is done but not logged yet.

    Args:
        figures: Sum of losses since the last log, norm of the gradients, tokens since the last log.
        others: What Transformers passes to its log beside the first two.
        learning_rate: Of the step.
    """

    figures: Reading
    others: tuple[Any, ...]
    learning_rate: float | None


def service_trainer_class(base: Any, clock: StepClock, hooks: TrainerHooks) -> Any:
    """Returns a subclass of `base`, Unsloth's SFTTrainer, which is known only once Unsloth is imported.

    Args:
        base: The class.
        clock: Is told when steps end, and stopped while the trainer evaluates or saves.
        hooks: What it calls.
    """
    import torch

    class ServiceTrainer(base):  # type: ignore[misc]
        """Counts eval loss by token, keeps the clock, writes no model card, never waits, ends a resumed run on time.

        A lack of memory in a pass is repaired at the same optimizer step. Evaluations change nothing but memory, and a
        lack of that does not end the training. A step is told when the device has done it; the next one has been
        launched by then, unless there is something to do between them.
        """

        passes: StepPasses  # set once the trainer is built
        _untold: _Untold | None = None
        _flops_per_token: int | None = None
        # Since the last log: a number, or a tensor where the tokens are.
        _uncounted_tokens: Any = 0

        def train(self, *args: Any, **kwargs: Any) -> Any:
            """Trains; whatever ends it, the last step that was done is told."""
            try:
                return super().train(*args, **kwargs)
            except Exception:
                # A device that is broken tells nothing more: what broke it is the error to raise.
                with suppress(Exception):
                    self.tell()
                raise
            finally:
                clock.stop()

        def get_train_dataloader(self) -> Any:
            """Batches stay on the host until their pass: to send or to cut them earlier is to wait for the device."""
            placement, self.accelerator.device_placement = self.accelerator.device_placement, False
            try:
                return super().get_train_dataloader()
            finally:
                self.accelerator.device_placement = placement

        def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
            """The inputs of the next optimizer step, and how many tokens of them are learnt."""
            self.passes.begin_step()
            samples, learnt = super().get_batch_samples(epoch_iterator, num_batches, torch.device("cpu"))
            return samples, sent(learnt, device) if isinstance(learnt, torch.Tensor) else learnt

        def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
            """One pass as configured, in as many parts as memory asks for."""
            hooks.beat()
            self.tell(wait=False)
            loss = self.passes.run(inputs, lambda part: self.one_pass(model, part, num_items_in_batch))
            if self.accelerator.sync_gradients:
                self.tell()
            return loss

        def one_pass(
            self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any, *, of_few_shapes: bool | None = None
        ) -> Any:
            """Forward and backward of exactly these inputs; a lack of memory is raised. Returns the loss.

            Args:
                model: Wrapped for training.
                inputs: Of one pass.
                num_items_in_batch: Learnt tokens of the optimizer step.
                of_few_shapes: Such passes have few shapes; by default what the split in force says.
            """
            few = self.passes.split.has_few_shapes if of_few_shapes is None else of_few_shapes
            with attention_lengths.kept() if few else nullcontext():
                return super().training_step(model, inputs, num_items_in_batch)

        def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
            """Sends a pass to the device; Transformers waits for it with every tensor."""
            device = self.args.device
            return {
                name: sent(value, device) if isinstance(value, torch.Tensor) and name not in READ_BY_HOST else value
                for name, value in inputs.items()
            }

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """Nothing: the folder of a training holds results, not a web page."""

        def floating_point_ops(self, inputs: dict[str, Any]) -> int:
            """As Transformers counts them, which counts the model's parameters in every pass: 3 ms with 16 layers."""
            tokens = inputs["input_ids"].numel()
            if self._flops_per_token is None:
                self._flops_per_token = super().floating_point_ops(inputs) // tokens
            return self._flops_per_token * tokens

        def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
            """Counts tokens where they are; Transformers waits for the device in every pass to read the number."""
            mask = inputs.get("attention_mask")
            # Without a mask the batch is flattened, and no token of it is padding.
            tokens = inputs["input_ids"].numel() if mask is None else mask.sum()
            self._uncounted_tokens += tokens

        def _count_tokens(self) -> None:
            self.state.num_input_tokens_seen += int(self._uncounted_tokens)
            self._uncounted_tokens = 0

        def _maybe_log_save_evaluate(
            self, tr_loss: Any, grad_norm: Any, *others: Any, learning_rate: float | None = None
        ) -> None:
            """Logs, evaluates and saves. A step that is only logged is told later, once the next one is launched."""
            if not self.control.should_log or self.state.global_step <= self._globalstep_last_logged:
                super()._maybe_log_save_evaluate(tr_loss, grad_norm, *others, learning_rate=learning_rate)
                return
            figures = Reading([tr_loss, grad_norm, self._uncounted_tokens])
            # Transformers empties this sum by subtracting it from itself; a loss that is no number would stay in it.
            tr_loss.zero_()
            self._uncounted_tokens = 0
            self._untold = _Untold(figures, others, learning_rate)
            self.control.should_log = False
            self.tell(wait=self._stands_here())

        def _stands_here(self) -> bool:
            """True when the next step does not follow at once."""
            control = self.control
            ends = control.should_training_stop or control.should_epoch_stop
            return ends or control.should_evaluate or control.should_save

        def tell(self, *, wait: bool = True) -> None:
            """Logs the last step if that is still to be done, and evaluates and saves if that is due.

            Args:
                wait: Until the device has done the step; else only if it has.
            """
            untold = self._untold
            if untold is None or not (wait or untold.figures.ready):
                return
            self._untold = None
            loss_sum, grad_norm, tokens = untold.figures.values()
            clock.note_step_end(untold.figures.made)
            self.state.num_input_tokens_seen += int(tokens)
            self.control.should_log = True
            loss = torch.tensor(loss_sum, dtype=torch.float64)
            super()._maybe_log_save_evaluate(loss, grad_norm, *untold.others, learning_rate=untold.learning_rate)
            self.control.should_log = False

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
