"""One training from rows to final adapter: what happens in which order, and what becomes of each way it can end."""

import gc
import shutil
import traceback
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from unslothd.v1.training_event_pb2 import (
    Recovery,
    TrainingCancelled,
    TrainingEvent,
    TrainingPreparing,
    TrainingStarted,
    TrainingSucceeded,
    TrainingWarning,
)
from unslothd.v1.training_pb2 import MICRO_BATCHING_TUNED, TrainingConfig, TrainingMetrics
from unslothd.worker.v1.worker_service_pb2 import StartTrainingRequest
from unslothd_server.engine import (
    checkpoints,
    devices,
    environment,
    honesty,
    pass_tuning,
    readback,
    recorded_passes,
    reports,
)
from unslothd_server.engine.attention_lengths import of_one_length_kept
from unslothd_server.engine.callbacks import Emit, EventCallback
from unslothd_server.engine.checkpoint_saver import GO_ON, CheckpointSaver
from unslothd_server.engine.curves import Curves
from unslothd_server.engine.disk_faults import disk_fault
from unslothd_server.engine.durable_files import sync_folder
from unslothd_server.engine.evaluation import EarlyStopping
from unslothd_server.engine.memory import PeakMemory
from unslothd_server.engine.micro_batching import Tuning
from unslothd_server.engine.model_loading import LoadedModel
from unslothd_server.engine.oom import exhausted
from unslothd_server.engine.passes import PassSplit, split_config
from unslothd_server.engine.preparation import Preparation
from unslothd_server.engine.prepared_rows import PreparedRows, prepare_rows
from unslothd_server.engine.receipt import FinishedRun, write_receipt
from unslothd_server.engine.run_figures import RunFigures
from unslothd_server.engine.service_trainer import TrainerHooks
from unslothd_server.engine.step_clock import StepClock
from unslothd_server.engine.trainer import build_trainer
from unslothd_server.errors import ExhaustedError, UnslothdError
from unslothd_server.status import to_status
from unslothd_server.worker.ports import StopSignal, TrainingPaused

OOM_REMEDY = (
    "train with a smaller batch_size and more gradient_accumulation_steps (the optimizer step stays the same), with "
    "use_gradient_checkpointing, or with a shorter max_seq_length"
)


class _StopRequestedError(Exception):
    """Unwinds to where a stop is handled, from before the first step or out of an evaluation."""


class TrainingRun:
    """A training of a prepared model.

    Args:
        loaded: The model; it keeps what it learns.
        request: What to do.
        emit: Takes events.
        stop: Asks to end at the next step boundary.
    """

    def __init__(self, loaded: LoadedModel, request: StartTrainingRequest, emit: Emit, stop: StopSignal) -> None:
        self._loaded = loaded
        self._request = request
        self._emit = emit
        self._stop = stop
        self._output_dir = Path(request.output_dir)
        self._figures = RunFigures(StepClock(), PeakMemory())
        self._saver = CheckpointSaver(emit, stop, self._figures, keep=request.config.save_total_limit)
        self._preparation = Preparation(emit)
        self._trainer: Any = None
        self._rows: PreparedRows | None = None
        self._resume: checkpoints.ResumePoint | None = None
        self._configured = self._real_config = TrainingConfig()
        self._repairs = 0
        self._weights_before: dict[str, int] = {}
        self._start_time = datetime.now(UTC)

    def run(self) -> TrainingSucceeded | TrainingCancelled | TrainingPaused:
        """Trains to the end, or to the stop.

        Raises:
            UnslothdError: What a user can mend, as the parts say; OUT_OF_MEMORY, DISK_FULL, NOT_WRITABLE among them.
        """
        try:
            self._resume = self._resume_point()
            self._preparation.begin(TrainingPreparing.PHASE_READING_ROWS)
            rows = prepare_rows(
                self._request, self._loaded.tokenizer, self._loaded.max_seq_length, check=self._prepare_one
            )
            self._rows = rows
            checkpoints.remove_after(self._output_dir, self._first_step - 1)
            with (
                of_one_length_kept(rows, packing=self._request.config.packing),
                closing(self._curves()) as curves,
            ):
                events = EventCallback(
                    self._emit,
                    self._stop,
                    self._figures,
                    on_begin=self._started,
                    has_eval=rows.evaluation is not None,
                )
                self._trainer = self._build(rows, [curves, events])
                self._trainer.train(resume_from_checkpoint=str(self._resume.folder) if self._resume else None)
                return self._finish()
        except _StopRequestedError:
            return self._stopped()
        except UnslothdError:
            raise
        except Exception as error:
            known = disk_fault(error, self._output_dir, GO_ON) or exhausted(error, OOM_REMEDY)
            if known is None:
                raise
            # The traceback's frames hold the tensors that did not fit.
            traceback.clear_frames(error.__traceback__)
            raise known from error
        finally:
            recorded = self._trainer is not None and recorded_passes.may_have_recorded(self._trainer)
            self._trainer = None
            self._clean_up(recorded=recorded)

    def _resume_point(self) -> checkpoints.ResumePoint | None:
        if not self._request.resume_from_checkpoint:
            return None
        fallbacks = [Path(folder) for folder in self._request.fallback_checkpoints]
        point = checkpoints.choose(Path(self._request.resume_from_checkpoint), fallbacks)
        self._figures.restore(point.folder, point.step)
        return point

    @property
    def _first_step(self) -> int:
        return self._resume.step + 1 if self._resume else 1

    def _check_stop(self) -> None:
        self._stop.beat()
        if self._stop.requested.is_set():
            raise _StopRequestedError

    def _prepare_one(self) -> None:
        """Called before every row that is read and every pass that is measured."""
        self._check_stop()
        self._preparation.one_begins()

    @property
    def _tensorboard_dir(self) -> Path:
        return self._output_dir / "runs"

    def _curves(self) -> Curves:
        # On a resume the figures of steps that are done again are replaced.
        return Curves(self._tensorboard_dir, purge_step=self._first_step if self._resume else None, warn=self._warn)

    def _build(self, rows: PreparedRows, callbacks: list[Any]) -> Any:
        config, evaluations = self._request.config, self._figures.evaluations
        if rows.evaluation is not None and config.early_stopping_patience and config.eval_steps:
            callbacks = [*callbacks, EarlyStopping(evaluations, config.early_stopping_patience)]
        return build_trainer(
            self._loaded,
            config,
            self._output_dir,
            train_rows=rows.train.rows,
            eval_rows=None if rows.evaluation is None else rows.evaluation.rows,
            callbacks=callbacks,
            clock=self._figures.clock,
            hooks=TrainerHooks(
                check_stop=self._check_stop,
                save_checkpoint=self._saver.save,
                evaluation_over=self._evaluation_over,
                warn=self._warn,
                repaired=self._repaired,
                beat=self._stop.beat,
            ),
            evaluate_first=self._evaluates_first(),
            split=self._figures.split,
            tuned=config.micro_batching == MICRO_BATCHING_TUNED,
        )

    def _evaluates_first(self) -> bool:
        """True before the first step, and after a stop that left out the evaluation that was due at its step."""
        if self._resume is None:
            return True
        eval_steps, step = self._request.config.eval_steps, self._resume.step
        return bool(eval_steps) and step % eval_steps == 0 and self._figures.evaluations.over_step != step

    def _warn(self, warning: TrainingWarning) -> None:
        self._emit(TrainingEvent(warning=warning))

    def _repaired(self, split: PassSplit, error: ExhaustedError) -> None:
        """A pass did not fit: says what was changed. The optimizer step under way is done again from its first pass."""
        self._trainer.tell()
        self._repairs += 1
        self._real_config = self._split_config(split)
        recovery = Recovery(
            cause=to_status(error),
            resume_step=int(self._trainer.state.global_step),
            config=self._real_config,
            attempt=self._repairs,
        )
        self._emit(TrainingEvent(recovery=recovery))

    def _evaluation_over(self, step: int) -> None:
        self._figures.evaluations.over_step = step

    def _started(self) -> None:
        """Called when optimizer and schedule exist and before anything runs."""
        trainer, rows = self._trainer, self._rows
        assert rows is not None
        interval = self._figures.interval
        trainer.go_on_from_interval(interval.step, interval.loss_sum)
        self._weights_before = honesty.weights_checksum(trainer.model)
        tuning = self._tune()
        facts = readback.read_trainer(trainer, self._request.config)
        self._configured = facts.config
        self._real_config = self._split_config(self._figures.split)
        warnings = [
            *self._resume_warnings(),
            *rows.warnings,
            *facts.warnings,
            *reports.useless_settings(self._request),
            *honesty.learning_rate_warnings(trainer),
        ]
        plan = reports.plan(trainer, rows.train, rows.evaluation, self._real_config, warnings)
        if tuning is not None:
            reports.add_tuning(plan, tuning)
        self._emit(
            TrainingEvent(
                started=TrainingStarted(
                    plan=plan,
                    engine=environment.engine_name(),
                    device=devices.device_title(self._loaded.model),
                    resumed=self._resume is not None,
                    first_step=trainer.state.global_step + 1,
                    tensorboard_dir=str(self._tensorboard_dir),
                )
            )
        )
        for warning in warnings:
            self._warn(warning)
        self._check_stop()
        self._loaded.trained_by.append(self._request.training_id)

    def _tune(self) -> Tuning | None:
        """Chooses how steps are split, where the config leaves that open; a resumed training goes on as it was."""
        if self._request.config.micro_batching != MICRO_BATCHING_TUNED:
            return None
        trainer, split = self._trainer, self._figures.split
        if split.tokens:
            pass_tuning.go_on(trainer)
        if split.tokens or split.parts > 1:
            return None
        self._preparation.begin(TrainingPreparing.PHASE_MEASURING_PASSES)
        tuning = pass_tuning.tune(trainer, self._loaded, self._prepare_one)
        # What the probe took is not the training's peak.
        self._figures.memory = PeakMemory()
        return tuning

    def _split_config(self, split: PassSplit) -> TrainingConfig:
        return split_config(self._configured, split, pass_tuning.longest_passes(self._trainer))

    def _resume_warnings(self) -> list[TrainingWarning]:
        message = self._resume.warning if self._resume else None
        return [TrainingWarning(reason="CHECKPOINT_DAMAGED", message=message)] if message else []

    def _finish(self) -> TrainingSucceeded | TrainingCancelled | TrainingPaused:
        trainer = self._trainer
        step = int(trainer.state.global_step)
        if self._stop.requested.is_set() and step < trainer.state.max_steps:
            return self._halted(step)
        if trainer.eval_dataset is not None and self._figures.evaluations.over_step != step:
            trainer.evaluate()
        # Early stopping ends a training without a save.
        self._saver.save_now(self._trainer)
        for warning in honesty.unchanged_warnings(self._weights_before, trainer.model, step + 1 - self._first_step):
            self._warn(warning)
        metrics = reports.metrics(trainer, self._figures)
        return TrainingSucceeded(metrics=metrics, output_dir=str(self._save_final("succeeded", metrics)))

    def _stopped(self) -> TrainingCancelled | TrainingPaused:
        """A stop before the first step or out of an evaluation; the trainer stands at a step boundary."""
        step = int(self._trainer.state.global_step) if self._trainer is not None else 0
        if step and self._stop.keeps_checkpoint:
            self._saver.save_now(self._trainer)
        return self._halted(step)

    def _halted(self, step: int) -> TrainingCancelled | TrainingPaused:
        if self._stop.pause:
            return TrainingPaused(step)
        if not (self._stop.save_checkpoint and step):
            return TrainingCancelled(step=step)
        metrics = reports.metrics(self._trainer, self._figures)
        return TrainingCancelled(step=step, output_dir=str(self._save_final("cancelled", metrics)))

    def _save_final(self, outcome: str, metrics: TrainingMetrics) -> Path:
        """Writes adapter (or all weights), tokenizer and receipt; the folder appears whole or not at all."""
        final, work = self._output_dir / "final", self._output_dir / "final.partial"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            self._loaded.model.save_pretrained(str(work))
            self._loaded.tokenizer.save_pretrained(str(work))
            write_receipt(self._finished_run(outcome, metrics), work)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(final, ignore_errors=True)
        work.rename(final)
        sync_folder(self._output_dir)
        return final

    def _finished_run(self, outcome: str, metrics: TrainingMetrics) -> FinishedRun:
        assert self._rows is not None
        return FinishedRun(
            request=self._request,
            loaded=self._loaded,
            rows=self._rows,
            config=self._real_config,
            metrics=metrics,
            state=self._trainer.state,
            outcome=outcome,
            start_time=self._start_time,
            resumed_from=self._first_step - 1,
        )

    def _clean_up(self, *, recorded: bool) -> None:
        """Gives optimizer, gradients and caches back, so that a second training starts from where the first did."""
        import torch

        if recorded:
            recorded_passes.forget_recorded(self._loaded.model)
        self._loaded.model.zero_grad(set_to_none=True)
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
