"""What a load request names: a saved adapter, a model folder, a GGUF file or a Hub repository."""

import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server.errors import NotFoundError, PreconditionError


class SourceKind(Enum):
    """How a source has to be loaded."""

    HUB = "hub"
    FOLDER = "folder"
    ADAPTER = "adapter"
    GGUF = "gguf"


@dataclass(frozen=True)
class ModelSource:
    """A source that is there, as far as can be told without the network.

    Args:
        kind: How to load it.
        name: Hub id or absolute path.
        base: Of an adapter: Hub id or path of its base model.
    """

    kind: SourceKind
    name: str
    base: str = ""

    @property
    def places(self) -> list[Path]:
        """Where it lies on this host, and its base: all but what comes from the Hub."""
        return [Path(name) for name in (self.name, self.base) if Path(name).is_absolute()]


def find_source(source: str) -> ModelSource:
    """Looks at what a request names.

    Raises:
        NotFoundError: MODEL_SOURCE_NOT_FOUND.
        PreconditionError: UNSAFE_WEIGHTS: the folder has weights, but only pickled ones.
    """
    if not Path(source).is_absolute():
        return ModelSource(SourceKind.HUB, source)
    path = Path(source)
    if path.is_file() and path.suffix.lower() == ".gguf":
        return ModelSource(SourceKind.GGUF, source)
    if path.is_file():
        raise source_not_found(f"{path} is a file, but not a .gguf file.")
    if not path.is_dir():
        raise source_not_found(f"There is no folder or .gguf file {path}.")
    return inspect_folder(path, source)


def inspect_folder(path: Path, name: str) -> ModelSource:
    """Tells an adapter's folder from a model's, and both from one that cannot be loaded.

    Args:
        path: Folder on disk.
        name: What the loader shall be given: the path itself or a Hub id that is in the cache.
    """
    if (path / "adapter_config.json").is_file():
        _require_safetensors(path, "adapter_model")
        return ModelSource(SourceKind.ADAPTER, name, base=_base_of_adapter(path))
    if not (path / "config.json").is_file():
        raise source_not_found(f"{path} has neither a config.json nor an adapter_config.json, so it is not a model.")
    _require_safetensors(path, "the model")
    return ModelSource(SourceKind.FOLDER, name)


def _base_of_adapter(path: Path) -> str:
    try:
        base = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise source_not_found(f"The adapter_config.json of {path} does not name its base model ({error}).") from None
    if not isinstance(base, str) or not base:
        raise source_not_found(f"The adapter_config.json of {path} does not name its base model.")
    if Path(base).is_absolute():
        find_source(base)
    return base


def _require_safetensors(path: Path, what: str) -> None:
    if any(path.glob("*.safetensors")):
        return
    if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        raise unsafe_weights(str(path))
    raise source_not_found(f"{path} has no *.safetensors file with the weights of {what}.")


def unsafe_weights(where: str) -> PreconditionError:
    """The error for weights that only a pickle holds."""
    return PreconditionError(
        ErrorReason.ERROR_REASON_UNSAFE_WEIGHTS,
        f"The weights in {where} are pickled (.bin or .pt), and reading them could run code of whoever made them. "
        "Give a model saved as safetensors or GGUF; transformers' save_pretrained writes safetensors.",
    )


def source_not_found(what: str) -> NotFoundError:
    """The error for a source that holds no model."""
    return NotFoundError(
        ErrorReason.ERROR_REASON_MODEL_SOURCE_NOT_FOUND,
        f"{what} Give a Hub id, a folder with config.json and safetensors, a saved adapter, or a .gguf file.",
    )
