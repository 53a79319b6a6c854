"""From settings to the service: puts its parts together, and brings back what an earlier server had."""

import os

from unslothd_server.app.artifacts import Artifacts
from unslothd_server.app.dataset_store import DatasetStore
from unslothd_server.app.datasets import Datasets
from unslothd_server.app.downloads import Downloads
from unslothd_server.app.export_sources import TemporaryWorkers
from unslothd_server.app.exports import Exports
from unslothd_server.app.memory_admission import MemoryAdmission
from unslothd_server.app.model_lifecycle import ModelLifecycle
from unslothd_server.app.model_recovery import ModelRecovery
from unslothd_server.app.model_store import ModelStore
from unslothd_server.app.model_workers import ModelWorkers
from unslothd_server.app.models import Models
from unslothd_server.app.paths import AllowedRoots
from unslothd_server.app.service import Service
from unslothd_server.app.training_acceptance import TrainingAcceptance
from unslothd_server.app.training_control import TrainingControl
from unslothd_server.app.training_queues import TrainingQueues
from unslothd_server.app.training_recovery import TrainingRecovery
from unslothd_server.app.training_store import TrainingStore
from unslothd_server.app.trainings import Trainings
from unslothd_server.config import Settings
from unslothd_server.workers.devices import HostDevices
from unslothd_server.workers.launcher import LocalLauncher
from unslothd_server.workers.row_checker import SubprocessRowChecker
from unslothd_server.workers.warm import WarmLauncher


async def build_service(settings: Settings, *, worker_command: tuple[str, ...]) -> Service:
    """Returns the service, whose models may still load and whose trainings go on."""
    home, allowed = settings.home, [*settings.model_roots, settings.output_root]
    datasets = Datasets(DatasetStore(home / "datasets"), SubprocessRowChecker(), max_bytes=settings.max_dataset_bytes)
    local = LocalLauncher(
        home, trust_remote_code=settings.trust_remote_code, model_roots=allowed, command=worker_command
    )
    launcher = WarmLauncher(local, settings.warm_workers)
    devices = HostDevices()
    admission = MemoryAdmission(devices)
    model_store = ModelStore(home / "models")
    models = Models(model_store, admission, devices, max_loaded=settings.max_loaded_models)
    hub_token = os.environ.get("HF_TOKEN", "").strip()  # workers do not get the variable
    workers = ModelWorkers(launcher, admission, model_store, hub_token=hub_token)
    training_store = TrainingStore(home / "trainings", settings.output_root)
    trainings = Trainings(training_store, heartbeat_seconds=settings.heartbeat_seconds)
    queues = TrainingQueues(models, workers, stall_seconds=settings.stall_seconds)
    # An adapter that was trained on a .gguf file names its conversion in the cache as its base model.
    model_roots = AllowedRoots(allowed, untold=[home / "cache"])
    lifecycle = ModelLifecycle(models, workers, model_store, model_roots, trainings.result_of)
    trainings.read_all()
    returning = ModelRecovery(models, workers, lifecycle, model_store)
    await returning.recover(local.attach_living(), trainings.newest_result)
    await TrainingRecovery(trainings, queues, models, workers).recover()
    artifacts = Artifacts(home / "artifacts")
    return Service(
        datasets,
        models,
        lifecycle,
        trainings,
        TrainingAcceptance(
            trainings,
            queues,
            models,
            training_store,
            AllowedRoots(allowed),
            datasets.rows_of,
            max_queued=settings.max_queued_trainings,
        ),
        TrainingControl(trainings, queues, models, workers),
        Exports(models, TemporaryWorkers(launcher, admission), artifacts, settings.output_root, trainings.result_of),
        Downloads(artifacts, settings.output_root, trainings.result_of),
        launcher,
        max_loaded_models=settings.max_loaded_models,
        max_queued_trainings=settings.max_queued_trainings,
    )
