"""The training config: defaults, and how an override meets what was prepared."""

from typing import Literal

from unslothd.v1.model_pb2 import Model
from unslothd.v1.training_pb2 import MicroBatching, TrainingConfig

DEFAULT_OUTPUT_DIR = "unsloth_finetuned_model"

DEFAULTS = TrainingConfig(
    learning_rate=2e-4,
    batch_size=2,
    gradient_accumulation_steps=4,
    warmup_steps=10,
    output_dir=DEFAULT_OUTPUT_DIR,
    logging_steps=1,
    save_steps=100,
    optim="adamw_8bit",
    weight_decay=0.01,
    lr_scheduler_type="cosine",
    seed=42,
    use_gradient_checkpointing=True,
    packing=False,
    max_grad_norm=1.0,
    eval_steps=0,
    save_total_limit=0,
    early_stopping_patience=0,
    neftune_noise_alpha=0.0,
)
DEFAULT_MAX_STEPS = 100

_Rival = Literal["max_steps", "num_train_epochs", "fp16", "bf16"]
# Setting one of a pair in an override drops the other from what was prepared.
_RIVALS: dict[str, _Rival] = {
    "max_steps": "num_train_epochs",
    "num_train_epochs": "max_steps",
    "fp16": "bf16",
    "bf16": "fp16",
}


def merged(prepared: TrainingConfig, override: TrainingConfig) -> TrainingConfig:
    """Returns the prepared config with each field of the override in its place."""
    result = TrainingConfig()
    result.CopyFrom(prepared)
    for field, value in override.ListFields():
        rival = _RIVALS.get(field.name)
        if rival is not None and value and not override.HasField(rival):
            result.ClearField(rival)
        setattr(result, field.name, value)
    return result


def completed(config: TrainingConfig, model: Model) -> TrainingConfig:
    """Returns the config with every unset field at its default for this model."""
    result = TrainingConfig()
    result.CopyFrom(DEFAULTS)
    result.MergeFrom(config)
    if not result.HasField("max_steps") and not result.HasField("num_train_epochs"):
        result.max_steps = DEFAULT_MAX_STEPS
    on_gpu = model.device.startswith("cuda")
    if not result.HasField("fp16"):
        result.fp16 = on_gpu and model.dtype == "float16" and not result.bf16
    if not result.HasField("bf16"):
        result.bf16 = on_gpu and model.dtype == "bfloat16" and not result.fp16
    if not result.micro_batching:
        result.micro_batching = _micro_batching(config, on_gpu=on_gpu)
    return result


def _micro_batching(config: TrainingConfig, *, on_gpu: bool) -> MicroBatching.ValueType:
    """A CPU takes as long for two small passes as for one large one, and equal seeds shall give equal bits there."""
    fixed = config.HasField("batch_size") or config.HasField("use_gradient_checkpointing") or not on_gpu
    return MicroBatching.MICRO_BATCHING_FIXED if fixed else MicroBatching.MICRO_BATCHING_TUNED


def set_fields(config: TrainingConfig) -> list[str]:
    """Names of the fields that are set."""
    return [field.name for field, _ in config.ListFields()]
