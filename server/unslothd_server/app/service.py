"""The whole service in its own words: models and trainings together, and what concerns both."""

import functools
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from unslothd._version import __version__
from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.server_info_pb2 import ServerLimits
from unslothd.v1.service_pb2 import GetServerInfoResponse
from unslothd_server.app.datasets import Datasets
from unslothd_server.app.downloads import Downloads
from unslothd_server.app.exports import Exports
from unslothd_server.app.model_lifecycle import ModelLifecycle
from unslothd_server.app.models import Models
from unslothd_server.app.ports import WarmWorkers
from unslothd_server.app.stopping import watch_interrupted
from unslothd_server.app.training_acceptance import TrainingAcceptance
from unslothd_server.app.training_control import TrainingControl
from unslothd_server.app.trainings import Trainings
from unslothd_server.errors import PreconditionError

ENGINE_PACKAGES = ("unsloth", "unsloth-zoo", "torch", "transformers", "trl", "peft", "datasets", "bitsandbytes")


@dataclass
class Service:
    """What the RPCs call.

    Args:
        datasets: Uploaded datasets.
        models: The registry of models.
        lifecycle: Loads, prepares and unloads them.
        trainings: The registry of trainings.
        acceptance: Takes trainings on and plans them.
        control: Stops them and lets them go on.
        exports: Exports that run.
        downloads: Files of artifacts and checkpoints.
        warm_workers: Spares that loads take.
        max_loaded_models: Most models at a time.
        max_queued_trainings: Most trainings that wait on one model.
    """

    datasets: Datasets
    models: Models
    lifecycle: ModelLifecycle
    trainings: Trainings
    acceptance: TrainingAcceptance
    control: TrainingControl
    exports: Exports
    downloads: Downloads
    warm_workers: WarmWorkers
    max_loaded_models: int
    max_queued_trainings: int

    def server_info(self) -> GetServerInfoResponse:
        """Versions, devices and the limits of what is stored and loaded."""
        devices = self.models.devices()
        return GetServerInfoResponse(
            server_version=__version__,
            engine_versions=_engine_versions(),
            devices=devices,
            limits=ServerLimits(
                max_dataset_bytes=self.datasets.max_bytes,
                max_loaded_models=self.max_loaded_models,
                export_formats=self.exports.formats(devices),
                max_queued_trainings=self.max_queued_trainings,
            ),
            warm_workers=self.warm_workers.num_ready,
        )

    async def delete_dataset(self, dataset_id: str) -> None:
        """Removes a dataset.

        Raises:
            PreconditionError: DATASET_IN_USE, while a training that is not over reads it.
        """
        await self.datasets.delete(dataset_id, self.trainings.users_of_dataset(dataset_id))

    async def unload(self, model_id: str, *, force: bool) -> int:
        """Unloads a model; returns the bytes that its device has back.

        Raises:
            PreconditionError: MODEL_BUSY, when trainings run or wait on it, or it is exported, and force is false.
        """
        self.models.get(model_id)
        pending = self.trainings.pending_on(model_id)
        if pending and not force:
            raise PreconditionError(
                ErrorReason.ERROR_REASON_MODEL_BUSY,
                f'{len(pending)} training(s) run or wait on "{model_id}": {pending[0].training_id}. '
                "Wait for the end, cancel them, or unload with force, which cancels them with a checkpoint.",
            )
        if self.exports.running_on(model_id) and not force:
            raise PreconditionError(
                ErrorReason.ERROR_REASON_MODEL_BUSY,
                f'"{model_id}" is being exported. Wait for the end of ExportModel, or unload with force to end it.',
            )
        await self.exports.stop_on(model_id)
        if pending:
            await self.control.stop_all_on(model_id)
        return await self.lifecycle.unload(model_id)

    async def close(self, *, leave_running: bool = False) -> None:
        """Ends watches with a resumable error, then pauses what trains and ends the workers.

        Args:
            leave_running: Workers go on; the next server on this home takes them over.
        """
        self.trainings.interrupt_watchers(watch_interrupted())
        await self.warm_workers.close()
        if not leave_running:
            await self.control.pause_running()
        self.models.refuse_new()
        await self.exports.close()
        await self.control.close(leave_running=leave_running)
        await self.lifecycle.close(leave_workers=leave_running)


@functools.cache
def _engine_versions() -> dict[str, str]:
    """Versions by package metadata, which takes 15 ms to read: the packages themselves are never imported here."""
    versions: dict[str, str] = {}
    for package in ENGINE_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
