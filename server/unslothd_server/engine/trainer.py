"""Unsloth's SFTTrainer, given tokenised rows and every field of the contract's config."""

from pathlib import Path
from typing import Any

from unslothd.v1.training_pb2 import TrainingConfig
from unslothd_server.engine.devices import on_gpu
from unslothd_server.engine.model_loading import LoadedModel
from unslothd_server.engine.passes import PassSplit, StepPasses
from unslothd_server.engine.readback import uses_checkpointing
from unslothd_server.engine.service_trainer import TrainerHooks, service_trainer_class
from unslothd_server.engine.step_clock import StepClock

DEFAULT_MAX_STEPS = 100
# A tuned optimizer step may be too large to evaluate at once.
MAX_EVAL_BATCH_SIZE = 8


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
    for rows in (train_rows, eval_rows):
        _say_cut(rows, loaded.max_seq_length)
    trainer = service_trainer_class(SFTTrainer, clock, hooks)(
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
        # Rows are tokenised, cut, and without those that carry no loss. TRL and Unsloth would do all of it again: 2.7 s
        # for 20 000 short rows on two cores, and on hosts with more of them in forks of the process with the device.
        dataset_kwargs={"skip_prepare_dataset": not _get(config, "packing", False)},
    )


def _say_cut(rows: Any, max_seq_length: int) -> None:
    """Tells Unsloth that no row is longer: it joins sequences without padding only where it knows that."""
    if rows is not None:
        rows._unsloth_truncated_to = max_seq_length


def _duration(config: TrainingConfig) -> dict[str, Any]:
    if config.HasField("num_train_epochs"):
        return {"num_train_epochs": config.num_train_epochs, "max_steps": -1}
    return {"max_steps": _get(config, "max_steps", DEFAULT_MAX_STEPS)}


def _precision(config: TrainingConfig, loaded: LoadedModel) -> dict[str, bool]:
    """As asked; else bfloat16 where a GPU has it, float16 where it has not, and plain float32 on a CPU."""
    import torch

    if config.HasField("fp16") or config.HasField("bf16"):
        return {"fp16": config.fp16, "bf16": config.bf16}
    if not on_gpu(loaded.model):
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


def _get(config: TrainingConfig, name: str, default: Any) -> Any:
    return getattr(config, name) if config.HasField(name) else default
