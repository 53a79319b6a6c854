"""The receipt of a run: what went in, what ran and what came out, with hashes. docs/receipts.md is its format."""

import hashlib
import json
import platform
import struct
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from unslothd import __version__
from unslothd.v1.dataset_pb2 import DatasetSource
from unslothd.v1.training_pb2 import TrainingConfig, TrainingMetrics
from unslothd.worker.v1.worker_service_pb2 import StartTrainingRequest
from unslothd_server.engine import adapters, devices, readback
from unslothd_server.engine.checkpoints import RECEIPT_NAME
from unslothd_server.engine.durable_files import as_json, sums_of, write_text
from unslothd_server.engine.model_loading import LoadedModel
from unslothd_server.engine.parameters import count_parameters
from unslothd_server.engine.prepared_rows import PreparedRows
from unslothd_server.engine.tokens import TokenisedDataset

RECEIPT_VERSION = 1
# Every package that can change a number, where it is installed.
PACKAGES = (
    "unsloth",
    "unsloth_zoo",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "bitsandbytes",
    "triton",
    "xformers",
    "flash_attn",
    "numpy",
    "pyarrow",
)
HEADER_BYTES = 1024 * 1024  # of a file that is not safetensors
LARGEST_HEADER = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class FinishedRun:
    """What a receipt is made of.

    Args:
        request: What was asked for.
        loaded: The model, after the last step.
        rows: As the trainer got them.
        config: Read back from the trainer.
        metrics: Final figures.
        state: The trainer's state.
        outcome: "succeeded" or "cancelled".
        start_time: When this process took it.
        resumed_from: Step that this process went on from; 0 = it began.
    """

    request: StartTrainingRequest
    loaded: LoadedModel
    rows: PreparedRows
    config: TrainingConfig
    metrics: TrainingMetrics
    state: Any
    outcome: str
    start_time: datetime
    resumed_from: int


def write_receipt(run: FinishedRun, final: Path) -> None:
    """Writes the receipt into the folder of results, which is whole but for it, and into the training's folder."""
    text = json.dumps(_receipt(run, final), indent=2, ensure_ascii=False) + "\n"
    folders = [final, Path(run.request.training_dir)] if run.request.training_dir else [final]
    for folder in folders:
        write_text(folder / RECEIPT_NAME, text)


def _receipt(run: FinishedRun, final: Path) -> dict[str, Any]:
    lora = adapters.attached(run.loaded.model)
    evaluation = run.rows.evaluation
    return {
        "receipt_version": RECEIPT_VERSION,
        "training_id": run.request.training_id,
        "outcome": run.outcome,
        "step": int(run.state.global_step),
        "total_steps": int(run.state.max_steps),
        "start_time": _time(run.start_time),
        "end_time": _time(datetime.now(UTC)),
        "resumed_from_step": run.resumed_from,
        "versions": _versions(),
        "platform": platform.platform(),
        "device": _device(run.loaded.model),
        "seeds": {
            "training": int(run.config.seed),
            "adapter": run.loaded.adapter_seed,
            "load": int(run.loaded.request.seed),
        },
        "model": {**_model(run.loaded), "trained_by": _trained_by(run)},
        **({"lora": _plain(lora)} if lora is not None else {}),
        "config": _plain(run.config),
        "datasets": {
            "train": _dataset(run.request.train_dataset, run.rows.train),
            **({"eval": _dataset(run.request.eval_dataset, evaluation)} if evaluation is not None else {}),
        },
        "losses": _losses(run.state.log_history),
        "metrics": _plain(run.metrics),
        "files": as_json(sums_of(final, without=[RECEIPT_NAME])),
    }


def _plain(message: Message) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True)


def _time(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _versions() -> dict[str, str]:
    import torch

    found = {"python": platform.python_version(), "unslothd": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    # With the build, e.g. "+cu130", which the package's own version does not always have.
    found["torch"] = str(torch.__version__)
    return found


def _device(model: Any) -> dict[str, str]:
    import torch

    device = {"name": devices.device_title(model)}
    if device["name"] != "cpu":
        device["driver"] = _driver()
        device["cuda"] = str(torch.version.cuda or "")
    return device


def _driver() -> str:
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # noqa: BLE001 - no NVML, no permission: a receipt without the driver is still one
        return ""


def _model(loaded: LoadedModel) -> dict[str, Any]:
    model, request = loaded.model, loaded.request
    counts = count_parameters(model)
    return {
        "model_name": request.model_name,
        "source": request.source,
        "revision": request.revision,
        "commit": _commit(request.source, request.revision),
        "base_model": _base(loaded),
        "base_commit": _commit(_base(loaded), ""),
        "weights": [_weights_file(path) for path in _weights_files(loaded)],
        "weights_from": loaded.weights_from,
        "dtype": readback.weights_dtype(model),
        "load_in_4bit": readback.has_4bit_weights(model),
        "full_finetuning": request.full_finetuning,
        "max_seq_length": loaded.max_seq_length,
        "total_params": counts.total,
        "trainable_params": counts.trainable,
    }


def _trained_by(run: FinishedRun) -> list[str]:
    """Trainings whose result this one began with."""
    return [training_id for training_id in run.loaded.trained_by if training_id != run.request.training_id]


def _base(loaded: LoadedModel) -> str:
    """Hub id or path of the base model where the source is an adapter, else empty."""
    peft_configs = getattr(loaded.model, "peft_config", None)
    if not loaded.from_adapter or not peft_configs:
        return ""
    return str(next(iter(peft_configs.values())).base_model_name_or_path)


def _commit(source: str, revision: str) -> str:
    """The Hub commit that a name stands for in the local cache; empty for a path or nothing."""
    from huggingface_hub import try_to_load_from_cache

    if not source or Path(source).is_absolute():
        return ""
    for name in ("config.json", "adapter_config.json"):
        found = try_to_load_from_cache(source, name, revision=revision or None)
        if isinstance(found, str):
            return Path(found).parent.name
    return ""


def _weights_files(loaded: LoadedModel) -> Iterator[Path]:
    """Files of local weights: of the source, and of the base where the source is an adapter."""
    for source in (Path(loaded.request.source), Path(_base(loaded))):
        if source.is_absolute() and source.is_file():
            yield source
        elif source.is_absolute():
            yield from sorted(source.glob("*.safetensors"))


def _weights_file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        head = file.read(8) if path.suffix == ".safetensors" else b""
        length = min(struct.unpack("<Q", head)[0], LARGEST_HEADER) if len(head) == 8 else HEADER_BYTES  # noqa: PLR2004
        header = head + file.read(length)
    return {
        "path": str(path),
        "num_bytes": path.stat().st_size,
        "header_sha256": hashlib.sha256(header).hexdigest(),
    }


def _dataset(source: DatasetSource, rows: TokenisedDataset) -> dict[str, Any]:
    # The rows of a request are in a file by now, so the source names them and does not hold them.
    return {
        "source": _plain(source),
        "row_format": _plain(rows.row_format),
        **({"file": asdict(rows.file)} if rows.file is not None else {}),
        **({"fingerprint": rows.fingerprint} if rows.fingerprint else {}),
        "num_rows": rows.num_rows,
        "num_tokens": rows.num_tokens,
        "loss_tokens": rows.loss_tokens,
        "truncated_rows": rows.truncated_rows,
        "dropped_rows": rows.dropped_rows,
        "tokens_sha256": tokens_sha256(rows.rows),
    }


def tokens_sha256(rows: Any) -> str:
    """Of the lengths, then the input_ids, then the labels of all rows; a datasets.Dataset as the trainer gets it."""
    import numpy as np
    import pyarrow.compute as pc

    table = rows.with_format("arrow")[:]
    digest = hashlib.sha256()
    for chunk in table.column("input_ids").chunks:
        digest.update(pc.list_value_length(chunk).to_numpy(zero_copy_only=False).astype("<i8").tobytes())
    for name in ("input_ids", "labels"):
        for chunk in table.column(name).chunks:
            digest.update(np.ascontiguousarray(chunk.flatten().to_numpy(), dtype="<i4"))
    return digest.hexdigest()


def _losses(history: Iterable[dict[str, Any]]) -> dict[str, Any]:
    digest, count = hashlib.sha256(), 0
    for entry in history:
        if "loss" in entry:
            digest.update(struct.pack("<qd", int(entry["step"]), float(entry["loss"])))
            count += 1
    return {"count": count, "sha256": digest.hexdigest()}
