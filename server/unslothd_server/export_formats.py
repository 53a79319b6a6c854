"""Which forms this host can export, and the one error for those that it cannot."""

from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version

from unslothd.v1.artifact_pb2 import ExportFormat
from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.service_pb2 import ExportModelRequest
from unslothd_server.errors import FieldViolation, InvalidFieldsError, PreconditionError
from unslothd_server.llama_cpp import CONVERTER_TYPES, FOLDER_VARIABLE, QUANTIZER_TYPES, LlamaCpp, find_llama_cpp

DEFAULT_GGUF_QUANTIZATION = "q8_0"


def export_formats(
    device_names: Sequence[str], find: Callable[[], LlamaCpp | None] = find_llama_cpp
) -> "list[ExportFormat.ValueType]":
    """The forms that ExportModel can write here.

    Args:
        device_names: Of the devices of this host, e.g. ["cuda:0"] or ["cpu"].
        find: Finds llama.cpp.
    """
    formats = [ExportFormat.EXPORT_FORMAT_ADAPTER, ExportFormat.EXPORT_FORMAT_MERGED_16BIT]
    if any(name.startswith("cuda") for name in device_names) and _is_installed("bitsandbytes"):
        formats.append(ExportFormat.EXPORT_FORMAT_MERGED_4BIT)
    if find() is not None and _is_installed("gguf"):
        formats.append(ExportFormat.EXPORT_FORMAT_GGUF)
    return formats


def check_export(request: ExportModelRequest, possible: "Sequence[ExportFormat.ValueType]") -> None:
    """Refuses a form that cannot be written here, before anything is begun.

    Args:
        request: What is asked for.
        possible: The forms that can be.

    Raises:
        PreconditionError: EXPORT_UNSUPPORTED.
        InvalidFieldsError: gguf_quantization is unknown, or set with another form.
    """
    if request.gguf_quantization and request.format != ExportFormat.EXPORT_FORMAT_GGUF:
        raise InvalidFieldsError([FieldViolation("gguf_quantization", "must be unset: the form is not GGUF")])
    if request.format not in possible:
        names = ", ".join(_name(form) for form in possible)
        raise export_unsupported(
            f"This server cannot write {_name(request.format)}: {_WHAT_IT_NEEDS[request.format]}. It can write {names}."
        )
    found = find_llama_cpp()
    if request.format == ExportFormat.EXPORT_FORMAT_GGUF and found is not None:
        check_gguf_quantization(request.gguf_quantization.lower() or DEFAULT_GGUF_QUANTIZATION, found)


_WHAT_IT_NEEDS = {
    ExportFormat.EXPORT_FORMAT_MERGED_4BIT: "it needs a GPU and bitsandbytes",
    ExportFormat.EXPORT_FORMAT_GGUF: f"it needs llama.cpp, whose folder the operator names in {FOLDER_VARIABLE}",
}


def check_gguf_quantization(name: str, llama_cpp: LlamaCpp) -> None:
    """Raises InvalidFieldsError for an unknown type, PreconditionError for one that needs a missing quantizer."""
    if name not in CONVERTER_TYPES | QUANTIZER_TYPES:
        known = ", ".join(sorted(CONVERTER_TYPES | QUANTIZER_TYPES))
        raise InvalidFieldsError([FieldViolation("gguf_quantization", f'"{name}" is not known; use one of {known}')])
    if name in QUANTIZER_TYPES and llama_cpp.quantizer is None:
        raise export_unsupported(
            f'"{name}" needs llama-quantize, which is not on this server. '
            f"Choose one of {', '.join(sorted(CONVERTER_TYPES))}, or ask the operator to build llama.cpp."
        )


def export_unsupported(text: str) -> PreconditionError:
    """The error for a form that cannot be written here."""
    return PreconditionError(ErrorReason.ERROR_REASON_EXPORT_UNSUPPORTED, text)


def _name(form: "ExportFormat.ValueType") -> str:
    return ExportFormat.Name(form).removeprefix("EXPORT_FORMAT_")


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
