"""The RPCs: each takes a request apart, calls the app, and puts the answer together."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import grpc.aio
import structlog

from unslothd.v1 import service_pb2 as pb
from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.service_pb2_grpc import UnslothServiceServicer
from unslothd.v1.training_pb2 import Training
from unslothd_server.access.callers import CURRENT
from unslothd_server.access.limits import CallLimits
from unslothd_server.app.service import Service
from unslothd_server.errors import AbortedError, UnslothdError
from unslothd_server.status import from_status

log = structlog.get_logger()

Context = grpc.aio.ServicerContext[Any, Any]


class UnslothServicer(UnslothServiceServicer):
    """Serves `unslothd.v1.UnslothService`.

    Args:
        service: What does the work.
        limits: What calls may hold.
    """

    def __init__(self, service: Service, limits: CallLimits) -> None:
        self._service = service
        self._limits = limits
        # Calls that outlive the stream which asked for them; asyncio itself keeps only weak references.
        self._background: set[asyncio.Task[Training]] = set()

    # --- server ---

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> pb.GetServerInfoResponse:
        """Versions, devices, limits and the caller."""
        info = self._service.server_info()
        caller = CURRENT.get()
        info.caller.CopyFrom(caller.to_message())
        info.limits.MergeFrom(self._limits.for_caller(caller))
        return info

    # --- models ---

    async def LoadModel(self, request: pb.LoadModelRequest, context: Context) -> AsyncIterator[pb.LoadModelResponse]:
        """Progress, then the model."""
        async for response in self._service.lifecycle.load(request):
            yield response

    async def PrepareForTraining(
        self, request: pb.PrepareForTrainingRequest, context: Context
    ) -> pb.PrepareForTrainingResponse:
        """Attaches trainable parameters."""
        model, config, lora = await self._service.lifecycle.prepare(request)
        return pb.PrepareForTrainingResponse(model=model, training_config=config, lora=lora)

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        """One model."""
        return pb.GetModelResponse(model=await self._service.models.describe(request.model_id))

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """All models."""
        return pb.ListModelsResponse(models=await self._service.models.describe_all())

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Context) -> pb.UnloadModelResponse:
        """Ends the worker of a model."""
        freed = await self._service.unload(request.model_id, force=request.force)
        return pb.UnloadModelResponse(freed_memory_bytes=freed)

    # --- datasets ---

    async def UploadDataset(  # pyright: ignore[reportIncompatibleMethodOverride] - the stub has both kinds of iterator
        self, request: AsyncIterator[pb.UploadDatasetRequest], context: Context
    ) -> pb.UploadDatasetResponse:
        """Stores rows, unless they are there already."""
        dataset, already_present = await self._service.datasets.receive(request)
        return pb.UploadDatasetResponse(dataset=dataset, already_present=already_present)

    async def GetDataset(self, request: pb.GetDatasetRequest, context: Context) -> pb.GetDatasetResponse:
        """One dataset."""
        return pb.GetDatasetResponse(dataset=self._service.datasets.get(request.dataset_id))

    async def ListDatasets(self, request: pb.ListDatasetsRequest, context: Context) -> pb.ListDatasetsResponse:
        """A page of datasets."""
        datasets, token = self._service.datasets.list_page(request)
        return pb.ListDatasetsResponse(datasets=datasets, next_page_token=token)

    async def DeleteDataset(self, request: pb.DeleteDatasetRequest, context: Context) -> pb.DeleteDatasetResponse:
        """Removes a dataset that no training needs."""
        await self._service.delete_dataset(request.dataset_id)
        return pb.DeleteDatasetResponse()

    # --- trainings ---

    async def Train(self, request: pb.TrainRequest, context: Context) -> AsyncIterator[pb.TrainResponse]:
        """Every event of a new training, from the first."""
        run = self._service.acceptance.accept(request)
        try:
            async for frame in self._service.trainings.watch(run.training_id, 0):
                yield cast(pb.TrainResponse, frame)  # bytes of one; see the interceptor's serializer
        except (asyncio.CancelledError, GeneratorExit):
            if request.disconnect_policy == pb.DisconnectPolicy.DISCONNECT_POLICY_CANCEL:
                self._cancel_in_background(run.training_id)
            raise
        error = _error_of(run.training)
        if error is not None:
            raise error

    def _cancel_in_background(self, training_id: str) -> None:
        """The caller is gone, so nobody waits for this."""
        cancelling = self._service.control.cancel(training_id, save_checkpoint=True)
        task = asyncio.create_task(cancelling, name=f"cancel {training_id}")
        self._background.add(task)
        task.add_done_callback(self._background_done)

    def _background_done(self, task: "asyncio.Task[Training]") -> None:
        self._background.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("background call failed", task=task.get_name(), exc_info=task.exception())

    async def WatchTraining(
        self, request: pb.WatchTrainingRequest, context: Context
    ) -> AsyncIterator[pb.WatchTrainingResponse]:
        """Events after a sequence, then as they come."""
        trainings = self._service.trainings
        async for frame in trainings.watch(request.training_id, request.after_sequence, request.max_events):
            yield cast(pb.WatchTrainingResponse, frame)  # bytes of one; see the interceptor's serializer

    async def GetTraining(self, request: pb.GetTrainingRequest, context: Context) -> pb.GetTrainingResponse:
        """One training."""
        return pb.GetTrainingResponse(training=self._service.trainings.describe(request.training_id))

    async def ListTrainings(self, request: pb.ListTrainingsRequest, context: Context) -> pb.ListTrainingsResponse:
        """A page of trainings."""
        trainings, token = self._service.trainings.list_page(request)
        return pb.ListTrainingsResponse(trainings=trainings, next_page_token=token)

    async def CancelTraining(self, request: pb.CancelTrainingRequest, context: Context) -> pb.CancelTrainingResponse:
        """Stops a training at the next step boundary."""
        training = await self._service.control.cancel(request.training_id, save_checkpoint=request.save_checkpoint)
        return pb.CancelTrainingResponse(training=training)

    async def PauseTraining(self, request: pb.PauseTrainingRequest, context: Context) -> pb.PauseTrainingResponse:
        """Stops a training at the next step boundary, to go on later."""
        return pb.PauseTrainingResponse(training=await self._service.control.pause(request.training_id))

    async def ResumeTraining(self, request: pb.ResumeTrainingRequest, context: Context) -> pb.ResumeTrainingResponse:
        """Goes on with a training."""
        return pb.ResumeTrainingResponse(training=self._service.control.resume(request))

    async def PlanTraining(self, request: pb.PlanTrainingRequest, context: Context) -> pb.PlanTrainingResponse:
        """What Train would do."""
        return pb.PlanTrainingResponse(plan=await self._service.acceptance.plan(request))

    # --- text ---

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        """Text, then a summary."""
        async for part in self._service.models.generate(request):
            if part.HasField("summary"):
                yield pb.GenerateResponse(summary=part.summary)
            else:
                yield pb.GenerateResponse(text=part.text)

    # --- files ---

    async def ExportModel(
        self, request: pb.ExportModelRequest, context: Context
    ) -> AsyncIterator[pb.ExportModelResponse]:
        """Progress, then the artifact."""
        async for response in self._service.exports.export(request):
            yield response

    async def DownloadArtifact(
        self, request: pb.DownloadArtifactRequest, context: Context
    ) -> AsyncIterator[pb.DownloadArtifactResponse]:
        """Every file in turn: its header, then chunks."""
        async for response in self._service.downloads.download(request):
            yield response


def _error_of(training: Training) -> UnslothdError | None:
    """What Train ends with: the training's own error, or that it was cancelled."""
    if training.state == Training.STATE_FAILED:
        return from_status(training.error)
    if training.state == Training.STATE_CANCELLED:
        kept = f"The adapter so far is in {training.output_dir}." if training.output_dir else "Nothing was saved."
        return AbortedError(
            ErrorReason.ERROR_REASON_TRAINING_CANCELLED,
            f"The training was cancelled after step {training.step}. {kept}",
            metadata={"step": str(training.step)},
        )
    return None
