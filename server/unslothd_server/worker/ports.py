"""What the worker needs of an engine: the seam between a process that obeys and the code that trains."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from threading import Event
from typing import Protocol

from unslothd.v1.artifact_pb2 import Artifact, ExportProgress
from unslothd.v1.generation_pb2 import GenerateSummary
from unslothd.v1.model_pb2 import LoadProgress, Model
from unslothd.v1.service_pb2 import GenerateRequest
from unslothd.v1.training_event_pb2 import TrainingCancelled, TrainingEvent, TrainingSucceeded
from unslothd.v1.training_pb2 import TrainingPlan
from unslothd.worker.v1.bootstrap_pb2 import WorkerBootstrap
from unslothd.worker.v1.worker_service_pb2 import (
    ExportModelRequest,
    LoadModelRequest,
    PlanTrainingRequest,
    PrepareForTrainingRequest,
    StartTrainingRequest,
)


@dataclass
class StopSignal:
    """Asks a running training to stop; the engine looks at it at every step boundary.

    Args:
        requested: Set once someone asked.
        save_checkpoint: Meaningful once requested: keep a checkpoint and the adapter so far.
        pause: Meaningful once requested: keep a checkpoint and end as paused, to go on from it later. A cancel that
            comes while a pause is under way wins.
    """

    requested: Event
    save_checkpoint: bool = False
    pause: bool = False
    _last_beat: float = field(default_factory=time.monotonic)

    def beat(self) -> None:
        """Says that the training is alive: at every row that is read, every pass and every eval batch. Cheap."""
        self._last_beat = time.monotonic()

    def seconds_since_beat(self) -> float:
        """Seconds since the last sign of life."""
        return time.monotonic() - self._last_beat

    @property
    def keeps_checkpoint(self) -> bool:
        """True when the step at which it stops needs a checkpoint."""
        return self.save_checkpoint or self.pause


@dataclass(frozen=True)
class TrainingPaused:
    """What `Engine.train` returns for a training that stopped to go on later.

    Args:
        step: Last finished step; its checkpoint is in the log. 0 = it had not begun.
    """

    step: int


class Engine(Protocol):
    """One model and what can be done with it. Every call but `memory_bytes` comes from the main thread, one at a time.

    Every failure that a user can cause or mend is raised as an `unslothd_server.errors.UnslothdError`.
    """

    def import_libraries(self) -> dict[str, str]:
        """Does the heavy imports. Returns the versions of unsloth, torch, transformers, trl, peft, bitsandbytes."""
        ...

    def load(
        self, bootstrap: WorkerBootstrap, request: LoadModelRequest, report: Callable[[LoadProgress], None]
    ) -> Model:
        """Loads the model; `report` is called whenever a progress bar should move.

        Returns everything of Model that the engine knows: all but model_id, state, load_time, active_training_id.
        """
        ...

    def prepare(self, request: PrepareForTrainingRequest) -> Model:
        """Attaches the adapter. Returns the model as `load` does, with trainable_params and lora filled in."""
        ...

    def train(
        self, request: StartTrainingRequest, emit: Callable[[TrainingEvent], None], stop: StopSignal
    ) -> TrainingSucceeded | TrainingCancelled | TrainingPaused:
        """Trains to the end, or to the step boundary after `stop.requested`.

        `emit` takes an event of which only the kind is set, and returns once it is in the log: preparing, started,
        step, evaluation, checkpoint_saved, warning, and recovery (what the engine has repaired itself). The worker adds
        the state and the terminal events.
        Nothing is written to request.output_dir before the rows are known to be trainable.
        """
        ...

    def plan(self, request: PlanTrainingRequest, cancelled: Event) -> TrainingPlan:
        """Works out what `train` would do. Changes nothing: no weight, no random state, no file."""
        ...

    def export(
        self, request: ExportModelRequest, report: Callable[[ExportProgress], None], cancelled: Event
    ) -> Artifact:
        """Writes the model in another form; the folder appears whole or not at all. Leaves the model as it was."""
        ...

    def generate(self, request: GenerateRequest, cancelled: Event) -> Iterator[str | GenerateSummary]:
        """Yields text as it comes and the summary as the last item; ends early once `cancelled` is set."""
        ...

    def memory_bytes(self) -> int:
        """Bytes that this process holds on its device now. Callable from any thread, also before `load`."""
        ...
