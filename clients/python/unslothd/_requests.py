"""Builds request messages from Python arguments, for both clients alike."""

import difflib
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias, TypedDict, cast

from google.protobuf.message import Message

from unslothd import _datasets, errors
from unslothd.v1 import generation_pb2, model_pb2, service_pb2, training_pb2


class TrainingOptions(TypedDict, total=False):
    """Hyper-parameters by the names of TrainingConfig; the contract has ranges and defaults."""

    learning_rate: float
    batch_size: int
    gradient_accumulation_steps: int
    warmup_steps: int
    max_steps: int
    num_train_epochs: float
    output_dir: str
    fp16: bool
    bf16: bool
    logging_steps: int
    save_steps: int
    optim: str
    weight_decay: float
    lr_scheduler_type: str
    seed: int
    use_gradient_checkpointing: bool
    packing: bool
    max_grad_norm: float
    eval_steps: int
    save_total_limit: int
    early_stopping_patience: int
    neftune_noise_alpha: float
    micro_batching: Literal["fixed", "tuned"]


class LoadOptions(TypedDict, total=False):
    """How to load a model, by the names of LoadModelRequest; the contract has ranges and defaults."""

    max_seq_length: int
    load_in_4bit: bool
    token: str
    device_map: str
    dtype: str
    revision: str
    full_finetuning: bool
    wait_for_memory: bool


class LoraOptions(TypedDict, total=False):
    """The adapter by the names of LoraConfig; the contract has ranges and defaults."""

    r: int
    lora_alpha: int
    lora_dropout: float
    target_modules: Sequence[str]
    use_rslora: bool
    modules_to_save: Sequence[str]
    layers_to_transform: Sequence[int]


class GenerationOptions(TypedDict, total=False):
    """How to generate, by the names of GenerateRequest; the contract has ranges and defaults."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: Sequence[str]
    without_adapter: bool


class HasTrainingId(Protocol):
    """A Training message or a TrainingRun."""

    @property
    def training_id(self) -> str:
        """Id of the training."""
        ...


ModelLike: TypeAlias = model_pb2.Model | str
TrainingLike: TypeAlias = HasTrainingId | str
DisconnectPolicyName: TypeAlias = Literal["detach", "cancel"]
TrainingState: TypeAlias = Literal[
    "queued", "running", "recovering", "pausing", "paused", "cancelling", "cancelled", "succeeded", "failed"
]
Prompt: TypeAlias = str | Sequence[Mapping[str, str]]


def model_id(model: ModelLike) -> str:
    """Returns the id of a model."""
    return model if isinstance(model, str) else model.model_id


def training_id(training: TrainingLike) -> str:
    """Returns the id of a training."""
    return training if isinstance(training, str) else training.training_id


def filled(message: Message, path: str, values: Mapping[str, Any]) -> None:
    """Sets fields of a message by name; None leaves a field unset.

    Args:
        message: Message to fill.
        path: Of the message in its request, e.g. "training_config."; for error texts.
        values: Field names and values; enum values may be given by their short name in any case.

    Raises:
        TypeError: A name that the message does not have; the text suggests the nearest one.
        InvalidRequest: Values of the wrong type, all of them at once.
    """
    fields = message.DESCRIPTOR.fields_by_name
    violations: list[errors.FieldViolation] = []
    for name, value in values.items():
        if name not in fields:
            near = difflib.get_close_matches(name, list(fields), n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(fields)}"
            raise TypeError(f"{message.DESCRIPTOR.name} has no field {name!r}; {hint}")
        if value is None:
            continue
        try:
            _set(message, fields[name], value)
        except (TypeError, ValueError) as error:
            violations.append(errors.FieldViolation(f"{path}{name}", f"{value!r} does not fit: {error}"))
    if violations:
        text = "; ".join(f"{each.field}: {each.description}" for each in violations)
        raise errors.InvalidRequest(text, reason="INVALID_FIELD", field_violations=violations)


def _set(message: Message, field: Any, value: Any) -> None:
    if field.is_repeated:
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise TypeError("a list is needed")
        getattr(message, field.name).extend(list(cast(Iterable[Any], value)))
    elif field.enum_type is not None and isinstance(value, str):
        setattr(message, field.name, _enum_number(field.enum_type, value))
    else:
        setattr(message, field.name, value)


def _enum_number(enum_type: Any, short_name: str) -> int:
    zero: str = enum_type.values_by_number[0].name
    prefix = zero.removesuffix("UNSPECIFIED")
    names = {value.name.removeprefix(prefix).lower(): value.number for value in enum_type.values if value.number}
    if short_name.lower() not in names:
        raise ValueError(f"use one of {', '.join(names)}")
    return names[short_name.lower()]


def load_model(model_name: str, request_id: str | None, options: LoadOptions) -> service_pb2.LoadModelRequest:
    """Returns the request for LoadModel; without a request_id it gets one of its own."""
    request = service_pb2.LoadModelRequest(model_name=model_name, request_id=request_id or str(uuid.uuid4()))
    filled(request, "", options)
    return request


def prepare(
    model: ModelLike,
    training_config: training_pb2.TrainingConfig | None,
    lora: model_pb2.LoraConfig | LoraOptions | None,
    options: TrainingOptions,
) -> service_pb2.PrepareForTrainingRequest:
    """Returns the request for PrepareForTraining."""
    request = service_pb2.PrepareForTrainingRequest(model_id=model_id(model))
    if training_config is not None or options:
        request.training_config.CopyFrom(config(training_config, options))
    if isinstance(lora, model_pb2.LoraConfig):
        request.lora.CopyFrom(lora)
    elif lora is not None:
        request.lora.SetInParent()
        filled(request.lora, "lora.", lora)
    return request


def config(base: training_pb2.TrainingConfig | None, options: TrainingOptions) -> training_pb2.TrainingConfig:
    """Returns a TrainingConfig: `base` with the options over it."""
    result = training_pb2.TrainingConfig()
    if base is not None:
        result.CopyFrom(base)
    filled(result, "training_config.", options)
    return result


def train(
    model: ModelLike,
    train_dataset: _datasets.DatasetLike,
    eval_dataset: _datasets.DatasetLike | None,
    *,
    row_format: Any,
    template: str,
    training_config: training_pb2.TrainingConfig | None,
    request_id: str | None,
    disconnect_policy: DisconnectPolicyName,
    labels: Mapping[str, str] | None,
    options: TrainingOptions,
) -> service_pb2.TrainRequest:
    """Returns the request for Train; without a request_id it gets one of its own."""
    request = service_pb2.TrainRequest(
        model_id=model_id(model), request_id=request_id or str(uuid.uuid4()), labels=labels or {}
    )
    request.train_dataset.CopyFrom(_dataset(train_dataset, row_format, template))
    if eval_dataset is not None:
        request.eval_dataset.CopyFrom(_dataset(eval_dataset, row_format, template))
    if training_config is not None or options:
        request.training_config.CopyFrom(config(training_config, options))
    filled(request, "", {"disconnect_policy": disconnect_policy})
    return request


def plan(
    model: ModelLike,
    train_dataset: _datasets.DatasetLike,
    eval_dataset: _datasets.DatasetLike | None,
    *,
    row_format: Any,
    template: str,
    training_config: training_pb2.TrainingConfig | None,
    measure: bool,
    preview_rows: int,
    options: TrainingOptions,
) -> service_pb2.PlanTrainingRequest:
    """Returns the request for PlanTraining."""
    request = service_pb2.PlanTrainingRequest(model_id=model_id(model), measure=measure, preview_rows=preview_rows)
    request.train_dataset.CopyFrom(_dataset(train_dataset, row_format, template))
    if eval_dataset is not None:
        request.eval_dataset.CopyFrom(_dataset(eval_dataset, row_format, template))
    if training_config is not None or options:
        request.training_config.CopyFrom(config(training_config, options))
    return request


def _dataset(data: _datasets.DatasetLike, row_format: Any, template: str) -> Any:
    return _datasets.dataset(data, row_format=row_format, template=template)


def list_trainings(
    model: ModelLike | None,
    states: Sequence[TrainingState],
    labels: Mapping[str, str] | None,
    page_size: int,
) -> service_pb2.ListTrainingsRequest:
    """Returns the request for the first page of ListTrainings."""
    request = service_pb2.ListTrainingsRequest(
        model_id=model_id(model) if model is not None else "", labels=labels or {}, page_size=page_size
    )
    try:
        enum_type = training_pb2.Training.State.DESCRIPTOR
        request.states.extend(cast(Any, [_enum_number(enum_type, state) for state in states]))
    except ValueError as error:
        raise errors.InvalidRequest(f"states: {error}") from error
    return request


def generate(model: ModelLike, prompt: Prompt, options: GenerationOptions) -> service_pb2.GenerateRequest:
    """Returns the request for Generate: a str is text to go on with, a sequence of dicts are chat turns."""
    request = service_pb2.GenerateRequest(model_id=model_id(model))
    if isinstance(prompt, str):
        request.prompt = prompt
    else:
        turns = [generation_pb2.ChatMessage(role=turn["role"], content=turn["content"]) for turn in prompt]
        request.chat.messages.extend(turns)
    filled(request, "", options)
    return request
