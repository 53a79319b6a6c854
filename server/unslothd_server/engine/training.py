"""One training from rows to final adapter: what happens in which order, and what becomes of each way it can end."""

import gc
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unslothd.v1.training_event_pb2 import (
    TrainingCancelled,
    TrainingEvent,
    TrainingStarted,
    TrainingSucceeded,
)
from unslothd.worker.v1.worker_service_pb2 import StartTrainingRequest
from unslothd_server.engine import environment, readback, reports
from unslothd_server.engine.callbacks import Emit, EventCallback, RunFigures
from unslothd_server.engine.memory import PeakMemory
from unslothd_server.engine.model_loading import LoadedModel
from unslothd_server.engine.oom import exhausted
from unslothd_server.engine.prepared_rows import PreparedRows, prepare_rows
from unslothd_server.engine.step_clock import StepClock
from unslothd_server.engine.trainer import build_trainer
from unslothd_server.errors import UnslothdError
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
        self._trainer: Any = None

    def run(self) -> TrainingSucceeded | TrainingCancelled | TrainingPaused:
        """Trains to the end, or to the stop.

        Raises:
            UnslothdError: What a user can mend, as the parts say; OUT_OF_MEMORY and DISK_FULL among them.
        """
        try:
            rows = prepare_rows(
                self._request, self._loaded.tokenizer, self._loaded.max_seq_length, check=self._check_stop
            )
            with self._tensorboard() as tensorboard:
                events = EventCallback(
                    self._emit,
                    self._stop,
                    self._figures,
                    on_begin=lambda: self._started(rows),
                    has_eval=rows.evaluation is not None,
                )
                self._trainer = self._build(rows, [*tensorboard, events])
                self._trainer.train(resume_from_checkpoint=self._request.resume_from_checkpoint or None)
                return self._finish(events)
        except _StopRequestedError:
            return self._stopped()
        except UnslothdError:
            raise
        except Exception as error:
            known = exhausted(error, OOM_REMEDY)
            if known is None:
                raise
            # The traceback's frames hold the tensors that did not fit.
            traceback.clear_frames(error.__traceback__)
            raise known from error
        finally:
            self._trainer = None
            self._clean_up()

    def _check_stop(self) -> None:
        if self._stop.requested.is_set():
            raise _StopRequestedError

    @property
    def _tensorboard_dir(self) -> Path:
        return self._output_dir / "runs"

    @contextmanager
    def _tensorboard(self) -> Iterator[list[Any]]:
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        first_step = self._resume_step() + 1
        # On a resume the figures of steps that are done again are replaced.
        writer = SummaryWriter(log_dir=str(self._tensorboard_dir), purge_step=first_step if first_step > 1 else None)
        callback = TensorBoardCallback(writer)
        # Transformers closes its writer before our last evaluation, and opens another one here.
        callback.logging_dir = str(self._tensorboard_dir)
        try:
            yield [callback]
        finally:
            writer.close()

    def _resume_step(self) -> int:
        checkpoint = self._request.resume_from_checkpoint
        return int(checkpoint.rstrip("/").rpartition("-")[2]) if checkpoint else 0

    def _build(self, rows: PreparedRows, callbacks: list[Any]) -> Any:
        config = self._request.config
        if rows.evaluation is not None and config.early_stopping_patience and config.eval_steps:
            from transformers import EarlyStoppingCallback

            callbacks = [*callbacks, EarlyStoppingCallback(early_stopping_patience=config.early_stopping_patience)]
        return build_trainer(
            self._loaded,
            config,
            self._output_dir,
            train_rows=rows.train.rows,
            eval_rows=None if rows.evaluation is None else rows.evaluation.rows,
            callbacks=callbacks,
            clock=self._figures.clock,
            check_stop=self._check_stop,
        )

    def _started(self, rows: PreparedRows) -> None:
        """Called when optimizer and schedule exist and before anything runs."""
        trainer = self._trainer
        facts = readback.read_trainer(trainer, self._request.config)
        warnings = [*rows.warnings, *reports.useless_settings(self._request), *facts.warnings]
        self._emit(
            TrainingEvent(
                started=TrainingStarted(
                    plan=reports.plan(trainer, rows.train, rows.evaluation, facts.config, warnings),
                    engine=environment.engine_name(),
                    device=readback.device_title(self._loaded.model),
                    resumed=bool(self._request.resume_from_checkpoint),
                    first_step=trainer.state.global_step + 1,
                    tensorboard_dir=str(self._tensorboard_dir),
                )
            )
        )
        for warning in warnings:
            self._emit(TrainingEvent(warning=warning))
        self._check_stop()

    def _finish(self, events: EventCallback) -> TrainingSucceeded | TrainingCancelled | TrainingPaused:
        trainer = self._trainer
        step = int(trainer.state.global_step)
        if self._stop.requested.is_set() and step < trainer.state.max_steps:
            return self._halted(step)
        if trainer.eval_dataset is not None and self._figures.eval_step != step:
            trainer.evaluate()
        if self._figures.saved_step != step and not self._resumed_at(step):
            # Early stopping ends a training without a save.
            trainer._save_checkpoint(trainer.model, trial=None)
            events.checkpoint_saved(self._output_dir, step)
        final = self._save_final()
        return TrainingSucceeded(metrics=reports.metrics(trainer, self._figures), output_dir=str(final))

    def _resumed_at(self, step: int) -> bool:
        return bool(self._request.resume_from_checkpoint) and self._resume_step() == step

    def _stopped(self) -> TrainingCancelled | TrainingPaused:
        """A stop before the first step or out of an evaluation; the trainer stands at a step boundary."""
        trainer = self._trainer
        step = int(trainer.state.global_step) if trainer is not None else 0
        if step and self._stop.keeps_checkpoint and self._figures.saved_step != step and not self._resumed_at(step):
            trainer._save_checkpoint(trainer.model, trial=None)
            trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
        return self._halted(step)

    def _halted(self, step: int) -> TrainingCancelled | TrainingPaused:
        if self._stop.pause:
            return TrainingPaused(step)
        keep = self._stop.save_checkpoint and step > 0
        return TrainingCancelled(step=step, output_dir=str(self._save_final()) if keep else "")

    def _save_final(self) -> Path:
        """Writes the adapter (or all weights) and the tokenizer; the folder appears whole or not at all."""
        final, work = self._output_dir / "final", self._output_dir / "final.partial"
        for leftover in (final, work):
            shutil.rmtree(leftover, ignore_errors=True)
        work.mkdir(parents=True)
        self._loaded.model.save_pretrained(str(work))
        self._loaded.tokenizer.save_pretrained(str(work))
        work.rename(final)
        return final

    def _clean_up(self) -> None:
        """Gives optimizer, gradients and caches back, so that a second training starts from where the first did."""
        import torch

        self._loaded.model.zero_grad(set_to_none=True)
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
