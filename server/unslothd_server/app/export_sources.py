"""What an export is made from: a loaded model, the files of a checkpoint, or a worker that loads it for the purpose."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Protocol

from unslothd.v1.artifact_pb2 import Artifact, ExportFormat, ExportProgress
from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.model_pb2 import LoadProgress
from unslothd.v1.service_pb2 import LoadModelRequest
from unslothd.worker.v1 import worker_service_pb2 as worker_pb2
from unslothd_server.app.files import open_inside
from unslothd_server.app.memory_admission import MemoryAdmission
from unslothd_server.app.model_lifecycle import DEFAULT_MAX_SEQ_LENGTH
from unslothd_server.app.models import Models
from unslothd_server.app.ports import WorkerLauncher
from unslothd_server.app.sources import ModelSource
from unslothd_server.errors import AbortedError, UnslothdError
from unslothd_server.export_folder import appearing_whole, hashed_files, regular_files
from unslothd_server.export_formats import export_unsupported

Report = Callable[[ExportProgress], None]

WAITING = ExportProgress(phase="waiting")
# Of a checkpoint, what belongs to the adapter and its tokenizer; the rest is the trainer's.
_ADAPTER_SUFFIXES = frozenset({".json", ".safetensors", ".jinja", ".model", ".txt"})
_TRAINERS_FILES = frozenset({"trainer_state.json", "manifest.json", "receipt.json"})


class ExportSource(Protocol):
    """Writes an artifact."""

    async def write(self, request: worker_pb2.ExportModelRequest, report: Report) -> Artifact:
        """Writes the folder `request.output_dir`; it appears whole or not at all. The artifact_id is left empty."""
        ...


class LiveModel:
    """A loaded model. While it is written no training begins on it; one that was accepted stays QUEUED.

    Args:
        models: The registry.
        model_id: The model.
    """

    def __init__(self, models: Models, model_id: str) -> None:
        self._models = models
        self._model_id = model_id

    async def write(self, request: worker_pb2.ExportModelRequest, report: Report) -> Artifact:
        """Writes it by its own worker."""
        entry = self._models.get(self._model_id)
        if entry.lock.locked():
            report(WAITING)
        async with entry.lock:
            return await _last(self._models.get(self._model_id).idle_worker("export it").export(request), report)


class CheckpointFiles:
    """The files of a checkpoint or result, copied as they are.

    Args:
        folder: Absolute folder of the checkpoint.

    Raises:
        PreconditionError: There is no adapter in it (EXPORT_UNSUPPORTED).
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        if not (folder / "adapter_config.json").is_file():
            raise export_unsupported(
                f"{folder.name} holds no adapter: all weights of its model were trained. Export it as MERGED_16BIT."
            )

    async def write(self, request: worker_pb2.ExportModelRequest, report: Report) -> Artifact:
        """Copies the files of the adapter and of its tokenizer."""
        loop = asyncio.get_running_loop()

        def report_from_thread(progress: ExportProgress) -> None:
            loop.call_soon_threadsafe(report, progress)

        report(ExportProgress(phase="writing"))
        return await asyncio.to_thread(self._copy, request, report_from_thread)

    def _copy(self, request: worker_pb2.ExportModelRequest, report: Report) -> Artifact:
        target = Path(request.output_dir)
        with appearing_whole(target) as work:
            for name, path in regular_files(self._folder).items():
                if path.suffix in _ADAPTER_SUFFIXES and name not in _TRAINERS_FILES:
                    copy = work / name
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    with open_inside(path, self._folder) as source, copy.open("wb") as stream:
                        shutil.copyfileobj(source, stream)
            files = hashed_files(work)
            size = sum(file.num_bytes for file in files)
            report(ExportProgress(phase="hashing", done=size, total=size))
        return Artifact(path=str(target), files=files, format=request.format)


class TemporaryWorkers:
    """Workers that live for one export of a checkpoint; one at a time, so that they do not crowd out the models.

    Args:
        launcher: Starts workers.
        admission: Knows whether the model fits.
    """

    def __init__(self, launcher: WorkerLauncher, admission: MemoryAdmission) -> None:
        self._launcher = launcher
        self._admission = admission
        self._turn = asyncio.Lock()

    async def export(
        self, folder: Path, worker_id: str, request: worker_pb2.ExportModelRequest, report: Report
    ) -> Artifact:
        """Starts a worker, loads a checkpoint, exports it, and ends the worker whatever happens.

        Raises:
            UnslothdError: INSUFFICIENT_MEMORY, WORKER_DIED, and what loading and exporting raise.
        """
        if self._turn.locked():
            report(WAITING)
        async with self._turn:
            load = LoadModelRequest(model_name=folder.name, load_in_4bit=False)
            self._admission.reserve(worker_id, _weights_of(folder), load)
            try:
                return await self._export(folder, worker_id, request, report)
            except AbortedError as error:
                raise _of_this_export(error) from error
            finally:
                self._admission.release(worker_id)

    async def _export(
        self, folder: Path, worker_id: str, request: worker_pb2.ExportModelRequest, report: Report
    ) -> Artifact:
        report(ExportProgress(phase="starting worker"))
        worker = await self._launcher.launch(worker_id, device_map="auto")
        try:
            # 16-bit weights on a GPU, whatever the training had: an export shall lose nothing.
            load = worker_pb2.LoadModelRequest(
                model_name=folder.name,
                source=str(folder),
                max_seq_length=DEFAULT_MAX_SEQ_LENGTH,
                load_in_4bit=False,
            )
            async for response in worker.load(load):
                if response.HasField("progress"):
                    report(_loading(response.progress))
            return await _last(worker.export(request), report)
        finally:
            await worker.stop()


class CheckpointModel:
    """A checkpoint or result, loaded by a worker of its own.

    Args:
        workers: Where that worker comes from.
        folder: Absolute folder of the checkpoint.
        worker_id: Name of the worker; no model has it.
    """

    def __init__(self, workers: TemporaryWorkers, folder: Path, worker_id: str) -> None:
        self._workers = workers
        self._folder = folder
        self._worker_id = worker_id

    async def write(self, request: worker_pb2.ExportModelRequest, report: Report) -> Artifact:
        """Loads and writes it."""
        return await self._workers.export(self._folder, self._worker_id, request, report)


def needs_worker(form: "ExportFormat.ValueType") -> bool:
    """True when the form of a checkpoint is not just a copy of its files."""
    return form != ExportFormat.EXPORT_FORMAT_ADAPTER


async def _last(responses: AsyncIterator[worker_pb2.ExportModelResponse], report: Report) -> Artifact:
    artifact = Artifact()
    async for response in responses:
        if response.HasField("progress"):
            report(response.progress)
        else:
            artifact = response.artifact
    return artifact


def _loading(progress: LoadProgress) -> ExportProgress:
    phase = LoadProgress.Phase.Name(progress.phase).removeprefix("PHASE_").lower().replace("_", " ")
    return ExportProgress(phase=phase, done=progress.done, total=progress.total)


def _weights_of(folder: Path) -> ModelSource:
    """Where the bulk of the weights is: an adapter's base model, if it is a folder here; else the folder itself."""
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = ""
    path = Path(base) if isinstance(base, str) and Path(base).is_dir() else folder
    return ModelSource(str(path), path, base_id="")


def _of_this_export(error: AbortedError) -> UnslothdError:
    if error.reason != ErrorReason.ERROR_REASON_WORKER_DIED:
        return error
    return AbortedError(
        error.reason,
        f"The worker that loaded the checkpoint for this export died, and nothing of the export was kept. Export again "
        f"once its cause is mended. {error.message}",
        metadata=error.metadata,
    )
