"""The engine that the worker drives: one model, loaded, prepared, trained and asked by real Unsloth."""

from collections.abc import Callable, Iterator
from threading import Event
from typing import TYPE_CHECKING

from unslothd.v1.artifact_pb2 import Artifact, ExportProgress
from unslothd.v1.error_reason_pb2 import ErrorReason
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
from unslothd_server.engine import environment, memory
from unslothd_server.errors import PreconditionError
from unslothd_server.worker.ports import StopSignal, TrainingPaused

if TYPE_CHECKING:
    from unslothd_server.engine.model_loading import LoadedModel

# Every module that needs torch is imported inside a method: only import_libraries may start the heavy import.


class UnslothEngine:
    """Satisfies `unslothd_server.worker.ports.Engine`."""

    def __init__(self) -> None:
        self._loaded: LoadedModel | None = None

    def import_libraries(self) -> dict[str, str]:
        """Does the heavy imports. Returns the versions of the libraries."""
        return environment.import_libraries()

    def load(
        self, bootstrap: WorkerBootstrap, request: LoadModelRequest, report: Callable[[LoadProgress], None]
    ) -> Model:
        """Loads the model; see `model_loading.load_model` for what it raises."""
        from unslothd_server.engine import model_loading, readback

        self._loaded = model_loading.load_model(bootstrap, request, report)
        return readback.describe_model(self._loaded)

    def prepare(self, request: PrepareForTrainingRequest) -> Model:
        """Attaches the adapter, or marks all weights trainable; see `adapters.prepare` for what it raises."""
        from unslothd_server.engine import adapters, readback

        loaded = self._require_loaded()
        adapters.prepare(loaded, request)
        return readback.describe_model(loaded)

    def train(
        self, request: StartTrainingRequest, emit: Callable[[TrainingEvent], None], stop: StopSignal
    ) -> TrainingSucceeded | TrainingCancelled | TrainingPaused:
        """Trains to the end or to the stop; see `training.TrainingRun`."""
        from unslothd_server.engine.training import TrainingRun

        return TrainingRun(self._require_prepared(), request, emit, stop).run()

    def plan(self, request: PlanTrainingRequest, cancelled: Event) -> TrainingPlan:
        """Works out what `train` would do; see `planning.plan_training`."""
        from unslothd_server.engine.planning import plan_training

        return plan_training(self._require_prepared(), request, cancelled)

    def export(
        self, request: ExportModelRequest, report: Callable[[ExportProgress], None], cancelled: Event
    ) -> Artifact:
        """Writes the model in another form; see `export.export` for what it raises."""
        from unslothd_server.engine import export

        return export.export(self._require_loaded(), request, report, cancelled)

    def generate(self, request: GenerateRequest, cancelled: Event) -> Iterator[str | GenerateSummary]:
        """Yields text as it comes and the summary at the end; see `generation.generate`."""
        from unslothd_server.engine import generation

        yield from generation.generate(self._require_loaded(), request, cancelled)

    def memory_bytes(self) -> int:
        """Bytes that this process holds on its device now."""
        return memory.memory_bytes()

    def _require_loaded(self) -> "LoadedModel":
        if self._loaded is None:
            raise PreconditionError(
                ErrorReason.ERROR_REASON_MODEL_NOT_READY, "No model is loaded yet. Load one, then call again."
            )
        return self._loaded

    def _require_prepared(self) -> "LoadedModel":
        loaded = self._require_loaded()
        if not loaded.prepared:
            raise PreconditionError(
                ErrorReason.ERROR_REASON_MODEL_NOT_PREPARED,
                "The model has no trainable parameters yet. Call PrepareForTraining, then call again.",
            )
        return loaded
