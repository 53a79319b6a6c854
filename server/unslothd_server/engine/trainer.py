"""Unsloth's SFTTrainer, given tokenised rows and every field of the contract's config."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unslothd.v1.training_event_pb2 import TrainingWarning
from unslothd.v1.training_pb2 import TrainingConfig
from unslothd_server.engine.evaluation import within_memory
from unslothd_server.engine.model_loading import LoadedModel
from unslothd_server.engine.passes import PassSplit, StepPasses
from unslothd_server.engine.readback import uses_checkpointing
from unslothd_server.engine.step_clock import StepClock
from unslothd_server.engine.tokens import IGNORED_LABEL
from unslothd_server.engine.untouched import random_state_kept
from unslothd_server.errors import ExhaustedError

DEFAULT_MAX_STEPS = 100
# A tuned optimizer step may be too large to evaluate at once.
MAX_EVAL_BATCH_SIZE = 8


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


def build_trainer(
    loaded: LoadedModel,
    config: TrainingConfig,
    output_dir: Path,
    *,
    train_rows: Any,
    eval_rows: Any | None,
    callbacks: list[Any],
    clock: StepClock,
    hooks: TrainerHooks,
    evaluate_first: bool,
    split: PassSplit,
    tuned: bool = False,
) -> Any:
    """Builds a trainer; nothing runs yet.

    Args:
        loaded: A prepared model.
        config: Hyper-parameters; unset ones take the contract's defaults.
        output_dir: Folder of this training.
        train_rows: datasets.Dataset with input_ids and labels.
        eval_rows: The same to evaluate on; None = none.
        callbacks: Added after Transformers' own.
        clock: Is stopped while the trainer evaluates or saves.
        hooks: What it calls.
        evaluate_first: Evaluate before the first step; means nothing without eval_rows.
        split: How passes have to be cut to fit in memory, as far as is known.
        tuned: The trainer's passes get whole optimizer steps, which `pass_tuning` splits.
    """
    from trl import SFTTrainer

    config = _whole_steps(config, split) if tuned else config
    checkpointing = split.checkpointing or _get(config, "use_gradient_checkpointing", True)
    # Generation may have left the model in inference mode.
    set_checkpointing(loaded.model, on=checkpointing)
    arguments = _arguments(loaded, config, output_dir, has_eval=eval_rows is not None, tuned=tuned)
    arguments.eval_on_start = evaluate_first and eval_rows is not None
    trainer = _trainer_class(SFTTrainer, clock, hooks)(
        model=loaded.model,
        args=arguments,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=loaded.tokenizer,
        callbacks=callbacks,
    )
    trainer.passes = StepPasses(
        batch_size=arguments.per_device_train_batch_size,
        uses_checkpointing=lambda: uses_checkpointing(loaded.model),
        use_checkpointing=lambda: set_checkpointing(loaded.model, on=True),
        zero_gradients=lambda: loaded.model.zero_grad(set_to_none=True),
        repaired=hooks.repaired,
        split=split,
    )
    return trainer


def _arguments(loaded: LoadedModel, config: TrainingConfig, output_dir: Path, *, has_eval: bool, tuned: bool) -> Any:
    from trl import SFTConfig

    batch_size = _get(config, "batch_size", 2)
    eval_steps = _get(config, "eval_steps", 0)
    seed = _get(config, "seed", 42)
    learning_rate = _get(config, "learning_rate", 2e-4)
    scheduler = _get(config, "lr_scheduler_type", "cosine")
    evaluates_between = has_eval and eval_steps > 0
    return SFTConfig(
        output_dir=str(output_dir),
        learning_rate=learning_rate,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=min(batch_size, MAX_EVAL_BATCH_SIZE) if tuned else batch_size,
        gradient_accumulation_steps=_get(config, "gradient_accumulation_steps", 4),
        warmup_steps=_get(config, "warmup_steps", 10),
        **_duration(config),
        **_precision(config, loaded),
        logging_strategy="steps",
        logging_steps=_get(config, "logging_steps", 1),
        save_strategy="steps",
        save_steps=_get(config, "save_steps", 100),
        # Transformers counts the best one in, and at a limit of 1 keeps it instead of the newest.
        save_total_limit=None,
        optim=_get(config, "optim", "adamw_8bit"),
        weight_decay=_get(config, "weight_decay", 0.01),
        lr_scheduler_type=scheduler,
        # Transformers refuses a final rate that is not below the first one.
        lr_scheduler_kwargs={"lr_end": min(1e-7, learning_rate / 2)} if scheduler == "polynomial" else None,
        seed=seed,
        data_seed=seed,
        gradient_checkpointing=_get(config, "use_gradient_checkpointing", True),
        packing=_get(config, "packing", False),
        max_grad_norm=_get(config, "max_grad_norm", 1.0),
        neftune_noise_alpha=_get(config, "neftune_noise_alpha", 0.0) or None,
        eval_strategy="steps" if evaluates_between else "no",
        eval_steps=eval_steps if evaluates_between else None,
        prediction_loss_only=True,
        max_length=loaded.max_seq_length,
        include_num_input_tokens_seen="non_padding",
        # A loss that is not a number must be seen, not replaced by a mean.
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataset_num_proc=None,
    )


def _duration(config: TrainingConfig) -> dict[str, Any]:
    if config.HasField("num_train_epochs"):
        return {"num_train_epochs": config.num_train_epochs, "max_steps": -1}
    return {"max_steps": _get(config, "max_steps", DEFAULT_MAX_STEPS)}


def _precision(config: TrainingConfig, loaded: LoadedModel) -> dict[str, bool]:
    """As asked; else bfloat16 where a GPU has it, float16 where it has not, and plain float32 on a CPU."""
    import torch

    if config.HasField("fp16") or config.HasField("bf16"):
        return {"fp16": config.fp16, "bf16": config.bf16}
    if next(loaded.model.parameters()).device.type != "cuda":
        return {"fp16": False, "bf16": False}
    # Autocast must match the weights: Unsloth refuses bfloat16 mixed precision over float16 weights.
    dtype = loaded.model.get_input_embeddings().weight.dtype
    half = dtype == torch.float16 or not torch.cuda.is_bf16_supported()
    return {"fp16": half, "bf16": not half}


def set_checkpointing(model: Any, *, on: bool) -> None:
    """Puts a model into training mode, with its activations recomputed in the backward pass or kept."""
    from unsloth import FastLanguageModel

    FastLanguageModel.for_training(model, use_gradient_checkpointing=on)
    if not on:
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False


def _whole_steps(config: TrainingConfig, split: PassSplit) -> TrainingConfig:
    """The same optimizer steps with one pass each; without checkpointing, unless that is known to be needed."""
    whole = TrainingConfig()
    whole.CopyFrom(config)
    whole.batch_size = sequences_of_step(config)
    whole.gradient_accumulation_steps = 1
    whole.use_gradient_checkpointing = split.checkpointing
    return whole


def sequences_of_step(config: TrainingConfig) -> int:
    """Sequences of an optimizer step."""
    return _get(config, "batch_size", 2) * _get(config, "gradient_accumulation_steps", 4)


def _trainer_class(base: Any, clock: StepClock, hooks: TrainerHooks) -> Any:
    """The trainer with the few things that Transformers does otherwise than the contract says."""
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


def _get(config: TrainingConfig, name: str, default: Any) -> Any:
    return getattr(config, name) if config.HasField(name) else default
