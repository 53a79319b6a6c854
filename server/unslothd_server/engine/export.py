"""Writes the loaded model in another form; the folder appears whole or not at all, and the model stays as it was."""

import traceback
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

from unslothd.v1.artifact_pb2 import Artifact, ExportFormat, ExportProgress
from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.worker.v1.worker_service_pb2 import ExportModelRequest
from unslothd_server.engine import gguf_export, hub
from unslothd_server.engine.devices import on_gpu
from unslothd_server.engine.disk_faults import disk_fault
from unslothd_server.engine.export_weights import merged_weights
from unslothd_server.engine.export_writer import write_model
from unslothd_server.engine.model_loading import LoadedModel
from unslothd_server.engine.oom import exhausted
from unslothd_server.errors import AbortedError, UnslothdError
from unslothd_server.export_folder import appearing_whole, hashed_files
from unslothd_server.export_formats import export_unsupported

OOM_REMEDY = "unload other models of this device and export again, or export from a checkpoint"


class Progress:
    """Reports the phases of an export, and ends it when it is cancelled.

    Args:
        report: Takes the progress.
        cancelled: Looked at in every report.
    """

    def __init__(self, report: Callable[[ExportProgress], None], cancelled: Event) -> None:
        self._report = report
        self._cancelled = cancelled
        self._last = ("", 0)

    def __call__(self, phase: str, done: int = 0, total: int = 0) -> None:
        """Tells what is done in a phase; hundredths that were told before are left out.

        Raises:
            AbortedError: The export was cancelled.
        """
        if self._cancelled.is_set():
            raise AbortedError(ErrorReason.ERROR_REASON_WORKER_DIED, "The export was cancelled; nothing was kept.")
        hundredth = 100 * done // total if total else 0
        if (phase, hundredth) != self._last:
            self._last = (phase, hundredth)
            self._report(ExportProgress(phase=phase, done=done, total=total))


def export(
    loaded: LoadedModel, request: ExportModelRequest, report: Callable[[ExportProgress], None], cancelled: Event
) -> Artifact:
    """Exports the model.

    Args:
        loaded: The model; not a bit of it changes.
        request: Form and folder.
        report: Takes the progress: merging and writing, converting, hashing.
        cancelled: Ends the export; nothing of it stays.

    Raises:
        PreconditionError: EXPORT_UNSUPPORTED.
        InvalidFieldsError: gguf_quantization is unknown.
        UnslothdError: DISK_FULL, NOT_WRITABLE, OUT_OF_MEMORY.
    """
    progress = Progress(report, cancelled)
    write = _writer(loaded, request, progress)
    target = Path(request.output_dir)
    try:
        with hub.offline(), appearing_whole(target) as work:
            write(work)
            files = hashed_files(work, lambda done, total: progress("hashing", done, total))
    except UnslothdError:
        raise
    except Exception as error:
        known = disk_fault(error, target.parent, "export again: nothing was kept") or exhausted(error, OOM_REMEDY)
        if known is None:
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors that did not fit
        raise known from error
    return Artifact(path=str(target), files=files, format=request.format)


def _writer(loaded: LoadedModel, request: ExportModelRequest, progress: Progress) -> Callable[[Path], None]:
    """Returns what writes the form; what cannot be written is refused here, before anything is."""
    match request.format:
        case ExportFormat.EXPORT_FORMAT_ADAPTER:
            _require_adapter(loaded.model)
            return lambda work: _write_adapter(loaded, work, progress)
        case ExportFormat.EXPORT_FORMAT_MERGED_16BIT:
            weights = merged_weights(loaded)
            return lambda work: write_model(loaded, weights, work, progress)
        case ExportFormat.EXPORT_FORMAT_MERGED_4BIT:
            _require_gpu(loaded.model)
            weights = merged_weights(loaded)
            return lambda work: write_model(loaded, weights, work, progress, in_4bit=True)
        case ExportFormat.EXPORT_FORMAT_GGUF:
            converter = gguf_export.Converter(request.gguf_quantization)
            weights = merged_weights(loaded)
            _refuse_base_from_gguf(weights.base)
            return lambda work: converter.write(loaded, weights, work, progress)
        case _:
            raise export_unsupported("This form is not known to this server.")


def _require_adapter(model: Any) -> None:
    if not getattr(model, "peft_config", None):
        raise export_unsupported(
            "The model has no adapter: it is a base model, or all its weights were trained. "
            "Export it as MERGED_16BIT, or attach an adapter with PrepareForTraining."
        )


def _require_gpu(model: Any) -> None:
    if not on_gpu(model):
        raise export_unsupported(
            "4-bit weights are written where the model is on a GPU, and this one is on the CPU. "
            "Export it as MERGED_16BIT and quantise that when you load it."
        )


def _refuse_base_from_gguf(base: Any) -> None:
    """llama.cpp takes the tokenizer that was read from a .gguf file for one of another kind, and writes it so."""
    if Path(str(base.config._name_or_path)).name.startswith("gguf-"):  # see gguf.converted_folder
        raise export_unsupported(
            "The base model was read from a .gguf file, whose tokenizer llama.cpp would not write back as it was. "
            "Export MERGED_16BIT, or train on the model's original safetensors."
        )


def _write_adapter(loaded: LoadedModel, work: Path, progress: Progress) -> None:
    progress("writing")
    loaded.model.save_pretrained(str(work))
    loaded.tokenizer.save_pretrained(str(work))
    (work / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
