"""Exports: accepted, written by a worker, followed by any number of callers, and kept as artifacts."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from unslothd.v1.artifact_pb2 import Artifact, ExportFormat, ExportProgress
from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.server_info_pb2 import Device
from unslothd.v1.service_pb2 import ExportModelRequest, ExportModelResponse
from unslothd.worker.v1 import worker_service_pb2 as worker_pb2
from unslothd_server import disk
from unslothd_server.app.artifacts import Artifacts
from unslothd_server.app.broadcast import Broadcast
from unslothd_server.app.export_sources import (
    CheckpointFiles,
    CheckpointModel,
    ExportSource,
    LiveModel,
    TemporaryWorkers,
    needs_worker,
)
from unslothd_server.app.models import Models
from unslothd_server.app.paths import AllowedRoots, has_content
from unslothd_server.app.stopping import stopping
from unslothd_server.errors import (
    AbortedError,
    AlreadyExistsError,
    ExhaustedError,
    UnexpectedError,
    UnslothdError,
)
from unslothd_server.export_formats import DEFAULT_GGUF_QUANTIZATION, check_export, export_formats

log = structlog.get_logger()

EXPORTS = "exports"


@dataclass
class ExportRun:
    """One export while it runs.

    Args:
        artifact: What it will be; its path is reserved.
        model_id: The loaded model that it is written by; empty = none.
        responses: For every caller that follows it.
        task: Writes it.
    """

    artifact: Artifact
    model_id: str
    responses: Broadcast[ExportModelResponse] = field(default_factory=Broadcast[ExportModelResponse])
    task: "asyncio.Task[None] | None" = None


class Exports:
    """The exports that run. Each goes on without its caller; an equal request attaches to it while it runs.

    Args:
        models: Loaded models.
        workers: Workers for checkpoints.
        artifacts: Where results are kept.
        output_root: Folder of all results.
        result_of: Returns the folder of a training's result (step 0) or checkpoint; raises NotFoundError.
    """

    def __init__(
        self,
        models: Models,
        workers: TemporaryWorkers,
        artifacts: Artifacts,
        output_root: Path,
        result_of: Callable[[str, int], Path],
    ) -> None:
        self._models = models
        self._workers = workers
        self._artifacts = artifacts
        self._root = output_root
        self._result_of = result_of
        self._running: dict[bytes, ExportRun] = {}
        self._closing = False

    def formats(self, devices: Sequence[Device]) -> "Sequence[ExportFormat.ValueType]":
        """The forms that can be written on a host with these devices."""
        return export_formats([device.device for device in devices])

    def running_on(self, model_id: str) -> list[ExportRun]:
        """The exports that a loaded model writes, or will."""
        return [run for run in self._running.values() if run.model_id == model_id]

    async def export(self, request: ExportModelRequest) -> AsyncIterator[ExportModelResponse]:
        """Exports, or attaches to the equal export that runs; yields progress, then the artifact.

        Raises:
            UnslothdError: As the contract says.
        """
        key = request.SerializeToString(deterministic=True)
        run = self._running.get(key) or self._begin(request, key)
        async for response in run.responses.follow():
            yield response

    def _begin(self, request: ExportModelRequest, key: bytes) -> ExportRun:
        """Refuses what can be refused at once; else begins."""
        if self._closing:
            raise stopping()
        check_export(request, self.formats(self._models.devices()))
        source, beside = self._source(request)
        folder = self._folder(request, beside)
        try:
            artifact = self._artifacts.begin(folder, request.format)
        except OSError as error:
            raise _explained(error) from error
        run = ExportRun(artifact, request.model_id)
        self._running[key] = run
        run.task = asyncio.create_task(self._run(run, source, request), name=f"export {artifact.artifact_id}")
        run.task.add_done_callback(lambda _: self._over(run, key))
        return run

    def _over(self, run: ExportRun, key: bytes) -> None:
        self._running.pop(key, None)
        run.responses.close(stopping())  # of one that was ended before it began; the others are closed already

    def _source(self, request: ExportModelRequest) -> tuple[ExportSource, str]:
        """What is exported, and the first part of the default folder, relative to the output root."""
        if request.WhichOneof("source") == "model_id":
            self._models.get(request.model_id).idle_worker("export it")
            return LiveModel(self._models, request.model_id), self._beside_results(request.model_id)
        checkpoint = request.checkpoint
        folder = self._result_of(checkpoint.training_id, checkpoint.step)
        beside = f"{folder.parent.relative_to(self._root).as_posix()}/{EXPORTS}/"
        if checkpoint.step:
            beside += f"checkpoint-{checkpoint.step}-"
        if needs_worker(request.format):
            return CheckpointModel(self._workers, folder, f"export-{secrets.token_hex(6)}"), beside
        return CheckpointFiles(folder), beside

    def _beside_results(self, model_id: str) -> str:
        """Beside the results of the training that made the weights of a model, if one did."""
        stored = self._models.get(model_id).stored
        made = Path((stored.prepare.weights_from if stored.prepare is not None else "") or stored.source)
        if made.is_absolute() and made.is_relative_to(self._root) and made.parent != self._root:
            return f"{made.parent.relative_to(self._root).as_posix()}/{EXPORTS}/"
        return f"{EXPORTS}/{model_id}-"

    def _folder(self, request: ExportModelRequest, beside: str) -> Path:
        taken = {run.artifact.path for run in self._running.values()}
        if request.output_dir:
            folder = self._root / request.output_dir
            AllowedRoots([self._root]).check(folder)
            if str(folder) in taken or has_content(folder):
                raise _taken(request.output_dir)
            return folder
        first = folder = self._root / f"{beside}{_form_name(request)}"
        number = 2
        while str(folder) in taken or folder.exists():
            folder, number = first.with_name(f"{first.name}-{number}"), number + 1
        return folder

    async def _run(self, run: ExportRun, source: ExportSource, request: ExportModelRequest) -> None:
        """Writes an export to its end, whatever that is. Raises nothing."""
        error: UnslothdError | None = None
        is_whole = False
        wanted = worker_pb2.ExportModelRequest(
            format=request.format, gguf_quantization=_quantization(request), output_dir=run.artifact.path
        )
        try:
            written = await source.write(wanted, lambda progress: _report(run, progress))
            is_whole = True
            run.artifact.files.extend(written.files)
            await asyncio.to_thread(self._artifacts.finish, run.artifact)
            run.responses.append(ExportModelResponse(artifact=run.artifact))
        except asyncio.CancelledError:
            error = stopping() if self._closing else _cancelled(run.model_id)
        except Exception as caught:  # noqa: BLE001 - whatever it is, every caller gets it
            error = _known(caught, run)
        if error is not None:
            with contextlib.suppress(OSError):
                await asyncio.to_thread(self._artifacts.discard, run.artifact, folder_is_ours=is_whole)
        run.responses.close(error)

    async def stop_on(self, model_id: str) -> None:
        """Ends the exports that a model writes; nothing of them stays. Its worker has to be ended then."""
        await _end(self.running_on(model_id))

    async def close(self) -> None:
        """Ends every export and takes no new one; nothing half-written stays."""
        self._closing = True
        await _end(list(self._running.values()))


def _report(run: ExportRun, progress: ExportProgress) -> None:
    run.responses.append(ExportModelResponse(progress=progress))


async def _end(runs: Sequence[ExportRun]) -> None:
    tasks = [run.task for run in runs if run.task is not None]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _quantization(request: ExportModelRequest) -> str:
    if request.format != ExportFormat.EXPORT_FORMAT_GGUF:
        return ""
    return request.gguf_quantization.lower() or DEFAULT_GGUF_QUANTIZATION


def _form_name(request: ExportModelRequest) -> str:
    """E.g. "merged-16bit" or "gguf-q8_0"."""
    form = ExportFormat.Name(request.format).removeprefix("EXPORT_FORMAT_").lower().replace("_", "-")
    return "-".join(part for part in (form, _quantization(request)) if part)


def _taken(output_dir: str) -> AlreadyExistsError:
    return AlreadyExistsError(
        ErrorReason.ERROR_REASON_OUTPUT_DIR_TAKEN,
        f'output_dir "{output_dir}" holds the results of a training or export, or will, and they are never '
        "overwritten. Choose another name, or leave it unset for a free one.",
    )


def _cancelled(model_id: str) -> AbortedError:
    return AbortedError(
        ErrorReason.ERROR_REASON_WORKER_DIED,
        f'Model "{model_id}" was unloaded while it was exported, so nothing was kept. Load it, then export it again.',
        metadata={"model_id": model_id},
    )


def _explained(error: OSError) -> Exception:
    """What a caller is told of a disk that fails: DISK_FULL, NOT_WRITABLE, or the error itself."""
    if error.errno not in disk.NO_ROOM:
        return disk.unwritable(error, Path("The folder of the export"), "export again: nothing was kept") or error
    return ExhaustedError(
        ErrorReason.ERROR_REASON_DISK_FULL,
        "The disk is full, so nothing of the export was kept. Free some space, then export again.",
    )


def _known(error: Exception, run: ExportRun) -> UnslothdError:
    explained = _explained(error) if isinstance(error, OSError) else error
    if isinstance(explained, UnslothdError):
        return explained
    unexpected = UnexpectedError()
    log.error("unexpected error", export=run.artifact.path, error_id=unexpected.error_id, exc_info=error)
    return unexpected
