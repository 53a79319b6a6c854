"""The curves of a training for TensorBoard. They are a view of the events: what becomes of them ends no training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from transformers.integrations import TensorBoardCallback

from unslothd.v1.training_event_pb2 import TrainingWarning
from unslothd_server.engine.disk_faults import disk_fault


class Curves(TensorBoardCallback):
    """Writes curves until the disk takes no more.

    Args:
        folder: Where TensorBoard looks for them.
        purge_step: Figures from this step on are replaced; None = there are none.
        warn: Is told, once, that they have ended.
    """

    def __init__(self, folder: Path, *, purge_step: int | None, warn: Callable[[TrainingWarning], None]) -> None:
        self._folder = folder
        self._warn = warn
        self._stopped = False
        super().__init__(SummaryWriter(log_dir=str(folder), purge_step=purge_step))
        # Transformers closes its writer before our last evaluation, and opens another one here.
        self.logging_dir = str(folder)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Writes the arguments and the model's config."""
        self._unless_full(lambda: super(Curves, self).on_train_begin(*args, **kwargs))

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Writes the figures."""
        self._unless_full(lambda: super(Curves, self).on_log(*args, **kwargs))

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Ends the file."""
        self._unless_full(lambda: super(Curves, self).on_train_end(*args, **kwargs))

    def close(self) -> None:
        """Ends the file, if it is open. Repeatable."""
        self._unless_full(self._close)

    def _close(self) -> None:
        if self.tb_writer is not None:
            self.tb_writer.close()
            self.tb_writer = None

    def _unless_full(self, write: Callable[[], None]) -> None:
        if self._stopped:
            return
        try:
            write()
        except Exception as error:
            fault = disk_fault(error, self._folder, "train on: the events have every figure")
            if fault is None:
                raise
            self._stopped = True
            self._warn(TrainingWarning(reason="TENSORBOARD_STOPPED", message=_stopped(fault.message)))


def _stopped(cause: str) -> str:
    return f"The curves for TensorBoard end here, and training goes on. {cause}"
