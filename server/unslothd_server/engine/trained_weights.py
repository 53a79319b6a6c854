"""The trainable weights of a checkpoint or a result, put into a model that was prepared in the same way."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server.engine import checkpoints
from unslothd_server.errors import NotFoundError, PreconditionError

ADAPTER_NAME = "default"
SHOWN_NAMES = 3


def replace_weights(model: Any, folder: Path) -> None:
    """Replaces the adapter, or with full fine-tuning all weights, by those saved in a folder.

    Only safetensors are read. The model is changed only when the weights fit.

    Args:
        model: Prepared: with an adapter, or with all weights trainable.
        folder: A checkpoint, or the folder of a result.

    Raises:
        NotFoundError: CHECKPOINT_NOT_FOUND: no such folder, or no weights in it.
        PreconditionError: CHECKPOINT_DAMAGED: the files are not whole, or hold the weights of another adapter or model.
    """
    has_adapter = bool(getattr(model, "peft_config", None))
    weights = _read(folder, "adapter_model*.safetensors" if has_adapter else "model*.safetensors")
    if has_adapter:
        _replace_adapter(model, weights, folder)
    else:
        _replace_all(model, weights, folder)


def _read(folder: Path, pattern: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    files = sorted(folder.glob(pattern))
    if not files:
        raise NotFoundError(
            ErrorReason.ERROR_REASON_CHECKPOINT_NOT_FOUND,
            f"There are no weights {pattern} in {folder}. Name a checkpoint that is there, or train anew.",
        )
    problem = checkpoints.verify(folder) if checkpoints.step_of(folder) else checkpoints.verify_result(folder)
    if problem is not None:
        raise _damaged(folder, problem)
    weights: dict[str, Any] = {}
    try:
        for file in files:
            weights.update(load_file(file))
    except Exception as error:
        # SafetensorError derives from Exception only.
        raise _damaged(folder, f"its weights cannot be read ({error})") from error
    return weights


def _replace_adapter(model: Any, weights: dict[str, Any], folder: Path) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    # "auto" would ask the Hub whether the vocabulary was changed.
    wanted = get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
    extra = [name for name in weights if "lora_" in name and name not in wanted]
    _require_fit(wanted, weights, extra, folder)
    set_peft_model_state_dict(model, weights, adapter_name=ADAPTER_NAME)


def _replace_all(model: Any, weights: dict[str, Any], folder: Path) -> None:
    # named_parameters() names a tied weight once, as safetensors keep it.
    wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    known = model.state_dict()
    _require_fit(wanted, weights, [name for name in weights if name not in known], folder)
    model.load_state_dict(weights, strict=False)


def _require_fit(wanted: Mapping[str, Any], weights: Mapping[str, Any], extra: list[str], folder: Path) -> None:
    missing = [name for name in wanted if name not in weights]
    other = [name for name in wanted if name in weights and wanted[name].shape != weights[name].shape]
    if missing or other or extra:
        names = [*missing, *other, *extra]
        shown = ", ".join(names[:SHOWN_NAMES]) + (", …" if len(names) > SHOWN_NAMES else "")
        raise _damaged(folder, f"its weights are those of another model or adapter ({shown} differ)")


def _damaged(folder: Path, problem: str) -> PreconditionError:
    return PreconditionError(
        ErrorReason.ERROR_REASON_CHECKPOINT_DAMAGED,
        f"{folder} cannot be used: {problem}. Name another checkpoint, or train anew.",
    )
