"""What really is, read back from the model and the trainer, and where it differs from what was asked."""

import math
from dataclasses import dataclass
from typing import Any

from unslothd.v1.model_pb2 import Model
from unslothd.v1.training_event_pb2 import TrainingWarning
from unslothd.v1.training_pb2 import MICRO_BATCHING_FIXED, MICRO_BATCHING_TUNED, TrainingConfig
from unslothd_server.engine.adapters import attached
from unslothd_server.engine.devices import bytes_in_ram, device_name
from unslothd_server.engine.memory import memory_bytes
from unslothd_server.engine.model_loading import LoadedModel
from unslothd_server.engine.parameters import count_parameters

GIB = 1024**3
OPTIMIZER_NAMES = {"SGD": "sgd", "RMSprop": "rmsprop", "Adagrad": "adagrad", "Adafactor": "adafactor"}
# Not the trainer's business, or told apart by a warning of their own.
NOT_COMPARED = ("output_dir", "micro_batching", "optim")
# What tuning decides in place of the request.
TUNED_FIELDS = ("batch_size", "gradient_accumulation_steps", "use_gradient_checkpointing")


def describe_model(loaded: LoadedModel) -> Model:
    """Everything of Model that the engine knows; differences from the request are in `warnings`."""
    model = loaded.model
    counts = count_parameters(model)
    described = Model(
        model_name=loaded.request.model_name,
        max_seq_length=loaded.max_seq_length,
        dtype=weights_dtype(model),
        load_in_4bit=has_4bit_weights(model),
        device_map=loaded.device_map,
        device=device_name(model),
        total_params=counts.total,
        trainable_params=counts.trainable if loaded.prepared else 0,
        memory_bytes=memory_bytes(),
        full_finetuning=loaded.request.full_finetuning,
    )
    lora = attached(model) if loaded.prepared else None
    if lora is not None:
        described.lora.CopyFrom(lora)
    described.warnings.extend([*loaded.warnings, *_model_differences(loaded.request, described), *_in_ram(model)])
    return described


def _model_differences(request: Any, real: Model) -> list[str]:
    found: list[str] = []
    if request.HasField("load_in_4bit") and request.load_in_4bit and not real.load_in_4bit:
        cause = "full fine-tuning needs whole weights" if request.full_finetuning else f"not possible on {real.device}"
        found.append(f"load_in_4bit was asked for, but the weights are {real.dtype}: {cause}.")
    if request.HasField("load_in_4bit") and not request.load_in_4bit and real.load_in_4bit:
        found.append("load_in_4bit was refused, but the weights are stored in 4 bits and stay so.")
    if request.dtype and request.dtype != real.dtype:
        found.append(f"dtype {request.dtype} was asked for, but the weights are {real.dtype}.")
    if request.max_seq_length and request.max_seq_length != real.max_seq_length:
        found.append(
            f"max_seq_length {request.max_seq_length} was asked for, but this model's limit is {real.max_seq_length}."
        )
    return found


def _in_ram(model: Any) -> list[str]:
    there = bytes_in_ram(model)
    if not there:
        return []
    return [
        f"{there / GIB:.1f} GiB of embeddings lie in the host's RAM, as the device has little memory left for a "
        "training: the results are the same, and each pass sends its rows over. To have them on the device, free "
        "memory there and load the model again, or load it with a shorter max_seq_length."
    ]


def weights_dtype(model: Any) -> str:
    """Compute type of the base weights, e.g. "bfloat16"; for 4-bit weights the type they are computed in."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit" and getattr(module, "compute_dtype", None) is not None:
            return str(module.compute_dtype).removeprefix("torch.")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and "lora_" not in name:
            return str(parameter.dtype).removeprefix("torch.")
    return ""


def has_4bit_weights(model: Any) -> bool:
    """True when linear weights really are 4-bit."""
    return any(type(parameter).__name__ == "Params4bit" for parameter in model.parameters())


@dataclass(frozen=True)
class TrainerFacts:
    """What a trainer really does.

    Args:
        config: Every field set that has a meaning.
        warnings: One for each value that differs from the one asked for.
    """

    config: TrainingConfig
    warnings: list[TrainingWarning]


def read_trainer(trainer: Any, asked: TrainingConfig) -> TrainerFacts:
    """Reads a trainer whose optimizer and schedule exist.

    Args:
        trainer: From on_train_begin on.
        asked: The config of the request.
    """
    args = trainer.args
    groups = trainer.optimizer.param_groups
    real = TrainingConfig(
        learning_rate=float(groups[0].get("initial_lr", groups[0]["lr"])),
        batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        warmup_steps=int(args.get_warmup_steps(trainer.state.max_steps)),
        output_dir=asked.output_dir,
        fp16=bool(args.fp16),
        bf16=bool(args.bf16),
        logging_steps=int(args.logging_steps),
        save_steps=int(args.save_steps),
        optim=real_optimizer(trainer.optimizer, str(_value(args.optim))),
        weight_decay=max(float(group.get("weight_decay", 0.0)) for group in groups),
        lr_scheduler_type=str(_value(args.lr_scheduler_type)),
        seed=args.seed,
        use_gradient_checkpointing=uses_checkpointing(trainer.model),
        packing=bool(getattr(args, "packing", False)),
        max_grad_norm=float(args.max_grad_norm),
        eval_steps=int(args.eval_steps or 0) if _value(args.eval_strategy) == "steps" else 0,
        # The service's own doing, not the trainer's.
        save_total_limit=asked.save_total_limit,
        early_stopping_patience=asked.early_stopping_patience,
        neftune_noise_alpha=float(args.neftune_noise_alpha or 0.0),
        micro_batching=asked.micro_batching or MICRO_BATCHING_FIXED,
    )
    if asked.HasField("num_train_epochs"):
        real.num_train_epochs = float(args.num_train_epochs)
    else:
        real.max_steps = int(trainer.state.max_steps)
    return TrainerFacts(real, [*_optimizer_warning(asked, real), *_config_warnings(asked, real)])


def real_optimizer(optimizer: Any, named: str) -> str:
    """Name of an optimizer as Transformers names it, told by its class where the class tells it."""
    inner = getattr(optimizer, "optimizer", optimizer)
    kind = type(inner)
    if kind.__name__ == "AdamW" and kind.__module__.startswith("torch"):
        return "adamw_torch_fused" if inner.defaults.get("fused") else "adamw_torch"
    if kind.__module__.startswith(("torch", "transformers")):
        return OPTIMIZER_NAMES.get(kind.__name__, named)
    return named


def uses_checkpointing(model: Any) -> bool:
    """True when activations are recomputed in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _optimizer_warning(asked: TrainingConfig, real: TrainingConfig) -> list[TrainingWarning]:
    if not asked.HasField("optim") or asked.optim == real.optim:
        return []
    text = f"optim {asked.optim} is not there on this device; {real.optim} is used instead. Its result is the same but "
    text += "for the rounding of 8-bit states." if "8bit" in asked.optim else "for speed and memory."
    return [TrainingWarning(reason="OPTIMIZER_REPLACED", message=text)]


def _config_warnings(asked: TrainingConfig, real: TrainingConfig) -> list[TrainingWarning]:
    warnings: list[TrainingWarning] = []
    decided = TUNED_FIELDS if asked.micro_batching == MICRO_BATCHING_TUNED else ()
    for field, value in asked.ListFields():
        if field.name in NOT_COMPARED or field.name in decided or not real.HasField(field.name):
            continue
        have = getattr(real, field.name)
        if not math.isclose(have, value) if isinstance(value, float) else have != value:
            warnings.append(
                TrainingWarning(
                    reason="CONFIG_DIFFERS",
                    message=f"{field.name} {_text(value)} was asked for, but the trainer has {_text(have)}"
                    f"{_CAUSES.get(field.name, '.')}",
                )
            )
    return warnings


_CAUSES = {
    "packing": ": on this device Unsloth cannot keep packed rows apart, so rows are padded.",
    "bf16": ": this device does not compute in bfloat16; training runs in float32.",
    "fp16": ": this device does not train in float16; training runs in another precision.",
}


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _value(name: Any) -> Any:
    return getattr(name, "value", name)
