"""What tools take: hyper-parameters and adapters by the names of the contract, and datasets in every form.

Ranges are checked by the server, which names every wrong field at once.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias, cast

from pydantic import BeforeValidator, ConfigDict, Field, with_config
from typing_extensions import TypedDict


def _given(value: object) -> object:
    """Drops what is null: agents write it for "leave it at the default"."""
    if not isinstance(value, Mapping):
        return value
    return {key: each for key, each in cast(Mapping[str, Any], value).items() if each is not None}


def _checkpointing(value: object) -> object:
    return True if value == "unsloth" else value  # Unsloth's own name for what it does when this is true


@with_config(ConfigDict(extra="forbid"))
class TrainingConfig(TypedDict, total=False):
    """Hyper-parameters; each that is left out takes its default."""

    learning_rate: Annotated[float, Field(description="Peak learning rate, 0 to 1. Default 2e-4.")]
    batch_size: Annotated[int, Field(description="Sequences per device and forward pass. Default 2.")]
    gradient_accumulation_steps: Annotated[int, Field(description="Forward passes per optimizer step. Default 4.")]
    warmup_steps: Annotated[int, Field(description="Optimizer steps over which the rate rises from 0. Default 10.")]
    max_steps: Annotated[int, Field(description="Optimizer steps; not with num_train_epochs. Default 100.")]
    num_train_epochs: Annotated[float, Field(description="Passes over the rows; not with max_steps. Default: unset.")]
    output_dir: Annotated[
        str, Field(description="Folder below the server's output root. Default unsloth_finetuned_model(-2, -3, …).")
    ]
    fp16: Annotated[bool, Field(description="Mixed precision in float16. Default: only where bfloat16 is missing.")]
    bf16: Annotated[bool, Field(description="Mixed precision in bfloat16. Default: where supported.")]
    logging_steps: Annotated[int, Field(description="A step event every N optimizer steps. Default 1.")]
    save_steps: Annotated[int, Field(description="A checkpoint every N optimizer steps. Default 100.")]
    optim: Annotated[str, Field(description="Optimizer, as Transformers names it. Default adamw_8bit.")]
    weight_decay: Annotated[float, Field(description="Decoupled weight decay, 0 to 1. Default 0.01.")]
    lr_scheduler_type: Annotated[str, Field(description="linear, cosine, constant, … Default cosine.")]
    seed: Annotated[int, Field(description="Of data order, dropout and adapter weights. Default 42.")]
    use_gradient_checkpointing: Annotated[
        bool, BeforeValidator(_checkpointing), Field(description="Less memory, more time. Default true.")
    ]
    packing: Annotated[bool, Field(description="Several short sequences in one row. Default false.")]
    max_grad_norm: Annotated[float, Field(description="Gradients are scaled down to this norm; 0 = never. Default 1.")]
    eval_steps: Annotated[int, Field(description="Evaluate every N optimizer steps; 0 = only at the end. Default 0.")]
    save_total_limit: Annotated[int, Field(description="Keep the newest N checkpoints; 0 = all. Default 0.")]
    early_stopping_patience: Annotated[
        int, Field(description="Stop after N evaluations without a lower loss; 0 = never. Default 0.")
    ]
    neftune_noise_alpha: Annotated[float, Field(description="Noise on the embeddings; 0 = none. Default 0.")]
    micro_batching: Annotated[
        Literal["fixed", "tuned"],
        Field(
            description="How an optimizer step is split over passes: as given, or the fastest that fits. Default "
            "tuned when neither batch_size nor use_gradient_checkpointing is given."
        ),
    ]


@with_config(ConfigDict(extra="forbid"))
class Lora(TypedDict, total=False):
    """The adapter; each field that is left out takes its default."""

    r: Annotated[int, Field(description="Rank, 1 to 1024. Default 16.")]
    lora_alpha: Annotated[int, Field(description="The update is scaled by lora_alpha / r. Default r.")]
    lora_dropout: Annotated[float, Field(description="Probability, 0 to below 1. Default 0.")]
    target_modules: Annotated[list[str], Field(description="Names of linear modules. Default: all projections.")]
    use_rslora: Annotated[bool, Field(description="Scale by lora_alpha / sqrt(r). Default false.")]
    modules_to_save: Annotated[list[str], Field(description="Modules trained in full. Default: none.")]
    layers_to_transform: Annotated[list[int], Field(description="Indexes of layers, from 0. Default: all.")]


class ChatTurn(TypedDict):
    """One turn of a chat."""

    role: Annotated[str, Field(description="system, user or assistant.")]
    content: str


def options(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns hyper-parameters as keyword arguments of the client."""
    return dict(config or {})


ConfigArgument: TypeAlias = Annotated[
    TrainingConfig | None,
    BeforeValidator(_given),
    Field(description="Hyper-parameters; what is left out keeps its value. Default: all as prepared."),
]
LoraArgument: TypeAlias = Annotated[
    Lora | None, BeforeValidator(_given), Field(description="Adapter to attach. Default: rank 16 on all projections.")
]
ModelId: TypeAlias = Annotated[str, Field(description="As unsloth_load_model or unsloth_list_models returned it.")]
TrainingId: TypeAlias = Annotated[str, Field(description="As unsloth_train or unsloth_list_trainings returned it.")]
RowFormat: TypeAlias = Annotated[
    Literal["text", "chat", "prompt_completion", "alpaca"] | None,
    Field(description="Layout of the rows. Default: detected from their columns."),
]
Template: TypeAlias = Annotated[
    str,
    Field(
        description='Text with {column} places in place of row_format, e.g. "Q: {question} A: {answer}". Default "".'
    ),
]
