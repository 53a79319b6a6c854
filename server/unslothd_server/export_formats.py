"""Which forms this host can export, and the one error for those that it cannot."""

from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version

from unslothd.v1.artifact_pb2 import ExportFormat
from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server.errors import FieldViolation, InvalidFieldsError, PreconditionError
from unslothd_server.llama_cpp import CONVERTER_TYPES, QUANTIZER_TYPES, LlamaCpp, find_llama_cpp

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


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
