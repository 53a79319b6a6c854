"""What a training would do, told by the trainer itself: it is made, asked just before its first step, and let go."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.neftune import deactivate_neftune

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.training_pb2 import MICRO_BATCHING_TUNED, TrainingPlan
from unslothd.worker.v1.worker_service_pb2 import PlanTrainingRequest, StartTrainingRequest
from unslothd_server.engine import honesty, readback, reports
from unslothd_server.engine.attention_lengths import of_one_length_kept
from unslothd_server.engine.layouts import NO_PREFERENCE_METHOD
from unslothd_server.engine.model_loading import LoadedModel
from unslothd_server.engine.parameters import count_parameters
from unslothd_server.engine.pass_tuning import longest_passes, tune
from unslothd_server.engine.passes import PassSplit, split_config
from unslothd_server.engine.prepared_rows import PreparedRows, prepare_rows
from unslothd_server.engine.probe import DoesNotFitError, measure
from unslothd_server.engine.service_trainer import TrainerHooks
from unslothd_server.engine.step_clock import StepClock
from unslothd_server.engine.trainer import build_trainer
from unslothd_server.engine.untouched import model_kept, random_state_kept
from unslothd_server.errors import AbortedError


class _Ready(Exception):
    """Unwinds out of a trainer that is about to take its first step."""


def plan_training(loaded: LoadedModel, request: PlanTrainingRequest, cancelled: Event) -> TrainingPlan:
    """Works out a plan. Leaves model, random state and disk as they were.

    Args:
        loaded: A prepared model.
        request: What would be trained, and whether to measure.
        cancelled: Ends it at the next row or pass.

    Raises:
        UnslothdError: What a training would raise before its first step.
        AbortedError: It was cancelled.
    """

    def check() -> None:
        if cancelled.is_set():
            raise AbortedError(
                ErrorReason.ERROR_REASON_TRAINING_CANCELLED, "The plan was cancelled. Nothing was changed; plan again."
            )

    rows = prepare_rows(
        request.training,
        loaded.tokenizer,
        loaded.max_seq_length,
        check=check,
        preview_rows=max(request.preview_rows, 1),
        for_training=False,
    )
    if rows.train.row_format.WhichOneof("layout") == "preference":
        return _preference_plan(loaded, request.training, rows)
    with (
        random_state_kept(),
        model_kept(loaded.model),
        of_one_length_kept(rows, packing=request.training.config.packing),
        _ready_trainer(loaded, request.training, rows, check) as trainer,
    ):
        if request.training.config.micro_batching == MICRO_BATCHING_TUNED:
            return _tuned_plan(trainer, loaded, request, rows, check)
        plan = _plan(trainer, request.training, rows)
        if request.measure:
            _measure(trainer, rows, plan, check)
        return plan


@contextmanager
def _ready_trainer(
    loaded: LoadedModel, request: StartTrainingRequest, rows: PreparedRows, check: Callable[[], None]
) -> Iterator[Any]:
    """A trainer as it is when the started event of the same training is made."""
    with TemporaryDirectory(prefix="plan-") as folder:
        trainer = build_trainer(
            loaded,
            request.config,
            Path(folder),
            train_rows=rows.train.rows,
            eval_rows=None if rows.evaluation is None else rows.evaluation.rows,
            callbacks=[_UnwindAtBegin()],
            clock=StepClock(),
            hooks=TrainerHooks(
                check_stop=check,
                save_checkpoint=lambda trainer, write: None,
                evaluation_over=lambda step: None,
                warn=lambda warning: None,
                repaired=lambda split, error: None,
                beat=lambda: None,
            ),
            evaluate_first=False,
            split=PassSplit(),
            tuned=request.config.micro_batching == MICRO_BATCHING_TUNED,
        )
        try:
            with suppress(_Ready):
                trainer.train()
            yield trainer
        finally:
            if trainer.neftune_noise_alpha is not None:
                deactivate_neftune(trainer.model, trainer.neftune_hook_handle, trainer.accelerator)
            trainer.accelerator.free_memory()


class _UnwindAtBegin(TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leaves the trainer when optimizer and schedule exist."""
        raise _Ready


def _plan(trainer: Any, request: StartTrainingRequest, rows: PreparedRows) -> TrainingPlan:
    facts = readback.read_trainer(trainer, request.config)
    warnings = [
        *rows.warnings,
        *facts.warnings,
        *reports.useless_settings(request),
        *honesty.learning_rate_warnings(trainer),
    ]
    return reports.plan(trainer, rows.train, rows.evaluation, facts.config, warnings)


def _tuned_plan(
    trainer: Any, loaded: LoadedModel, request: PlanTrainingRequest, rows: PreparedRows, check: Callable[[], None]
) -> TrainingPlan:
    """The plan with the passes that a training would choose now, as far as they are known or may be measured."""
    tuning = tune(trainer, loaded, check, may_probe=request.measure)
    plan = _plan(trainer, request.training, rows)
    if tuning is None:
        for field in readback.TUNED_FIELDS:
            if request.training.config.HasField(field):
                setattr(plan.config, field, getattr(request.training.config, field))
        plan.memory_estimate_bytes = 0  # it depends on what the probe will choose
        return plan
    plan.config.CopyFrom(split_config(plan.config, trainer.passes.split, longest_passes(trainer)))
    reports.add_tuning(plan, tuning)
    return plan


def _measure(trainer: Any, rows: PreparedRows, plan: TrainingPlan, check: Callable[[], None]) -> None:
    lengths = [len(ids) for ids in rows.train.rows["input_ids"]]
    longest = rows.train.rows[lengths.index(max(lengths))]
    try:
        measured = measure(trainer, longest, check)
    except DoesNotFitError as error:
        plan.warnings.append(_does_not_fit(plan, error.fitting_batch_size))
        return
    plan.memory_estimate_bytes = measured.peak_bytes
    plan.memory_measured = True
    plan.tokens_per_second = measured.tokens_per_second
    plan.step_seconds = measured.step_seconds


def _does_not_fit(plan: TrainingPlan, fitting: int) -> str:
    config, tokens = plan.config, plan.longest_row_tokens
    text = f"The probe ran out of memory with batch_size {config.batch_size} of the longest row ({tokens} tokens). "
    if fitting:
        sequences = config.batch_size * config.gradient_accumulation_steps
        return text + (
            f"A pass of {fitting} fits: batch_size {fitting} with gradient_accumulation_steps "
            f"{-(-sequences // fitting)} makes the same optimizer step."
        )
    checkpointing = "" if config.use_gradient_checkpointing else "use_gradient_checkpointing, "
    return text + (
        f"Not even one row fits: train with {checkpointing}a shorter max_seq_length, load_in_4bit or a smaller model."
    )


def _preference_plan(loaded: LoadedModel, request: StartTrainingRequest, rows: PreparedRows) -> TrainingPlan:
    """Shows preference pairs; there is no trainer to ask about the rest."""
    train = rows.train
    plan = TrainingPlan(
        config=request.config,
        row_format=train.row_format,
        num_rows=train.num_rows,
        num_tokens=train.num_tokens,
        trainable_params=count_parameters(loaded.model).trainable,
        memory_free_bytes=reports.free_memory(loaded.model),
        preview=train.preview,
        warnings=[warning.message for warning in rows.warnings],
        longest_row_tokens=train.longest_row_tokens,
        truncated_rows=train.truncated_rows,
        dropped_rows=train.dropped_rows,
        loss_tokens=train.loss_tokens,
        num_eval_rows=0 if rows.evaluation is None else rows.evaluation.num_rows,
        mean_row_tokens=train.mean_row_tokens,
    )
    plan.warnings.append(f"The rows are preference pairs. {NO_PREFERENCE_METHOD}")
    return plan
