"""Loads a model with Unsloth from whatever the request names, and reads back what was really loaded."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.model_pb2 import LoadProgress
from unslothd.worker.v1.bootstrap_pb2 import WorkerBootstrap
from unslothd.worker.v1.worker_service_pb2 import LoadModelRequest
from unslothd_server.engine import gguf, hub
from unslothd_server.engine.model_files import ModelFiles, changed
from unslothd_server.engine.model_source import (
    ModelSource,
    SourceKind,
    find_source,
    inspect_folder,
    source_not_found,
)
from unslothd_server.engine.oom import exhausted
from unslothd_server.errors import FieldViolation, InvalidFieldsError, PreconditionError, UnslothdError

Report = Callable[[LoadProgress], None]
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class LoadedModel:
    """A model with its tokenizer and what is known about it.

    Args:
        model: A Transformers model, or a PEFT model around one.
        tokenizer: Its tokenizer.
        request: What was asked for.
        device_map: Placement asked for.
        max_seq_length: Tokens that are really possible.
        from_adapter: True when it came with a saved adapter.
        prepared: True once trainable parameters are attached by the user's wish.
        warnings: What differs from the request, one sentence each.
        adapter_seed: Of the adapter's first weights.
        weights_from: Folder whose weights replaced these; empty = none.
        trained_by: Ids of the trainings that changed the weights here, oldest first.
        cache_dir: Folder that outlives the worker; None = nothing is remembered.
    """

    model: Any
    tokenizer: Any
    request: LoadModelRequest
    device_map: str
    max_seq_length: int
    from_adapter: bool = False
    prepared: bool = False
    warnings: list[str] = field(default_factory=list)
    adapter_seed: int = 0
    weights_from: str = ""
    trained_by: list[str] = field(default_factory=list)
    cache_dir: Path | None = None


def load_model(bootstrap: WorkerBootstrap, request: LoadModelRequest, report: Report) -> LoadedModel:
    """Loads a model.

    Raises:
        NotFoundError: MODEL_SOURCE_NOT_FOUND.
        PreconditionError: UNSAFE_WEIGHTS, REMOTE_CODE_REFUSED.
        PermissionDeniedError: The Hub; files that lead out of the roots, or changed while they were read.
        UnavailableError: The Hub.
        ExhaustedError: OUT_OF_MEMORY.
        InvalidFieldsError: dtype is unknown.
    """
    dtype = _dtype(request.dtype)
    source, files = _looked_at(request.source, [Path(root) for root in bootstrap.model_roots])
    source = _on_this_host(source, bootstrap, request, report)
    report(LoadProgress(phase=LoadProgress.PHASE_LOADING_WEIGHTS))
    if source.kind is SourceKind.GGUF:
        with hub.offline():
            folder = gguf.converted_folder(Path(source.name), Path(bootstrap.cache_dir), files.require_unchanged)
        source = ModelSource(SourceKind.FOLDER, str(folder))
    model, tokenizer = _from_pretrained(source, bootstrap, request, dtype)
    files.require_unchanged()
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        request=request,
        device_map=bootstrap.device_map or "auto",
        max_seq_length=int(getattr(model, "max_seq_length", 0) or request.max_seq_length),
        from_adapter=source.kind is SourceKind.ADAPTER,
        cache_dir=Path(bootstrap.cache_dir) if bootstrap.cache_dir else None,
    )


def _looked_at(name: str, roots: list[Path]) -> tuple[ModelSource, ModelFiles]:
    """What a request names, and its files as they were when that was told."""
    source = find_source(name)
    files = ModelFiles(source.places, roots)
    if find_source(name) != source:
        raise changed(f"{name} was replaced while it was looked at")
    return source, files


def _on_this_host(
    source: ModelSource, bootstrap: WorkerBootstrap, request: LoadModelRequest, report: Report
) -> ModelSource:
    """Downloads what is not here yet: a Hub model, a Hub adapter, the Hub base of an adapter."""

    def download(name: str, revision: str) -> Path:
        report(LoadProgress(phase=LoadProgress.PHASE_DOWNLOADING))
        return Path(
            hub.download_model(
                name,
                revision=revision,
                token=request.token,
                trust_remote_code=bootstrap.trust_remote_code,
                report=lambda done, total: report(
                    LoadProgress(phase=LoadProgress.PHASE_DOWNLOADING, done=done, total=total)
                ),
            )
        )

    if source.kind is SourceKind.HUB:
        source = inspect_folder(download(source.name, request.revision), source.name)
    if source.kind is SourceKind.ADAPTER and not Path(source.base).is_absolute():
        inspect_folder(download(source.base, ""), source.base)
    return source


def _from_pretrained(
    source: ModelSource, bootstrap: WorkerBootstrap, request: LoadModelRequest, dtype: Any
) -> tuple[Any, Any]:
    import torch
    from unsloth import FastLanguageModel

    on_gpu = _uses_gpu(bootstrap.device_map)
    torch.manual_seed(request.seed)
    wants_4bit = request.load_in_4bit if request.HasField("load_in_4bit") else on_gpu
    options: dict[str, Any] = {"use_exact_model_name": True}
    if on_gpu:
        options["device_map"] = {"": _gpu_index(bootstrap.device_map)}
    try:
        # Everything is on disk by now, so the network is neither needed nor waited for.
        with hub.offline():
            return FastLanguageModel.from_pretrained(
                model_name=source.name,
                max_seq_length=request.max_seq_length,
                # Half precision is emulated on most CPUs and would make a resumed run differ from an unbroken one.
                dtype=dtype or (None if on_gpu else torch.float32),
                load_in_4bit=wants_4bit and not request.full_finetuning,
                full_finetuning=request.full_finetuning,
                token=request.token or None,
                trust_remote_code=bootstrap.trust_remote_code,
                use_safetensors=True,
                revision=request.revision or None,
                **options,
            )
    except UnslothdError:
        raise
    except Exception as error:
        raise _load_error(error, source, bootstrap) from error


def _load_error(error: Exception, source: ModelSource, bootstrap: WorkerBootstrap) -> Exception:
    """Ours where the cause is known; the error itself where it is not."""
    known = exhausted(error, "load the model with load_in_4bit, a smaller model, or on a free device")
    if known is not None:
        return known
    text = str(error)
    if "trust_remote_code" in text and not bootstrap.trust_remote_code:
        return PreconditionError(
            ErrorReason.ERROR_REASON_REMOTE_CODE_REFUSED,
            f"{source.name} needs Python code of its own, which this server does not run. Ask its operator to allow "
            "trust_remote_code, or load another model.",
        )
    if isinstance(error, OSError | ValueError | KeyError) or type(error).__name__ == "SafetensorError":
        return source_not_found(f"{source.name} cannot be loaded: {text}.")
    return error


def _uses_gpu(device_map: str) -> bool:
    import torch

    return torch.cuda.is_available() and device_map != "cpu"


def _gpu_index(device_map: str) -> int:
    import torch

    asked = int(device_map.partition(":")[2] or 0) if device_map.startswith("cuda") else 0
    # A launcher that shows the worker one GPU only has renumbered it.
    return asked if asked < torch.cuda.device_count() else 0


def _dtype(name: str) -> Any:
    import torch

    if not name:
        return None
    if name not in DTYPES:
        raise InvalidFieldsError([FieldViolation("dtype", f'"{name}" is not known; use one of {", ".join(DTYPES)}')])
    return getattr(torch, name)
