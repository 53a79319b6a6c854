"""What tools return. The keys of the five main tools are fixed; others may be added, none renamed or removed."""

import math
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

import unslothd
from unslothd.v1.service_pb2 import PrepareForTrainingResponse
from unslothd.v1.training_pb2 import Training as TrainingMessage
from unslothd_mcp.plain import Plain, plain, short_name

SUCCESS = "success"
Success = Literal["success"]
_LONG = ("config", "train_dataset", "eval_dataset", "checkpoints")
_ENDED = frozenset({"succeeded", "failed", "cancelled"})


class Loaded(TypedDict):
    """A model that was loaded."""

    status: Success
    model_id: str
    model_name: str
    max_seq_length: int
    dtype: str
    device: str
    load_in_4bit: bool
    total_params: int
    memory_bytes: int
    warnings: list[str]
    next_step: str


class Prepared(TypedDict):
    """A model that can be trained."""

    status: Success
    message: str
    trainable_params: int
    total_params: int
    model_id: str
    training_config: dict[str, Any]
    lora: dict[str, Any] | None
    next_step: str


class Metrics(TypedDict):
    """Final figures of a training; runtime in seconds, loss in nats per token (null when it is not finite)."""

    train_runtime: float
    train_samples_per_second: float
    train_steps_per_second: float
    train_loss: float | None
    epoch: float
    train_tokens: int
    train_tokens_per_second: float
    peak_memory_bytes: int
    eval_loss: NotRequired[float | None]


class Trained(TypedDict):
    """A training that is done, or with wait=false one that was started (metrics is null)."""

    status: Success
    metrics: Metrics | None
    output_dir: str
    training_id: str
    state: str
    message: str
    next_step: str


class Done(TypedDict):
    """Something was done."""

    status: Success
    message: str
    next_step: str


class ModelConfig(TypedDict):
    """How a model was loaded."""

    model_name: str
    max_seq_length: int
    dtype: str
    load_in_4bit: bool
    device_map: str


class ListedModel(TypedDict):
    """A loaded model."""

    config: ModelConfig
    device: str
    state: str
    total_params: int
    trainable_params: int
    memory_bytes: int
    active_training_id: str


class TrainingView(TypedDict):
    """A training as it is now."""

    training_id: str
    model_id: str
    model_name: str
    state: str
    step: int
    total_steps: int
    last_sequence: int
    queue_position: int
    output_dir: str
    create_time: NotRequired[str]
    start_time: NotRequired[str]
    end_time: NotRequired[str]
    config: NotRequired[dict[str, Any]]
    train_dataset: NotRequired[dict[str, Any]]
    eval_dataset: NotRequired[dict[str, Any]]
    metrics: NotRequired[Metrics]
    error: NotRequired[dict[str, Any]]
    checkpoints: NotRequired[list[dict[str, Any]]]
    best_checkpoint: NotRequired[dict[str, Any]]
    labels: NotRequired[dict[str, str]]
    next_step: str


def loaded(model: unslothd.Model) -> Loaded:
    """Returns the result of unsloth_load_model."""
    return Loaded(
        status=SUCCESS,
        model_id=model.model_id,
        model_name=model.model_name,
        max_seq_length=model.max_seq_length,
        dtype=model.dtype,
        device=model.device,
        load_in_4bit=model.load_in_4bit,
        total_params=model.total_params,
        memory_bytes=model.memory_bytes,
        warnings=list(model.warnings),
        next_step=f'Call unsloth_prepare_for_training(model_id="{model.model_id}").',
    )


def prepared(response: PrepareForTrainingResponse) -> Prepared:
    """Returns the result of unsloth_prepare_for_training."""
    model = response.model
    share = f"{model.trainable_params / model.total_params:.2%} of " if model.total_params else ""
    return Prepared(
        status=SUCCESS,
        message=f"{model.model_id} trains {model.trainable_params} parameters, {share}{model.total_params}.",
        trainable_params=model.trainable_params,
        total_params=model.total_params,
        model_id=model.model_id,
        training_config=plain(response.training_config),
        lora=plain(response.lora) if response.HasField("lora") else None,
        next_step="Call unsloth_plan_training to see what a training would do, or unsloth_train.",
    )


def listed(model: unslothd.Model) -> ListedModel:
    """Returns the entry of a model in unsloth_list_models."""
    config = ModelConfig(
        model_name=model.model_name,
        max_seq_length=model.max_seq_length,
        dtype=model.dtype,
        load_in_4bit=model.load_in_4bit,
        device_map=model.device_map,
    )
    return ListedModel(
        config=config,
        device=model.device,
        state=short_name(unslothd.Model.State.DESCRIPTOR, model.state),
        total_params=model.total_params,
        trainable_params=model.trainable_params,
        memory_bytes=model.memory_bytes,
        active_training_id=model.active_training_id,
    )


def metrics(figures: unslothd.TrainingMetrics) -> Metrics:
    """Returns the final figures of a training."""
    result = Metrics(
        train_runtime=figures.train_runtime,
        train_samples_per_second=figures.train_samples_per_second,
        train_steps_per_second=figures.train_steps_per_second,
        train_loss=_finite(figures.train_loss),
        epoch=figures.epoch,
        train_tokens=figures.train_tokens,
        train_tokens_per_second=figures.train_tokens_per_second,
        peak_memory_bytes=figures.peak_memory_bytes,
    )
    if figures.HasField("eval_loss"):
        result["eval_loss"] = _finite(figures.eval_loss)
    return result


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def trained(training: unslothd.Training) -> Trained:
    """Returns the result of unsloth_train: of a training that is done, or that was only started."""
    done = training.state == TrainingMessage.STATE_SUCCEEDED
    state = training_state(training)
    if done:
        message = f"{training.training_id} is done: {training.step} steps; the adapter is in output_dir on the server."
    else:
        message = f"{training.training_id} is {state}; it goes on without this call."
    return Trained(
        status=SUCCESS,
        metrics=metrics(training.metrics) if done else None,
        output_dir=training.output_dir,
        training_id=training.training_id,
        state=state,
        message=message,
        next_step=after(training),
    )


def training_view(training: unslothd.Training, *, brief: bool = False) -> Plain:
    """Returns a training as it is now; brief: without config, datasets and checkpoints."""
    view = plain(training)
    for name in ("request_id", *(_LONG if brief else ())):
        view.pop(name, None)
    if training.HasField("metrics"):
        view["metrics"] = metrics(training.metrics)
    return view | {"next_step": after(training)}


def training_state(training: unslothd.Training) -> str:
    """Returns the state of a training: "running"."""
    return short_name(TrainingMessage.State.DESCRIPTOR, training.state)


def is_over(training: unslothd.Training) -> bool:
    """True when nothing happens to it any more, unless somebody resumes it."""
    return training_state(training) in _ENDED


def after(training: unslothd.Training) -> str:
    """Returns what can be done with a training in its state."""
    named, state = f'training_id="{training.training_id}"', training_state(training)
    if state == "succeeded":
        return (
            f'Call unsloth_generate(model_id="{training.model_id}", …) to try it, unsloth_export_model({named}, …) for '
            f'its files, unsloth_unload_model(model_id="{training.model_id}") when it is not needed any more.'
        )
    if state in {"paused", "cancelled"}:
        return f"Call unsloth_resume_training({named}) to go on from its newest checkpoint."
    if state == "failed":
        return f"Read error.message; then unsloth_resume_training({named}) from a checkpoint, or unsloth_train anew."
    return f"Call unsloth_watch_training({named}, after_sequence={training.last_sequence}) for what happens next."
