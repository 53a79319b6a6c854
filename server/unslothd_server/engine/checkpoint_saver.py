"""Saving the checkpoints of one training: whole or not at all, and training goes on where the disk is full."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from unslothd.v1.training_event_pb2 import TrainingEvent, TrainingWarning
from unslothd.v1.training_pb2 import Checkpoint
from unslothd_server.engine import checkpoints
from unslothd_server.engine.callbacks import Emit
from unslothd_server.engine.disk_faults import disk_fault
from unslothd_server.engine.run_figures import RunFigures
from unslothd_server.errors import UnslothdError
from unslothd_server.worker.ports import StopSignal

GO_ON = "go on with ResumeTraining"


class CheckpointSaver:
    """Saves checkpoints.

    Args:
        emit: Takes events; returns once one is in the log.
        stop: Tells whether the training is to pause.
        figures: Put into each checkpoint.
        keep: Newest ones that stay when another one is saved; 0 = all.
    """

    def __init__(self, emit: Emit, stop: StopSignal, figures: RunFigures, *, keep: int) -> None:
        self._emit = emit
        self._stop = stop
        self._figures = figures
        self._keep = keep
        self._tried_step: int | None = None

    def save_now(self, trainer: Any) -> None:
        """Saves at a step boundary outside of Transformers' loop, unless that was done or tried at this step."""
        if trainer.state.global_step not in {self._figures.saved_step, self._tried_step}:
            trainer._save_checkpoint(trainer.model, trial=None)

    def save(self, trainer: Any, write: Callable[[], None]) -> None:
        """Has a checkpoint written, and seals it. Where the disk takes no more, training goes on without it.

        Args:
            trainer: Stands at a step boundary.
            write: Has it write its files into the folder of the checkpoint.

        Raises:
            UnslothdError: DISK_FULL or NOT_WRITABLE: the training is to pause, and this is what it would go on from.
        """
        step = self._tried_step = trainer.state.global_step
        folder = checkpoints.folder_of(Path(trainer.args.output_dir), step)
        try:
            write()
            self._figures.interval.loss_sum = trainer.interval_loss()
            self._figures.write(folder)
            checkpoints.seal(folder, eval_loss=self._figures.evaluations.loss_at(step))
        except Exception as error:
            fault = disk_fault(error, folder.parent, GO_ON, needed_bytes=_num_bytes(trainer))
            checkpoints.remove(folder)  # half of it is of no use, and takes room
            if fault is None:
                raise
            if self._stop.requested.is_set() and self._stop.pause:
                raise fault from error
            self._emit(TrainingEvent(warning=self._not_saved(step, fault)))
        else:
            self._tell(folder, step)

    def _tell(self, folder: Path, step: int) -> None:
        """It is whole and on the disk; only once its event is in the log may older ones go."""
        self._figures.saved_step = step
        now = Timestamp()
        now.GetCurrentTime()
        saved = Checkpoint(step=step, path=str(folder), create_time=now)
        loss = self._figures.evaluations.loss_at(step)
        if loss is not None:
            saved.eval_loss = loss
        self._emit(TrainingEvent(checkpoint_saved=saved))
        checkpoints.remove_surplus(folder.parent, self._keep)

    def _not_saved(self, step: int, fault: UnslothdError) -> TrainingWarning:
        return TrainingWarning(
            reason="CHECKPOINT_NOT_SAVED",
            message=(
                f"The checkpoint of step {step} was not saved, and training goes on. "
                f"{fault.message.removesuffix(f', then {GO_ON}.')} before the next one is due: should this training "
                f"break off, it would be done again from step {(self._figures.saved_step or 0) + 1} on."
            ),
        )


def _num_bytes(trainer: Any) -> int:
    """What a checkpoint takes, to within its small files: the trained weights and the state of the optimizer."""
    import torch

    weights = (each for each in trainer.model.parameters() if each.requires_grad)
    states = (value for state in trainer.optimizer.state.values() for value in state.values())
    return sum(each.nbytes for each in (*weights, *states) if isinstance(each, torch.Tensor))
