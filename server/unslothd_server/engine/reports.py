"""The plan before the first step and the metrics after the last one."""

from typing import Any

from unslothd.v1.training_event_pb2 import TrainingWarning
from unslothd.v1.training_pb2 import PassChoice, PassCost, TrainingConfig, TrainingMetrics, TrainingPlan
from unslothd.worker.v1.worker_service_pb2 import StartTrainingRequest
from unslothd_server.engine import micro_batching
from unslothd_server.engine.devices import compute_device
from unslothd_server.engine.footprint import footprint
from unslothd_server.engine.parameters import count_parameters
from unslothd_server.engine.run_figures import RunFigures
from unslothd_server.engine.tokens import TokenisedDataset


def plan(
    trainer: Any,
    train_rows: TokenisedDataset,
    eval_rows: TokenisedDataset | None,
    config: TrainingConfig,
    warnings: list[TrainingWarning],
) -> TrainingPlan:
    """What the trainer is about to do.

    Args:
        trainer: From on_train_begin on.
        train_rows: Rows that are trained on.
        eval_rows: Rows that are evaluated on; None = none.
        config: Read back from the trainer.
        warnings: All that were noticed.
    """
    return TrainingPlan(
        config=config,
        row_format=train_rows.row_format,
        num_rows=train_rows.num_rows,
        num_tokens=train_rows.num_tokens,
        total_steps=trainer.state.max_steps,
        trainable_params=count_parameters(trainer.model).trainable,
        memory_free_bytes=free_memory(trainer.model),
        preview=train_rows.preview,
        warnings=[warning.message for warning in warnings],
        longest_row_tokens=train_rows.longest_row_tokens,
        truncated_rows=train_rows.truncated_rows,
        dropped_rows=train_rows.dropped_rows,
        loss_tokens=train_rows.loss_tokens,
        num_eval_rows=0 if eval_rows is None else eval_rows.num_rows,
        mean_row_tokens=train_rows.mean_row_tokens,
        memory_estimate_bytes=footprint(trainer).peak(config.batch_size * train_rows.longest_row_tokens),
    )


def add_tuning(plan: TrainingPlan, tuning: micro_batching.Tuning) -> None:
    """Puts what tuning found into a plan."""
    choice = tuning.choice
    plan.passes.CopyFrom(
        PassChoice(
            max_tokens=choice.split.tokens,
            joined=choice.split.joined,
            use_gradient_checkpointing=choice.split.checkpointing,
            step_seconds=choice.seconds,
            tokens_per_second=choice.tokens / choice.seconds,
            remembered=tuning.remembered,
            probe_seconds=0.0 if tuning.remembered else tuning.probe_seconds,
            costs=[_pass_cost(cost) for cost in tuning.costs],
        )
    )
    plan.memory_estimate_bytes = tuning.held_bytes + round(choice.num_bytes)
    plan.memory_measured = True
    plan.step_seconds = choice.seconds
    plan.tokens_per_second = plan.passes.tokens_per_second


def _pass_cost(cost: micro_batching.PassCost) -> PassCost:
    return PassCost(
        joined=cost.joined,
        use_gradient_checkpointing=cost.checkpointing,
        seconds=cost.seconds,
        seconds_per_token=cost.seconds_per_token,
        num_bytes=round(cost.num_bytes),
        bytes_per_token=round(cost.bytes_per_token),
        seconds_per_length=cost.seconds_per_length,
    )


def useless_settings(request: StartTrainingRequest) -> list[TrainingWarning]:
    """Warnings for settings that can have no effect in this request."""
    config, has_eval = request.config, request.HasField("eval_dataset")
    texts: list[str] = []
    if config.eval_steps and not has_eval:
        texts.append("eval_steps has no effect without an eval dataset.")
    elif config.early_stopping_patience and not (has_eval and config.eval_steps):
        texts.append("early_stopping_patience has no effect without an eval dataset and eval_steps.")
    return [TrainingWarning(reason="CONFIG_DIFFERS", message=text) for text in texts]


def metrics(trainer: Any, figures: RunFigures) -> TrainingMetrics:
    """Final figures over all steps, those before a resume included."""
    seconds = max(figures.clock.elapsed(), 1e-9)
    state = trainer.state
    sequences = trainer.get_total_train_batch_size(trainer.args) * state.global_step
    tokens = int(state.num_input_tokens_seen)
    final = TrainingMetrics(
        train_runtime=seconds,
        train_samples_per_second=sequences / seconds,
        train_steps_per_second=state.global_step / seconds,
        train_loss=_mean_loss(state.log_history),
        epoch=float(state.epoch or 0.0),
        train_tokens=tokens,
        train_tokens_per_second=tokens / seconds,
        peak_memory_bytes=figures.memory.look()[1],
    )
    eval_loss = figures.evaluations.loss_at(state.global_step)
    if eval_loss is not None:
        final.eval_loss = eval_loss
    return final


def _mean_loss(history: list[dict[str, Any]]) -> float:
    """Mean over all steps since the first one; Transformers' own forgets the steps before a resume."""
    total, last = 0.0, 0
    for entry in history:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - last)
            last = entry["step"]
    return total / last if last else 0.0


def free_memory(model: Any) -> int:
    """Bytes that are free on the model's device now."""
    import psutil
    import torch

    device = compute_device(model)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
