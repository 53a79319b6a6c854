"""WorkerService: what the server's calls become. Engine work goes to the main thread, the rest is answered here."""

from collections.abc import Callable, Iterator
from functools import partial
from threading import Event
from typing import TypeVar

import grpc

from unslothd.v1.artifact_pb2 import ExportProgress
from unslothd.v1.generation_pb2 import GenerateSummary
from unslothd.v1.model_pb2 import LoadProgress, Model
from unslothd.v1.training_pb2 import TrainingPlan
from unslothd.worker.v1 import worker_service_pb2 as messages
from unslothd.worker.v1.worker_service_pb2_grpc import WorkerServiceServicer
from unslothd_server.worker.commands import Command, CommandQueue
from unslothd_server.worker.ending import Ending
from unslothd_server.worker.faults import aborting
from unslothd_server.worker.holder import ModelHolder

T = TypeVar("T")


class WorkerService(WorkerServiceServicer):
    """Serves one model.

    Args:
        holder: The model.
        commands: The main thread.
    """

    ending: Ending  # set before the server starts: ending needs the server, which needs this

    def __init__(self, holder: ModelHolder, commands: CommandQueue) -> None:
        self._holder = holder
        self._commands = commands

    def GetStatus(
        self, request: messages.GetStatusRequest, context: grpc.ServicerContext
    ) -> messages.GetStatusResponse:
        """What the worker is doing. Answers at any time."""
        with aborting(context, "reading the status"):
            if request.when_imported:
                self._commands.wait_imported()
            return self._holder.status()

    def TakeModel(
        self, request: messages.TakeModelRequest, context: grpc.ServicerContext
    ) -> messages.TakeModelResponse:
        """Makes a spare the worker of a model."""
        with aborting(context, "taking a model"):
            self._holder.take_model(request.bootstrap)
            return messages.TakeModelResponse()

    def LoadModel(
        self, request: messages.LoadModelRequest, context: grpc.ServicerContext
    ) -> Iterator[messages.LoadModelResponse]:
        """Loads the model on the main thread; goes on when the caller goes away."""
        with aborting(context, "loading the model"):
            self._holder.claim_load()
            if not self._commands.has_imported:
                starting = LoadProgress(phase=LoadProgress.PHASE_STARTING_WORKER, model_id=self._holder.model_id)
                yield messages.LoadModelResponse(progress=starting)
            yield from self._on_main(partial(self._load, request))

    def PrepareForTraining(
        self, request: messages.PrepareForTrainingRequest, context: grpc.ServicerContext
    ) -> messages.PrepareForTrainingResponse:
        """Attaches trainable parameters."""
        with aborting(context, "preparing the model"):
            self._holder.check_idle("prepared again")
            (model,) = self._on_main(partial(self._prepare, request))
            return messages.PrepareForTrainingResponse(model=model)

    def StartTraining(
        self, request: messages.StartTrainingRequest, context: grpc.ServicerContext
    ) -> messages.StartTrainingResponse:
        """Takes a training over; it runs as soon as the main thread is free."""
        with aborting(context, "taking a training over"):
            run, is_new = self._holder.take_training(request)
            if is_new:
                self._commands.post(lambda: self._holder.train(run))
            return messages.StartTrainingResponse()

    def WatchTraining(
        self, request: messages.WatchTrainingRequest, context: grpc.ServicerContext
    ) -> Iterator[messages.WatchTrainingResponse]:
        """Streams events from the log, then as they come."""
        with aborting(context, "watching a training"):
            run = self._holder.run_of(request.training_id)
            for event in run.follow(request.after_sequence, context.is_active):
                yield messages.WatchTrainingResponse(event=event)

    def CancelTraining(
        self, request: messages.CancelTrainingRequest, context: grpc.ServicerContext
    ) -> messages.CancelTrainingResponse:
        """Tells a training to stop at its next step boundary."""
        with aborting(context, "cancelling a training"):
            self._holder.run_of(request.training_id).cancel(save_checkpoint=request.save_checkpoint)
            return messages.CancelTrainingResponse()

    def PauseTraining(
        self, request: messages.PauseTrainingRequest, context: grpc.ServicerContext
    ) -> messages.PauseTrainingResponse:
        """Tells a training to stop at its next step boundary, to go on later."""
        with aborting(context, "pausing a training"):
            self._holder.run_of(request.training_id).pause()
            return messages.PauseTrainingResponse()

    def PlanTraining(
        self, request: messages.PlanTrainingRequest, context: grpc.ServicerContext
    ) -> messages.PlanTrainingResponse:
        """Works out what a training would do; stops when the caller goes away."""
        with aborting(context, "planning a training"):
            self._holder.check_idle("planned for")
            cancelled = _when_gone(context)
            plans = list(self._on_main(partial(self._plan, request, cancelled)))
            return messages.PlanTrainingResponse(plan=plans[0] if plans else None)

    def ExportModel(
        self, request: messages.ExportModelRequest, context: grpc.ServicerContext
    ) -> Iterator[messages.ExportModelResponse]:
        """Writes the model in another form; goes on when the caller goes away."""
        with aborting(context, "exporting the model"):
            self._holder.check_idle("exported")
            yield from self._on_main(partial(self._export, request))

    def Generate(
        self, request: messages.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[messages.GenerateResponse]:
        """Streams text; stops when the caller goes away."""
        with aborting(context, "generating"):
            self._holder.check_idle("asked for text")
            cancelled = _when_gone(context)
            for part in self._on_main(partial(self._generate, request, cancelled)):
                if isinstance(part, GenerateSummary):
                    yield messages.GenerateResponse(summary=part)
                else:
                    yield messages.GenerateResponse(text=part)

    def Shutdown(self, request: messages.ShutdownRequest, context: grpc.ServicerContext) -> messages.ShutdownResponse:
        """Begins to end the process."""
        with aborting(context, "shutting down"):
            self.ending.begin("asked by Shutdown", save_checkpoint=request.save_checkpoint)
            return messages.ShutdownResponse()

    def _on_main(self, work: Callable[[Callable[[T], None]], None]) -> Iterator[T]:
        command = Command(work)
        self._commands.post(command.execute)
        return command.items()

    def _load(self, request: messages.LoadModelRequest, put: Callable[[messages.LoadModelResponse], None]) -> None:
        def report(progress: LoadProgress) -> None:
            named = LoadProgress()
            named.CopyFrom(progress)
            named.model_id = self._holder.model_id
            put(messages.LoadModelResponse(progress=named))

        model: Model = self._holder.load(request, report)
        put(messages.LoadModelResponse(model=model))

    def _prepare(self, request: messages.PrepareForTrainingRequest, put: Callable[[Model], None]) -> None:
        put(self._holder.prepare(request))

    def _plan(
        self, request: messages.PlanTrainingRequest, cancelled: Event, put: Callable[[TrainingPlan], None]
    ) -> None:
        if not cancelled.is_set():
            put(self._holder.plan(request, cancelled))

    def _export(
        self, request: messages.ExportModelRequest, put: Callable[[messages.ExportModelResponse], None]
    ) -> None:
        def report(progress: ExportProgress) -> None:
            put(messages.ExportModelResponse(progress=progress))

        # The server goes on with an export whose caller has left; only the end of the worker ends it.
        artifact = self._holder.export(request, report, Event())
        put(messages.ExportModelResponse(artifact=artifact))

    def _generate(
        self, request: messages.GenerateRequest, cancelled: Event, put: Callable[[str | GenerateSummary], None]
    ) -> None:
        if cancelled.is_set():
            return  # the caller went away while this waited for its turn
        for part in self._holder.generate(request, cancelled):
            put(part)


def _when_gone(context: grpc.ServicerContext) -> Event:
    """An event that is set once the caller has gone."""
    gone = Event()
    if not context.add_callback(gone.set):
        gone.set()
    return gone
