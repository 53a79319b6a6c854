"""The one model of a worker, and the trainings that it was given: what may be called when, and the state it leaves.

Methods that say "main thread" run the engine; the others answer at any time, from gRPC's threads.
"""

import os
from collections.abc import Callable, Iterator
from threading import Event, Lock

from unslothd.v1.artifact_pb2 import Artifact, ExportProgress
from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.generation_pb2 import GenerateSummary
from unslothd.v1.model_pb2 import LoadProgress, Model
from unslothd.v1.training_pb2 import TrainingPlan
from unslothd.worker.v1.bootstrap_pb2 import WorkerBootstrap
from unslothd.worker.v1.worker_service_pb2 import (
    ExportModelRequest,
    GenerateRequest,
    GetStatusResponse,
    LoadModelRequest,
    PlanTrainingRequest,
    PrepareForTrainingRequest,
    StartTrainingRequest,
)
from unslothd_server.errors import AlreadyExistsError, NotFoundError, PreconditionError
from unslothd_server.worker.ports import Engine
from unslothd_server.worker.training_run import TrainingRun


class ModelHolder:
    """Holds the model.

    Args:
        engine: Does the work.
        bootstrap: What the worker was told when it started; without a model it is a spare.
    """

    def __init__(self, engine: Engine, bootstrap: WorkerBootstrap) -> None:
        self._engine = engine
        self._bootstrap = bootstrap
        self._lock = Lock()
        self._model: Model | None = None
        self._load_asked = False
        self._ending = False
        self._runs: dict[str, TrainingRun] = {}
        self._latest: TrainingRun | None = None

    @property
    def model_id(self) -> str:
        """Id of the model; empty while it is a spare."""
        return self._bootstrap.model_id

    @property
    def is_spare(self) -> bool:
        """True until it is told its model."""
        return not self.model_id

    def take_model(self, bootstrap: WorkerBootstrap) -> None:
        """Becomes the worker of a model. An equal call may come again.

        Raises:
            PreconditionError: It has a model, or is ending (MODEL_NOT_READY).
        """
        with self._lock:
            self._check_not_ending()
            if not self.is_spare and bootstrap != self._bootstrap:
                raise _not_ready(f"This is the worker of model '{self.model_id}'. Start another one for another model.")
            self._bootstrap = bootstrap

    def status(self) -> GetStatusResponse:
        """What the worker is doing."""
        status = GetStatusResponse(pid=os.getpid())
        if self._model is not None:
            status.model.CopyFrom(self._model_now(self._model))
        latest = self._latest
        if latest is not None:
            # Activity is read before the sequence: a status that says "over" then has the terminal event's sequence.
            status.training_active = not latest.is_over
            status.training_id = latest.request.training_id
            status.last_sequence = latest.last_sequence
            status.seconds_since_progress = latest.seconds_since_progress
        return status

    def active_run(self) -> TrainingRun | None:
        """The training that has no terminal event yet, if any."""
        latest = self._latest
        return None if latest is None or latest.is_over else latest

    def run_of(self, training_id: str) -> TrainingRun:
        """Returns a training that was handed over.

        Raises:
            NotFoundError: It never was (TRAINING_NOT_FOUND).
        """
        run = self._runs.get(training_id)
        if run is None:
            raise NotFoundError(
                ErrorReason.ERROR_REASON_TRAINING_NOT_FOUND,
                f"Training '{training_id}' was never handed to the worker of model '{self.model_id}'. "
                "Read its event log instead.",
            )
        return run

    def refuse_new_work(self) -> None:
        """From now on nothing is begun: the process is about to end."""
        with self._lock:
            self._ending = True

    def claim_load(self) -> None:
        """Marks the one load of a worker's life as begun.

        Raises:
            PreconditionError: There was one before, or it has no model yet (MODEL_NOT_READY).
        """
        with self._lock:
            self._check_not_ending()
            if self.is_spare:
                raise _not_ready("This worker is a spare. Tell it its model by TakeModel before LoadModel.")
            if self._load_asked:
                raise _not_ready("A worker loads a model once in its life. Start another worker for another load.")
            self._load_asked = True

    def load(self, request: LoadModelRequest, report: Callable[[LoadProgress], None]) -> Model:
        """Loads the model. Main thread."""
        model = self._engine.load(self._bootstrap, request, report)
        model.model_id = self.model_id
        model.state = Model.STATE_READY
        model.load_time.GetCurrentTime()
        self._model = model
        return self._model_now(model)

    def prepare(self, request: PrepareForTrainingRequest) -> Model:
        """Attaches trainable parameters. Main thread.

        Raises:
            PreconditionError: Nothing is loaded, or a training is active.
        """
        loaded = self._idle_model("prepared again")
        prepared = self._engine.prepare(request)
        prepared.model_id = self.model_id
        prepared.state = Model.STATE_PREPARED
        prepared.load_time.CopyFrom(loaded.load_time)
        self._model = prepared
        return self._model_now(prepared)

    def take_training(self, request: StartTrainingRequest) -> tuple[TrainingRun, bool]:
        """Takes a training over. Returns it, and whether it is new: an equal request may come twice.

        One that is over may come again with another request: it is resumed.

        Raises:
            PreconditionError: The model is not prepared, or another training is active.
            AlreadyExistsError: It was handed over with other content, and this one is not a resume.
            OutOfRangeError: The log does not end where the request says.
        """
        with self._lock:
            known = self._runs.get(request.training_id)
            if known is not None and known.request == request:
                return known, False
            if known is not None and (not known.is_over or request.next_sequence <= known.last_sequence):
                raise AlreadyExistsError(
                    ErrorReason.ERROR_REASON_REQUEST_ID_REUSED,
                    f"Training '{request.training_id}' was handed over before with other content. "
                    "Take a new training_id.",
                )
            self._check_not_ending()
            self._prepared_model("trained")
            run = TrainingRun(request)
            self._runs[request.training_id] = run
            self._latest = run
            return run, True

    def train(self, run: TrainingRun) -> None:
        """Runs a training that was taken over. Main thread."""
        run.execute(self._engine)

    def plan(self, request: PlanTrainingRequest, cancelled: Event) -> TrainingPlan:
        """Works out what a training would do. Main thread."""
        self._prepared_model("planned for")
        return self._engine.plan(request, cancelled)

    def export(
        self, request: ExportModelRequest, report: Callable[[ExportProgress], None], cancelled: Event
    ) -> Artifact:
        """Writes the model in another form. Main thread."""
        self._idle_model("exported")
        return self._engine.export(request, report, cancelled)

    def check_idle(self, asked: str) -> None:
        """Refuses what would wait behind a whole training for the main thread.

        Args:
            asked: What the model would be: "prepared again", "asked for text".

        Raises:
            PreconditionError: Nothing is loaded, a training is active, or the worker is ending.
        """
        with self._lock:
            self._check_not_ending()
        self._idle_model(asked)

    def generate(self, request: GenerateRequest, cancelled: Event) -> Iterator[str | GenerateSummary]:
        """Yields text, then the summary. Main thread."""
        self._idle_model("asked for text")
        return self._engine.generate(request.request, cancelled)

    def _prepared_model(self, asked: str) -> Model:
        model = self._idle_model(asked)
        if model.state != Model.STATE_PREPARED:
            raise PreconditionError(
                ErrorReason.ERROR_REASON_MODEL_NOT_PREPARED,
                f"Model '{self.model_id}' has no trainable parameters yet. Call PrepareForTraining first.",
            )
        return model

    def _idle_model(self, asked: str) -> Model:
        run = self.active_run()
        if run is not None:
            training_id = run.request.training_id
            raise PreconditionError(
                ErrorReason.ERROR_REASON_MODEL_BUSY,
                f"Model '{self.model_id}' cannot be {asked} while training '{training_id}' runs on it. "
                "Wait for its end or cancel it.",
                metadata={"training_id": training_id},
            )
        if self._model is None:
            raise _not_ready(f"Model '{self.model_id}' is not loaded. Wait until LoadModel has ended.")
        return self._model

    def _check_not_ending(self) -> None:
        if self._ending:
            raise _not_ready(f"Model '{self.model_id}' is being unloaded. Load it again once that is done.")

    def _model_now(self, model: Model) -> Model:
        now = Model()
        now.CopyFrom(model)
        now.memory_bytes = self._engine.memory_bytes()
        run = self.active_run()
        if run is not None:
            now.state = Model.STATE_TRAINING
            now.active_training_id = run.request.training_id
        return now


def _not_ready(message: str) -> PreconditionError:
    return PreconditionError(ErrorReason.ERROR_REASON_MODEL_NOT_READY, message)
