"""What a model_name means: a Hub id, a folder, a saved adapter, a .gguf file, or the result of a training."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server.app.paths import AllowedRoots, is_file_or_folder
from unslothd_server.errors import FieldViolation, InvalidFieldsError, NotFoundError

_HUB_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?$")
_TRAINING = "training:"


@dataclass(frozen=True)
class ModelSource:
    """Where a model really comes from.

    Args:
        source: Hub id, or absolute path of a folder or .gguf file.
        path: The same as a path; None for a Hub id.
        base_id: What the model_id is made of, e.g. "Llama-2-7b".
    """

    source: str
    path: Path | None
    base_id: str


def resolve_model_source(name: str, roots: AllowedRoots, result_of: Callable[[str, int], Path]) -> ModelSource:
    """Works out what a model_name means.

    Args:
        name: As the caller gave it.
        roots: Folders that may be read.
        result_of: Returns the folder of a training's final adapter (step 0) or of a checkpoint; raises NotFoundError.

    Raises:
        UnslothdError: MODEL_SOURCE_NOT_FOUND, TRAINING_NOT_FOUND, PATH_NOT_ALLOWED or INVALID_FIELD.
    """
    if name.startswith(_TRAINING):
        training_id, _, checkpoint = name.removeprefix(_TRAINING).partition("/checkpoint-")
        if checkpoint and not (checkpoint.isdecimal() and int(checkpoint)):
            raise InvalidFieldsError(
                [FieldViolation("model_name", f'"checkpoint-{checkpoint}" names no step; write e.g. "checkpoint-40"')]
            )
        return _local(result_of(training_id, int(checkpoint or 0)).resolve(), training_id, roots)
    if _is_path(name):
        path = roots.require(name, ErrorReason.ERROR_REASON_MODEL_SOURCE_NOT_FOUND, "model")
        return _local(path, _base_id(name, path), roots)
    if _HUB_ID.fullmatch(name):
        path = roots.find(name)
        if path is not None:
            return _local(path, _base_id(name, path), roots)
        return ModelSource(source=name, path=None, base_id=name.rpartition("/")[2])
    raise InvalidFieldsError(
        [
            FieldViolation(
                "model_name",
                f'"{name}" is no Hub id ("org/name"), no path below {roots}, and neither "training:<training_id>" nor '
                '"training:<training_id>/checkpoint-<step>"',
            )
        ]
    )


def _is_path(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~")) or name.endswith(".gguf") or name.count("/") > 1


def _base_id(name: str, path: Path) -> str:
    """The last part of the name as it was asked for, which may be a link's; of "..", what it leads to."""
    asked = Path(name)
    last = path if asked.name in {"", ".", ".."} else asked
    return last.stem if last.suffix == ".gguf" else last.name


def _local(path: Path, base_id: str, roots: AllowedRoots) -> ModelSource:
    roots.check(path)  # the result of a training was not looked up in them
    if path.is_dir():
        roots.check_inside(path)
        if not (path / "config.json").exists() and not (path / "adapter_config.json").exists():
            raise NotFoundError(
                ErrorReason.ERROR_REASON_MODEL_SOURCE_NOT_FOUND,
                f'"{path}" holds no model: it has neither config.json nor adapter_config.json.',
            )
        _check_base(path, roots)
    elif path.suffix != ".gguf":
        raise NotFoundError(
            ErrorReason.ERROR_REASON_MODEL_SOURCE_NOT_FOUND,
            f'"{path}" is no model: give a folder with config.json or adapter_config.json, or a .gguf file.',
        )
    return ModelSource(source=str(path), path=path, base_id=base_id)


def _check_base(folder: Path, roots: AllowedRoots) -> None:
    """An adapter names its base model; that must not lead out of the roots either."""
    config = folder / "adapter_config.json"
    if not config.exists():
        return
    try:
        base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        raise NotFoundError(
            ErrorReason.ERROR_REASON_MODEL_SOURCE_NOT_FOUND, f'"{config}" is not readable JSON; save the adapter again.'
        ) from None
    if isinstance(base, str) and (_is_path(base) or is_file_or_folder(Path(base))):
        roots.check(Path(base))
