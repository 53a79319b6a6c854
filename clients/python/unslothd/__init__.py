"""The client of unslothd: load, prepare and fine-tune models on a GPU host, and watch every step.

    import unslothd

    client = unslothd.Client("127.0.0.1:50051")
    model = client.load_model("unsloth/Llama-3.2-1B-Instruct")
    client.prepare(model, learning_rate=1e-4, lora={"r": 8})
    for event in client.train(model, [{"text": "…"}], max_steps=10):
        print(event)

Names are imported at their first use: the server and its workers import `unslothd.v1` from this package and need none
of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from unslothd._version import __version__

if TYPE_CHECKING:
    from unslothd import errors
    from unslothd._async_client import AsyncClient
    from unslothd._client import Client
    from unslothd._datasets import DatasetLike, HubDataset, ServerPath, UploadedDataset, dataset
    from unslothd._download_folder import DownloadProgress
    from unslothd._receipt import Finding, ReceiptError, read_receipt, verify_receipt
    from unslothd._requests import GenerationOptions, LoadOptions, LoraOptions, TrainingOptions
    from unslothd._row_format import row_format
    from unslothd._runs import AsyncTextStream, AsyncTrainingRun, TextStream, TrainingRun
    from unslothd._upload import UploadProgress
    from unslothd.errors import TrainingCancelled, TrainingFailed, UnslothdError
    from unslothd.v1.artifact_pb2 import Artifact, ExportProgress
    from unslothd.v1.dataset_pb2 import Dataset
    from unslothd.v1.model_pb2 import LoadProgress, LoraConfig, Model
    from unslothd.v1.training_event_pb2 import TrainingEvent
    from unslothd.v1.training_pb2 import Training, TrainingConfig, TrainingMetrics, TrainingPlan

__all__ = [
    "Artifact",
    "AsyncClient",
    "AsyncTextStream",
    "AsyncTrainingRun",
    "Client",
    "Dataset",
    "DatasetLike",
    "DownloadProgress",
    "ExportProgress",
    "Finding",
    "GenerationOptions",
    "HubDataset",
    "LoadOptions",
    "LoadProgress",
    "LoraConfig",
    "LoraOptions",
    "Model",
    "ReceiptError",
    "ServerPath",
    "TextStream",
    "Training",
    "TrainingCancelled",
    "TrainingConfig",
    "TrainingEvent",
    "TrainingFailed",
    "TrainingMetrics",
    "TrainingOptions",
    "TrainingPlan",
    "TrainingRun",
    "UnslothdError",
    "UploadProgress",
    "UploadedDataset",
    "__version__",
    "dataset",
    "errors",
    "read_receipt",
    "row_format",
    "verify_receipt",
]

_MODULES = {
    "unslothd._async_client": ("AsyncClient",),
    "unslothd._client": ("Client",),
    "unslothd._download_folder": ("DownloadProgress",),
    "unslothd._receipt": ("Finding", "ReceiptError", "read_receipt", "verify_receipt"),
    "unslothd._requests": ("GenerationOptions", "LoadOptions", "LoraOptions", "TrainingOptions"),
    "unslothd._datasets": ("DatasetLike", "HubDataset", "ServerPath", "UploadedDataset", "dataset"),
    "unslothd._row_format": ("row_format",),
    "unslothd._runs": ("AsyncTextStream", "AsyncTrainingRun", "TextStream", "TrainingRun"),
    "unslothd._upload": ("UploadProgress",),
    "unslothd.errors": ("TrainingCancelled", "TrainingFailed", "UnslothdError"),
    "unslothd.v1.artifact_pb2": ("Artifact", "ExportProgress"),
    "unslothd.v1.dataset_pb2": ("Dataset",),
    "unslothd.v1.model_pb2": ("LoadProgress", "LoraConfig", "Model"),
    "unslothd.v1.training_event_pb2": ("TrainingEvent",),
    "unslothd.v1.training_pb2": ("Training", "TrainingConfig", "TrainingMetrics", "TrainingPlan"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name == "errors":
        return import_module("unslothd.errors")
    if name in _MODULE_OF:
        value = getattr(import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'unslothd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
